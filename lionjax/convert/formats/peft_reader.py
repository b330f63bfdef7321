# SPDX-License-Identifier: Apache-2.0
"""Read a PEFT folder onto its base model: as separate LoRA matrices, or merged into the base's tensors.

Every tensor of the file is used, or one UserError names those that cannot be. Tensors that replace tensors of the base
(`modules_to_save`, `bias`, `trainable_token_indices`, LLaVA's non_lora_trainables.bin) are put in their place.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.formats.checkpoint_format import CheckpointSource
from lionjax.convert.formats.peft import ADAPTER_STEM, LayerLora, is_conv1d, layer_lora, lora_pair_keys, stack_loras
from lionjax.convert.formats.peft_config import AdapterSettings, read_adapter_settings
from lionjax.convert.io.key_names import PEFT_PREFIX
from lionjax.convert.io.reader import CheckpointTensors, open_weights
from lionjax.convert.mapping.plan import group_numbered_names
from lionjax.core.types import UserError
from lionjax.core.weight_map import KeyTemplate, WeightMapping
from lionjax.nn.lora import LoraConfig

NON_LORA_FILE = "non_lora_trainables.bin"  # of LLaVA's code: the projector and other parameters that were trained whole
AUXILIARY_PARTS = re.compile(r"(?<=\.)modules_to_save(?:\.default)?\.")  # of names of modules that are saved whole
LORA_NAME = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.(?P<end>weight|bias))?"
)
TOKENS_NAME = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_(?P<kind>delta|original)(?:\.default)?")
TRAINING_NAME = re.compile(r".+\.lora_velora_embed(?:\.default)?")  # read by VeLoRA's backward pass only
MERGE_HINT = "give --merge-lora to merge the adapter into the weights"


@dataclasses.dataclass
class ModuleLora:
    """The tensors of one module's LoRA, by the ends of their names: A, B, A_embedding, ..."""

    name: str  # as in the file
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """A (rank, in) and B (out, rank); those of convolutions have two more axes."""
        kind = "embedding_" if "embedding_A" in self.tensors else ""
        return self.tensors[f"{kind}A"], self.tensors[f"{kind}B"]


class LazyArray:
    """An array computed from `base` by `numpy.asarray`, with its shape and dtype."""

    def __init__(self, base: Any, compute: Callable[[np.ndarray], np.ndarray]):
        self.base, self.compute, self.parts = base, compute, getattr(base, "parts", (base,))
        self.shape, self.dtype = tuple(base.shape), np.dtype(base.dtype)
        self.ndim, self.size, self.nbytes = base.ndim, base.size, base.nbytes

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.compute(np.asarray(self.base)).astype(self.dtype)
        return array if dtype is None else array.astype(dtype)


def published_name(name: str, source: CheckpointSource, weight_map: Iterable[WeightMapping]) -> str | None:
    """The name in the files of a tensor that is named as in transformers' class of any version, None without one."""
    canonical = name
    for pattern, new in source.checkpoint_format.key_patterns:
        canonical = re.sub(pattern, new, canonical, count=1)
    tied_keys = {key for mapping in weight_map for key in mapping.tied_keys}
    candidates = (name, canonical, source.checkpoint_format.base_model_prefix + canonical)
    return next((key for key in candidates if key in source.tensors or key in tied_keys), None)


class AdapterReader:
    """The adapter of a folder, matched with the tensors of its base."""

    def __init__(self, folder: Path, source: CheckpointSource, weight_map: Iterable[WeightMapping]):
        self.settings = read_adapter_settings(folder)
        self.folder, self.source, self.weight_map = folder, source, tuple(weight_map)
        self.modules: dict[str, ModuleLora] = {}  # by the module's name in the weight map
        self.replaced: dict[str, np.ndarray] = {}
        self.problems: list[str] = []
        self.tensors = open_adapter_weights(folder)
        self._sort_tensors()
        self._check_modules()
        if self.problems:
            listed = "".join(f"\n  {problem}" for problem in dict.fromkeys(self.problems))
            raise UserError(f"the adapter of {folder} does not fit this model:{listed}")

    # Names

    def _resolve(self, name: str) -> str | None:
        return published_name(name, self.source, self.weight_map)

    def _is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.source.checkpoint_format.ignore_patterns)

    def _sort_tensors(self) -> None:
        """Fill `modules` and `replaced` from the file's tensors."""
        unknown = []
        for raw, tensor in self.tensors.items():
            name = AUXILIARY_PARTS.sub("", raw.removeprefix(PEFT_PREFIX))
            if TRAINING_NAME.fullmatch(name):
                continue
            lora, tokens = LORA_NAME.fullmatch(name), TOKENS_NAME.fullmatch(name)
            if lora is not None:
                key = self._resolve(f"{lora['module']}.weight")
                if key is None:
                    unknown.append(name)
                    continue
                kind = lora["kind"] + ("_bias" if lora["end"] == "bias" else "")
                self.modules.setdefault(key, ModuleLora(lora["module"])).tensors[kind] = tensor
            elif tokens is not None:
                key = self._resolve(f"{tokens['module']}.weight")
                if key is None:
                    unknown.append(name)
                elif tokens["kind"] == "delta":
                    self._replace_rows(key, tokens["module"], tensor)
            elif (key := self._resolve(name)) is not None:
                self._replace(key, tensor)
            elif not self._is_ignored(name):
                unknown.append(name)
        if unknown and not self.modules and not self.replaced:
            raise UserError(f"the adapter of {self.folder} belongs to another model: none of its names is in this one")
        self.problems += [f"the model has no tensor {text}" for text in group_numbered_names(unknown)]

    def _base(self, key: str) -> Any:
        """The base's tensor; of a tied name that the file omits, that of the tensor it is tied to."""
        if key in self.source.tensors:
            return self.source.tensors[key]
        origin = next(mapping.torch_keys[0] for mapping in self.weight_map if key in mapping.tied_keys)
        return self.source.tensors[origin]

    def _replace(self, key: str, tensor: np.ndarray) -> None:
        base = self._base(key)
        if tuple(tensor.shape) != tuple(base.shape):
            self.problems.append(f"{key!r} is {tensor.shape} in the adapter and {tuple(base.shape)} in the base")
        stacked = re.search(r"\.[0-9]+\.", key) is not None  # the layers of a stack have one dtype
        self.replaced[key] = tensor.astype(base.dtype) if stacked else tensor
        # Without this, names that are tied and omitted would get the new tensor as well.
        for mapping in self.weight_map:
            if mapping.torch_keys[0] == key:
                self.replaced |= {name: base for name in mapping.tied_keys if name not in self.replaced}

    def _replace_rows(self, key: str, module: str, rows: np.ndarray) -> None:
        """The trained rows of an embedding table, also under its tied names."""
        tokens, base = list(self.settings.trained_tokens(module)), self._base(key)
        if rows.shape != (len(tokens), base.shape[1]) or not all(0 <= token < len(base) for token in tokens):
            self.problems.append(f"{key!r} has {rows.shape} trained rows for {len(tokens)} trainable_token_indices")
            return

        def compute(table):
            table = np.array(table)
            table[tokens] = rows.astype(table.dtype)
            return table

        for name in (key, *self.source.tied.get(key, ())):
            self.replaced[name] = LazyArray(self._base(name), compute)

    # Checks

    def _check_modules(self) -> None:
        settings = self.settings
        needed = {"A", "B"} | ({"magnitude_vector"} if settings.use_dora else set())
        needed |= {"B_bias"} if settings.lora_bias else set()
        for lora in self.modules.values():
            kinds = {kind.removeprefix("embedding_") for kind in lora.tensors}
            if missing := sorted(needed - kinds):
                self.problems.append(f"{lora.name!r} has no lora_{missing[0]} in the adapter")
            elif extra := sorted(kinds - needed):
                self.problems.append(f"{lora.name!r} has a lora_{extra[0]}, which the adapter's config leaves out")
            elif not settings.targets(lora.name):
                self.problems.append(f"{lora.name!r} has a LoRA, but is not in the target_modules of its config")
            elif lora.pair[0].shape[0] != settings.module_rank(lora.name) or lora.pair[1].ndim < 2:
                rank = settings.module_rank(lora.name)
                self.problems.append(f"{lora.name!r} has A {lora.pair[0].shape}; its config has rank {rank}")
        if self.problems:
            return
        for mapping, loras in self.by_mapping().items():
            self._check_no_layer_lacks(mapping, loras)
        for name in settings.modules_to_save:
            pattern = rf"(^|.*\.){name}\..*"
            if any(re.fullmatch(pattern, key) for key in self.source.tensors):
                if not any(re.fullmatch(pattern, key) for key in self.replaced):
                    self.problems.append(f"modules_to_save names {name!r}, whose tensors the adapter lacks")
        if settings.token_indices and not any(isinstance(x, LazyArray) for x in self.replaced.values()):
            self.problems.append("it lacks the rows of its trainable_token_indices")

    def by_mapping(self) -> dict[WeightMapping, dict[tuple, ModuleLora]]:
        """{mapping of the kernel: {index of the layer: LoRA}}."""
        groups: dict[WeightMapping, dict[tuple, ModuleLora]] = {}
        for key, lora in self.modules.items():
            for mapping in self.weight_map:
                index = KeyTemplate.parse(mapping.torch_keys[0]).match(key)
                if index is not None or key in mapping.tied_keys:
                    groups.setdefault(mapping, {})[() if index is None else index] = lora
        return groups

    def layer_indices(self, mapping: WeightMapping) -> list[tuple]:
        """The indices of all layers that the base has for a mapping."""
        template = KeyTemplate.parse(mapping.torch_keys[0])
        return sorted(index for name in self.source.tensors if (index := template.match(name)) is not None)

    def _check_no_layer_lacks(self, mapping: WeightMapping, loras: dict[tuple, ModuleLora]) -> None:
        """A module that has a LoRA in some layers has one in all that the config names."""
        template, (some, lora) = KeyTemplate.parse(mapping.torch_keys[0]), next(iter(loras.items()))
        numbers = re.findall(r"[0-9]+", template.fill(some)) if some else []
        for index in self.layer_indices(mapping):
            if index in loras or re.findall(r"[0-9]+", lora.name) != numbers:
                continue
            words = re.split(r"[0-9]+", lora.name)
            name = "".join(w + n for w, n in zip(words, [*re.findall(r"[0-9]+", template.fill(index)), ""]))
            if self.settings.targets(name):
                self.problems.append(f"{name!r} is in the target_modules of its config, but has no LoRA in the file")

    # Results

    def kernels(self) -> list[str]:
        """The paths of the kernels with a LoRA."""
        return [path for mapping in self.by_mapping() for path in mapping.flax_paths]

    def separate(self, known: LoraConfig | None = None) -> tuple[LoraConfig, dict[str, np.ndarray], dict[str, Any]]:
        """(config of the LoRA, its tensors by name, changed tensors of the base), for a LoRA that stays separate.

        `known`: the `LoraConfig` that the model has already, or None. Raises UserError for what cannot stay separate.
        """
        settings = self.settings
        if settings.use_dora:
            raise UserError(f"the adapter of {self.folder} has use_dora true, which cannot stay separate; {MERGE_HINT}")
        groups = self.by_mapping()
        self._check_separable(groups)
        known_rank = None if known is None else known.rank
        layers = {
            mapping: {
                index: layer_lora(mapping, *lora.pair, settings.module_scale(lora.name), known_rank)
                for index, lora in loras.items()
            }
            for mapping, loras in groups.items()
        }
        rank, alpha = self._common_rank_and_alpha([x for loras in layers.values() for x in loras.values()])
        if known is not None and (rank != known.rank or not np.isclose(alpha, known.alpha)):
            raise UserError(
                f"the adapter of {self.folder} has rank {rank} and alpha {alpha:g}, the model's config {known.rank} "
                f"and {known.alpha:g}; they must be equal"
            )
        arrays = {}
        for mapping, loras in layers.items():
            template = KeyTemplate.parse(mapping.torch_keys[0])
            for index, pair in stack_loras(loras, self.layer_indices(mapping), rank, alpha / rank).items():
                keys = lora_pair_keys(template.fill(index), self.source.checkpoint_format.module_names)
                arrays |= dict(zip(keys, pair))
        return LoraConfig(rank, alpha, settings.dropout), arrays, self.replaced | self._biases()

    def _common_rank_and_alpha(self, layers: list[LayerLora]) -> tuple[int, float]:
        """The largest rank, and the alpha of the most frequent scale."""
        settings, rank = self.settings, max(lora.rank for lora in layers)
        scale = Counter(lora.scale for lora in layers).most_common(1)[0][0]
        is_default = rank == settings.rank and not settings.use_rslora and scale == settings.alpha / rank
        return rank, settings.alpha if is_default else scale * rank

    def _check_separable(self, groups: dict[WeightMapping, dict[tuple, ModuleLora]]) -> None:
        for mapping, loras in groups.items():
            base = self.source.tensors[KeyTemplate.parse(mapping.torch_keys[0]).fill(next(iter(loras)))]
            is_kernel = all(path.rpartition("/")[2] == "kernel" for path in mapping.flax_paths)
            if mapping.tied_keys or not is_kernel or base.ndim != 2:
                name = mapping.torch_keys[0]
                raise UserError(f"the LoRA of {name!r} in {self.folder} cannot stay separate; {MERGE_HINT}")

    def _biases(self) -> dict[str, LazyArray]:
        """The base's biases plus those of lora_B, times the scale."""
        changed = {}
        for key, lora in self.modules.items():
            if "B_bias" not in lora.tensors:
                continue
            name = key.removesuffix("weight") + "bias"
            if name not in self.source.tensors:
                raise UserError(f"the adapter of {self.folder} has lora_bias, but {lora.name!r} has no bias to add to")
            change = lora.tensors["B_bias"].astype(np.float32) * self.settings.module_scale(lora.name)
            base = self.replaced.get(name, self.source.tensors[name])
            changed[name] = LazyArray(base, lambda bias, change=change: bias.astype(np.float32) + change)
        return changed

    def merged(self) -> dict[str, Any]:
        """The changed tensors of the base, with every LoRA merged into its weight in float32."""
        changed = dict(self.replaced)
        mappings = {lora.name: mapping for mapping, loras in self.by_mapping().items() for lora in loras.values()}
        for key, lora in self.modules.items():
            base = self.replaced.get(key, self._base(key))
            compute = merge_function(lora, self.settings, is_conv1d(mappings[lora.name]), tuple(base.shape))
            if mappings[lora.name].tied_keys:
                self._keep_tied(changed, mappings[lora.name], key)
            changed[key] = LazyArray(base, compute)
        return changed | self._biases()

    def _keep_tied(self, changed: dict[str, Any], mapping: WeightMapping, key: str) -> None:
        """The other names of a tied tensor keep the base's values, so that the plan finds that they differ."""
        for name in {*mapping.torch_keys, *mapping.tied_keys} - {key}:
            changed.setdefault(name, self._base(name))


def merge_function(
    lora: ModuleLora, settings: AdapterSettings, transposed: bool, shape: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray]:
    """The function from a base weight to W + scale B A, with DoRA magnitude * W' / |W'| by rows.

    `transposed`: W is (in, out), as in embeddings and Conv1D. Raises UserError for shapes that do not fit.
    """
    a, b = (x.astype(np.float32) for x in lora.pair)
    scale, is_embedding = settings.module_scale(lora.name), "embedding_A" in lora.tensors
    if a.ndim == 4:  # convolution: A (rank, in, H, W), B (out, rank, 1, 1)
        delta = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(b.shape[0], *a.shape[1:])
    else:
        delta = b @ a
    transposed = transposed or is_embedding
    delta = delta.T if transposed else delta
    if delta.shape != shape:
        raise UserError(f"the LoRA of {lora.name!r} is {delta.shape}, its weight {shape}; they must be equal")
    magnitude = lora.tensors.get("magnitude_vector")
    if magnitude is not None and (is_embedding or delta.ndim != 2):
        raise UserError(f"{lora.name!r} has DoRA on an embedding or convolution; only that of linear layers is merged")

    def compute(weight: np.ndarray) -> np.ndarray:
        total = weight.astype(np.float32) + scale * delta
        if magnitude is None:
            return total
        axis = 0 if transposed else 1
        factor = magnitude.astype(np.float32).reshape(-1) / np.linalg.norm(total, axis=axis)
        return total * np.expand_dims(factor, axis)

    return compute


def open_adapter_weights(folder: Path) -> CheckpointTensors:
    """The tensors of a PEFT folder: adapter_model.safetensors or .bin, with LLaVA's non_lora_trainables.bin.

    Raises UserError where there are none.
    """
    files = [folder / f"{ADAPTER_STEM}{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds no adapter weights; it needs {files[0].name} or {files[1].name}")
    tensors = open_weights(file)
    if (folder / NON_LORA_FILE).is_file():
        tensors = tensors | open_weights(folder / NON_LORA_FILE)
    return tensors


def open_non_lora(folder: Path) -> CheckpointTensors:
    """The tensors of LLaVA's non_lora_trainables.bin under the model's names. Raises UserError without the file."""
    return open_weights(folder / NON_LORA_FILE)
