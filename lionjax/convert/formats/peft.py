# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685) in PEFT's file format: config, weight map, merging into kernels, adapter_config.json.

A LoRA is in the subfolder `adapter`, as `adapter_config.json` and `adapter_model.safetensors`. Its weight map is
derived from the mappings of the kernels; the names are those of the modules in transformers' classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lionjax.convert.formats.peft_config import ADAPTER_CONFIG_FILE, SUPPORTED_OPTIONS
from lionjax.convert.io.key_names import PEFT_PREFIX, is_lora_key
from lionjax.convert.mapping.apply import LazyTensor
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Transform, WeightMapping

__all__ = ["ADAPTER_CONFIG_FILE", "SUPPORTED_OPTIONS", "is_lora_key"]

ADAPTER_FOLDER, ADAPTER_STEM = "adapter", "adapter_model"
NamePatterns = Iterable[tuple[str, str]]  # (regular expression, replacement) of the beginning of a tensor's name
PART_FIELDS = {"latents": "resampler"}  # first name of a parameter's path -> field of the model's config, if another


def find_lora_config(config: Any) -> Any:
    """The `LoraConfig` of a model config and its parts, None without LoRA. Raises UserError for different ones.

    The parts may have different target_modules; those of the result are of any one part.
    """
    loras = {getattr(config, name) for name in _config_fields(config) if name == "lora"}
    loras |= {find_lora_config(getattr(config, name)) for name in _config_fields(config) if name != "lora"}
    loras = {lora for lora in loras if lora is not None and lora.rank}
    if len(settings := {(lora.rank, lora.alpha, lora.dropout) for lora in loras}) > 1:
        raise UserError(
            f"the parts of this model have different LoRAs (rank, alpha, dropout): {sorted(settings)}; a PEFT adapter "
            "holds one, so export with --merge-lora"
        )
    return min(loras, key=lambda lora: lora.target_modules, default=None)


def without_lora(config: Any) -> Any:
    """The config without LoRA in all its parts."""
    changes = {}
    for name in _config_fields(config):
        part = getattr(config, name)
        changes[name] = type(part)() if name == "lora" else without_lora(part)
    return dataclasses.replace(config, **changes)


def add_lora(config: Any, lora: Any, kernels: Iterable[str], all_kernels: Iterable[str]) -> Any:
    """The config with `lora` on the kernels at these paths; each part gets the target_modules of its own kernels.

    `all_kernels`: the paths of all kernels. Raises UserError for a part whose config has no LoRA.
    """
    fields = _config_fields(config)

    def part_of(path: str) -> tuple[str, str]:
        head, _, rest = path.partition("/")
        name = PART_FIELDS.get(head, head)
        return (name, rest) if name in fields and name != "lora" else ("lora", path)

    changes, every = {}, [part_of(path) for path in all_kernels]
    parts = [part_of(path) for path in kernels]
    for name in dict.fromkeys(name for name, _ in parts):
        own, part_kernels = ([path for part, path in group if part == name] for group in (parts, every))
        if name != "lora":
            changes[name] = add_lora(getattr(config, name), lora, own, part_kernels)
        elif name in fields:
            changes[name] = dataclasses.replace(lora, target_modules=_target_paths(own, part_kernels))
        else:
            raise UserError(f"a {type(config).__name__} has no separate LoRA ({own[0]!r}); merge it with --merge-lora")
    return dataclasses.replace(config, **changes)


def _target_paths(kernels: list[str], all_kernels: list[str]) -> tuple[str, ...]:
    """Names of the layers of these kernels; the whole path where another layer has the same name and no LoRA."""
    layers, every = ({path.rpartition("/")[0] for path in paths} for paths in (kernels, all_kernels))
    others = {path.rpartition("/")[2] for path in every - layers}
    names = {path if path.rpartition("/")[2] in others else path.rpartition("/")[2] for path in layers}
    return tuple(sorted(names))


def _config_fields(config: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if dataclasses.is_dataclass(getattr(config, name))]


# Weight map


def lora_pair_keys(weight_key: str, module_names: NamePatterns) -> tuple[str, str]:
    """The names of lora_A and lora_B for the weight with this name; `module_names` rename it to the class's module."""
    for pattern, new in module_names:
        weight_key = re.sub(pattern, new, weight_key, count=1)
    module = PEFT_PREFIX + weight_key.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def lora_weight_map(
    weight_map: Iterable[WeightMapping], abstract_params: Params, module_names: NamePatterns = ()
) -> tuple[WeightMapping, ...]:
    """Mappings of all LoRA matrices in abstract parameters, derived from the mappings of their kernels.

    The LoRAs of kernels that are one tensor in torch become one LoRA there, block by block: A has their A one below the
    other, B their B on the diagonal. Raises UserError for a LoRA of a kernel that is no weight of a torch module.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(abstract_params).items()}
    missing = {path.removesuffix("lora_a") + "kernel" for path in shapes if path.endswith("/lora_a")}
    lora_map = []
    for mapping in weight_map:
        kernels = [path for path in mapping.flax_paths if path in missing]
        if not kernels or not mapping.torch_keys[0].endswith(".weight"):
            continue
        missing -= set(kernels)
        keys = lora_pair_keys(mapping.torch_keys[0], module_names)
        layers, depth = [path.removesuffix("kernel") for path in kernels], len(mapping.index_letters)
        a_shapes, b_shapes = ([shapes[layer + name][depth:] for layer in layers] for name in ("lora_a", "lora_b"))
        if len(mapping.flax_paths) > 1:
            present = [mapping.flax_paths.index(path) for path in kernels]
            transform = _fused_transform(mapping, present, a_shapes, b_shapes)
            paths = tuple(layer + name for layer in layers for name in ("lora_a", "lora_b"))
            lora_map.append(WeightMapping(keys, paths, transform))
            continue
        a_transform, b_transform = _a_transform(a_shapes[0]), _b_transform(b_shapes[0])
        if mapping.transform.name.startswith("padded"):  # of an LM head with padded vocabulary
            b_transform = mapping.transform
        lora_map.append(WeightMapping(keys[0], layers[0] + "lora_a", a_transform))
        lora_map.append(WeightMapping(keys[1], layers[0] + "lora_b", b_transform))
    if missing:
        raise UserError(
            f"PEFT cannot hold the LoRA of {min(missing).removesuffix('/kernel')!r}, because its torch weight is no "
            "weight of a module; export with --merge-lora"
        )
    return tuple(lora_map)


def _a_transform(shape: tuple[int, ...]) -> Transform:
    """lora_A (rank, in) to lora_a of `shape` (*in, rank)."""
    return Transform("lora_a", lambda w: w.T.reshape(shape), lambda w: w.reshape(-1, w.shape[-1]).T)


def _b_transform(shape: tuple[int, ...]) -> Transform:
    """lora_B (out, rank) to lora_b of `shape` (rank, *out)."""
    return Transform("lora_b", lambda w: w.T.reshape(shape), lambda w: w.reshape(w.shape[0], -1).T)


def is_conv1d(mapping: WeightMapping) -> bool:
    """Whether the torch weight of a kernel is (in, out), as GPT-2's Conv1D has it."""
    name = mapping.transform.name
    return mapping.flax_paths[0].endswith("kernel") and (name == "same" or name.startswith("(") or "axis 1)" in name)


def _split_outputs(mapping: WeightMapping, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """B (out, rank) of a fused weight to a B (rank, *out) for each of its kernels."""
    return mapping.to_flax(b.T if is_conv1d(mapping) else b)


def _join_outputs(mapping: WeightMapping, parts: Iterable[np.ndarray]) -> np.ndarray:
    (b,) = mapping.to_torch(*parts)
    return b.T if is_conv1d(mapping) else b


def _fused_transform(
    mapping: WeightMapping, present: list[int], a_shapes: list[tuple[int, ...]], b_shapes: list[tuple[int, ...]]
) -> Transform:
    """The LoRA of a fused weight to (lora_a, lora_b) of those of its kernels whose numbers are `present`."""
    rank, count = b_shapes[0][0], len(mapping.flax_paths)

    def to_flax(a, b):
        if a.shape[0] != len(present) * rank:
            raise ValueError(f"its rank is {a.shape[0]} instead of {len(present)} times {rank}")
        leaves = []
        for place, number in enumerate(present):
            rows = slice(place * rank, (place + 1) * rank)
            parts = _split_outputs(mapping, b[:, rows])
            if any(np.any(part != 0) for other, part in enumerate(parts) if other != number):
                raise ValueError(f"block {place} of its rank must be zero outside of part {number}")
            leaves += [a[rows].T.reshape(a_shapes[place]), parts[number]]
        return tuple(leaves)

    def to_torch(*leaves):
        blocks = []
        for number, b in zip(present, leaves[1::2]):
            parts = [b if other == number else np.zeros(b.shape, b.dtype) for other in range(count)]
            blocks.append(_join_outputs(mapping, parts))
        a = np.concatenate([leaf.reshape(-1, rank).T for leaf in leaves[::2]])
        return a, np.concatenate(blocks, axis=1)

    return Transform(f"lora_by_block({mapping.transform.name})", to_flax, to_torch)


# Adapters of any ranks, scales and layers, made alike


@dataclasses.dataclass(frozen=True)
class LayerLora:
    """The LoRA of one torch weight: a pair of A (rank, in) and B (out, rank) for each of its kernels."""

    pairs: tuple[tuple[np.ndarray, np.ndarray], ...]
    scale: float  # of B A x

    @property
    def rank(self) -> int:
        return self.pairs[0][0].shape[0]


def layer_lora(
    mapping: WeightMapping, a: np.ndarray, b: np.ndarray, scale: float, known_rank: int | None = None
) -> LayerLora:
    """The LoRA of a weight with this mapping. One of a fused weight is split into those of its kernels.

    `known_rank`: of each kernel, where the model has a LoRA already.
    """
    count = len(mapping.flax_paths)
    if count == 1:
        return LayerLora(((a, b),), scale)
    rank = a.shape[0] // count
    blocks = [slice(place * rank, (place + 1) * rank) for place in range(count)]
    is_blocked = a.shape[0] == count * rank and (rank == known_rank or (np.any(b) and _is_blocked(mapping, b, blocks)))
    if is_blocked:
        return LayerLora(tuple((a[rows], b[:, rows]) for rows in blocks), scale)
    return LayerLora(tuple((a, _only_part(mapping, b, number)) for number in range(count)), scale)


def _is_blocked(mapping: WeightMapping, b: np.ndarray, blocks: list[slice]) -> bool:
    return all(np.array_equal(_only_part(mapping, b[:, rows], n), b[:, rows]) for n, rows in enumerate(blocks))


def _only_part(mapping: WeightMapping, b: np.ndarray, number: int) -> np.ndarray:
    """B with zeros for all kernels of the fused weight but one."""
    parts = _split_outputs(mapping, b)
    return _join_outputs(mapping, [x if n == number else np.zeros(x.shape, x.dtype) for n, x in enumerate(parts)])


def stack_loras(
    loras: Mapping[tuple, LayerLora], indices: Iterable[tuple], rank: int, scale: float
) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """{index of the layer: A, B} of all layers of one weight, with one rank and one scale.

    Smaller ranks are filled with zeros, other scales multiplied into B, and layers without LoRA are zero. Training
    keeps these zeros, as both factors of their gradients are zero.
    """
    zero = next(iter(loras.values()))
    zero = LayerLora(tuple((np.zeros_like(a), np.zeros_like(b)) for a, b in zero.pairs), scale)
    stacked = {}
    for index in indices:
        lora = loras.get(index, zero)
        pairs = [_with_rank(a, b, rank, lora.scale / scale if scale else 1.0) for a, b in lora.pairs]
        if len(pairs) == 1:
            stacked[index] = pairs[0]
        else:
            a, b = zip(*pairs)
            stacked[index] = (np.concatenate(a), np.concatenate(b, axis=1))
    return stacked


def _with_rank(a: np.ndarray, b: np.ndarray, rank: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    if not np.isclose(factor, 1.0, rtol=1e-9, atol=0):
        b = (b.astype(np.float32) * factor).astype(b.dtype)
    if missing := rank - a.shape[0]:
        a = np.concatenate([a, np.zeros((missing, a.shape[1]), a.dtype)])
        b = np.concatenate([b, np.zeros((b.shape[0], missing), b.dtype)], axis=1)
    return a, b


# Merging


def merge_lora(flat_params: Mapping, lora: Any) -> dict:
    """Parameters by path with W + (alpha / rank) A B for every kernel W with a LoRA, computed lazily layer by layer.

    The sum is computed in float32 and rounded once to the dtype of W.
    """
    merged = {path: leaf for path, leaf in flat_params.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in flat_params:
        if path.endswith("/lora_a"):
            layer, letters = path.removesuffix("lora_a"), ("kernel", "lora_a", "lora_b")
            merged[layer + "kernel"] = _merged_kernel(*(flat_params[layer + x] for x in letters), lora)
    return merged


def _merged_kernel(kernel, lora_a, lora_b, lora: Any) -> LazyTensor:
    def get_layer(index):
        w, a, b = (np.asarray(leaf[(*index, ...)]) for leaf in (kernel, lora_a, lora_b))
        delta = _as_matrix(a, (-1, lora.rank)) @ _as_matrix(b, (lora.rank, -1))
        merged = w.astype(np.float32) + delta.reshape(w.shape) * (lora.alpha / lora.rank)
        return merged.astype(w.dtype)

    return LazyTensor(tuple(kernel.shape), np.dtype(kernel.dtype), get_layer)


def _as_matrix(array, shape) -> np.ndarray:
    return array.astype(np.float32).reshape(shape)


# adapter_config.json


def adapter_config(
    lora: Any, specs: Mapping[str, TensorSpec], architecture: str = "", module_names: NamePatterns = ()
) -> dict:
    """Contents of adapter_config.json; `specs` are those of the tensors of the model and of the adapter.

    Modules whose rank differs, as those of fused weights, are in rank_pattern and alpha_pattern. Raises UserError where
    PEFT's target_modules cannot tell modules with and without LoRA apart.
    """
    suffix = ".lora_A.weight"
    ranks = {
        name.removeprefix(PEFT_PREFIX).removesuffix(suffix): spec.shape[0]
        for name, spec in specs.items()
        if is_lora_key(name) and name.endswith(suffix)
    }
    matrix_keys = [name for name, spec in specs.items() if len(spec.shape) == 2 and not is_lora_key(name)]
    modules = {
        lora_pair_keys(name, module_names)[0].removeprefix(PEFT_PREFIX).removesuffix(suffix) for name in matrix_keys
    }
    targets = _target_modules(set(ranks), modules - set(ranks))
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    other_ranks = {_target_module_pattern(name): rank for name, rank in ranks.items() if rank != lora.rank}
    is_causal = architecture.endswith("ForCausalLM") or architecture == "GPT2LMHeadModel"
    task = "CAUSAL_LM" if is_causal else "SEQ_2_SEQ_LM" if architecture.startswith("T5For") else None
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "rank_pattern": other_ranks,
        "alpha_pattern": {name: alpha * (rank // lora.rank) for name, rank in other_ranks.items()},
        "bias": "none",
        "fan_in_fan_out": architecture.startswith("GPT2"),  # its Conv1D stores (in, out)
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _target_modules(with_lora: set[str], without_lora: set[str]) -> object:
    """PEFT's target_modules: the last names of the modules, or a pattern of full names where others end alike."""
    short_names = {name.rpartition(".")[2] for name in with_lora}
    if not any(name.rpartition(".")[2] in short_names for name in without_lora):
        return sorted(short_names)
    targets = "|".join(sorted({_target_module_pattern(name) for name in with_lora}))
    if ambiguous := {name for name in without_lora if re.fullmatch(targets, name)}:
        raise UserError(
            f"{min(ambiguous)!r} has no LoRA, but PEFT's target_modules would match it; export with --merge-lora"
        )
    return targets


def _target_module_pattern(name: str) -> str:
    parts = name.split(".")
    return r"\.".join("[0-9]+" if part.isdigit() else re.escape(part) for part in parts)
