# SPDX-License-Identifier: Apache-2.0
"""The same inputs through our model and through transformers' class of it, compared stage by stage.

A stage is a module with a weight, such as a projection or a norm, in all layers together. Which of ours is which of
theirs the weight table says, so nothing here knows how a model computes. Both run in float32.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.formats import detect
from lionjax.convert.formats import peft as loras
from lionjax.convert.formats.checkpoint_format import CheckpointFormat
from lionjax.convert.io.safetensors_writer import write_safetensors
from lionjax.convert.mapping.apply import state_dict_from_params
from lionjax.convert.mapping.plan import TensorSpec, group_numbered_names
from lionjax.convert.verify.hf_parts import HF_PARTS, HFPart
from lionjax.convert.verify.inputs import COMPARISON_RUNS
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import KeyTemplate, WeightMapping, conv

RELATIVE_TOLERANCE = 1e-3  # of the largest number of a stage; float32 alone leaves a thousandth of that
WEIGHT_SUFFIXES = ("/kernel", "/scale", "/table")  # ends of the paths of what a module multiplies with


@dataclasses.dataclass(frozen=True)
class ModuleDiff:
    """How far the two are apart in one module of all layers, `largest` being the largest number there."""

    name: str
    num_layers: int
    max_abs_diff: float
    max_abs_value: float
    worst_module: str  # the module in which the difference is largest

    @property
    def relative_diff(self) -> float:
        return self.max_abs_diff / self.max_abs_value if self.max_abs_value else self.max_abs_diff


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """All stages in the order in which they run, then the results; and which modules could not be compared."""

    module_diffs: tuple[ModuleDiff, ...]
    not_compared: tuple[str, ...]

    @property
    def all_close(self) -> bool:
        return all(stage.relative_diff <= RELATIVE_TOLERANCE for stage in self.module_diffs)

    def __str__(self) -> str:
        wide = max(len(stage.name) for stage in self.module_diffs)
        lines = [f"{'stage':{wide}}  layers  largest difference  largest number"]
        for s in self.module_diffs:
            mark = "" if s.relative_diff <= RELATIVE_TOLERANCE else f"  <- they part in {s.worst_module}"
            lines.append(f"{s.name:{wide}}  {s.num_layers:6}  {s.max_abs_diff:18.2e}  {s.max_abs_value:14.3g}{mark}")
        if self.not_compared:
            lines.append(f"not compared: {', '.join(group_numbered_names(self.not_compared))}")
        return "\n".join(lines)


def verify(config: Any, params: Params, folder: str | Path) -> VerificationReport:
    """Compare parameters in memory with a folder that transformers loads, or whose parts it can run by themselves.

    Raises UserError where it cannot.
    """
    import jax

    system, folder = detect.model_config_of(config), Path(folder)
    kind = detect.format_of_config(system)
    if peers := HF_PARTS.get(kind.name, lambda system: [])(system):
        tensors = detect.open_checkpoint(folder, kind.name).tensors
        return _verify_parts(peers, trees.flatten(params), tensors)
    if (folder / loras.ADAPTER_FOLDER).is_dir():
        raise UserError(f"transformers would leave out the LoRA of {folder}; verify a merged model")
    theirs = _load_transformers_model(kind, system, folder)
    run = COMPARISON_RUNS[kind.name](system, np.random.default_rng(0))
    params = trees.cast(jax.tree.map(np.asarray, params), "float32")

    def forward(params, *inputs):
        return run.module.apply(
            {"params": params}, *inputs, method=run.method, capture_intermediates=True, mutable="intermediates"
        )

    made, seen = jax.jit(forward)(params, *run.flax_inputs)
    calls = _flax_outputs_by_path(seen["intermediates"])
    results, heard = _run_with_hooks(theirs, run.torch_inputs)
    table, model = detect.weight_map_and_abstract_params(kind, system)
    rows = [row for row in table if row.flax_paths and row.flax_paths[0].endswith(WEIGHT_SUFFIXES)]
    layers = {p: leaf.shape for p, leaf in trees.flatten(model).items()}
    calls = {path: calls.get(path.rpartition("/")[0], ()) for path in layers}
    stages, left = _compare_modules(rows, layers, calls, heard, _match_weight_keys(theirs, heard, kind, folder))
    for name, mine in made.items():
        stages.append(_module_diff(name, [(name, np.asarray(mine), results[name])]))
    return VerificationReport(tuple(stages), tuple(left))


def _verify_parts(hf_parts: list[HFPart], flat_params: Mapping, tensors: Mapping) -> VerificationReport:
    """Each part as a model by itself, which transformers loads from a folder that is made of the file's tensors."""
    stages, left, used = [], [], set()
    for peer in hf_parts:
        kind = detect.format_of_config(peer.config)
        rows, model = detect.weight_map_and_abstract_params(kind, peer.config)
        shapes = trees.flatten(model)
        # What the system does not have (all of it, but for a tower alone) is random.
        rng = np.random.default_rng(0)
        random = {p: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for p, x in shapes.items()}
        state = state_dict_from_params(rows, trees.unflatten(random))
        found, taken = peer.to_hf_tensors(tensors, state)
        ours = peer.select_params(flat_params, shapes)
        if not peer.compared_prefix and (
            missing := sorted(state.keys() - found.keys()) or sorted(shapes.keys() - ours.keys())
        ):
            raise UserError(f"the part {peer.name!r} lacks {len(missing)} weights, such as {missing[0]!r}")
        state |= {name: array.astype(np.float32) for name, array in found.items()}
        used |= taken
        with tempfile.TemporaryDirectory() as folder:
            forms = {name: TensorSpec.from_array(array) for name, array in state.items()}
            parts = ((name, (), array) for name, array in state.items())
            write_safetensors(Path(folder), "model", forms, parts)
            (Path(folder) / "config.json").write_text(json.dumps(kind.config_to_hf(peer.config)))
            seen = verify(peer.config, trees.unflatten(random | ours), folder)
        kept = [stage for stage in seen.module_diffs if stage.name.startswith(peer.compared_prefix)]
        stages += [dataclasses.replace(stage, name=f"{peer.name}: {stage.name}") for stage in kept]
        left += [name for name in seen.not_compared if name.startswith(peer.compared_prefix)]
    biases = {re.sub(r"qkv\.bias$", "q_bias", name) for name in used}
    biases |= {name.replace("q_bias", "v_bias") for name in biases}
    biases |= {re.sub(r"attn\.(query|key|value)\.", "attn.qkv.", name) for name in used}
    rest = {re.sub(r"\.(weight|bias)$", "", name) for name in tensors if name not in used | biases}
    return VerificationReport(tuple(stages), (*left, *sorted(rest)))


def _load_transformers_model(checkpoint_format: CheckpointFormat, model_config: Any, folder: Path):
    """Their model in float32. Raises UserError where there is no class or something is missing for it."""
    architecture = (checkpoint_format.config_to_hf(model_config).get("architectures") or [""])[0]
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"verifying runs the original beside ours and needs {error.name}") from error
    known = getattr(transformers, architecture, None)
    if checkpoint_format.name not in COMPARISON_RUNS or known is None:
        raise UserError(f"transformers has no class to run a {checkpoint_format.name} of ours beside it")
    transformers.logging.set_verbosity_error()
    loaded = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    try:
        model, told = known.from_pretrained(folder, **loaded)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights for transformers, such as {missing[0]!r}")
    return model.eval()


def _flax_outputs_by_path(tree: Mapping, path: str = "") -> dict[str, tuple]:
    """What each of our modules gave, by its path, one entry for each call."""
    found = {}
    for name, value in tree.items():
        if name == "__call__":
            found[path.rstrip("/")] = value
        else:
            found |= _flax_outputs_by_path(value, f"{path}{name}/")
    return found


def _run_with_hooks(model, torch_inputs: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, list[np.ndarray]]]:
    """Their results, and what each module with a weight of its own gave, in the order of the first call."""
    import torch

    heard: dict[str, list[np.ndarray]] = {}

    def listener(name):
        def hear(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            heard.setdefault(name, []).append(output.numpy())

        return hear

    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            module.register_forward_hook(listener(name))
    with torch.no_grad():
        results = model(**{name: torch.from_numpy(value) for name, value in torch_inputs.items()})
    return {name: value.numpy() for name, value in results.items() if hasattr(value, "numpy")}, heard


def _match_weight_keys(
    model, torch_outputs: Mapping, checkpoint_format: CheckpointFormat, folder: Path
) -> dict[str, str]:
    """The name in the file of each module's weight: its own, or by its numbers where their code renames it."""
    tensors = detect.open_checkpoint(folder).tensors  # spelled as in the rows
    modules, names, taken = dict(model.named_modules()), {}, set()
    for module in torch_outputs:
        own = [
            f"{front}{module}.weight"
            for front in ("", checkpoint_format.base_model_prefix, checkpoint_format.inner_prefix)
        ]
        names[module] = next((name for name in own if name in tensors), "")
        taken.add(names[module])
    rest = {name: array for name, array in tensors.items() if name not in taken}
    for module in (module for module, name in names.items() if not name):
        weight = modules[module].weight.detach().numpy()
        alike = [n for n, array in rest.items() if array.shape == weight.shape and _same_values(array, weight)]
        if alike:
            names[module] = max(alike, key=lambda n: difflib.SequenceMatcher(None, n, module).ratio())
            del rest[names[module]]
    return {module: name for module, name in names.items() if name}


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1)[:4096].astype(np.float32), b.reshape(-1)[:4096])


def _compare_modules(
    weight_map, shapes: Mapping, flax_outputs: Mapping, torch_outputs: Mapping, weight_keys: Mapping
) -> tuple[list, list]:
    """Every row whose modules both sides have, and the modules that no row could compare."""
    found: dict[str, list] = {}
    left = []
    for module, theirs in torch_outputs.items():
        matched = ((row, KeyTemplate.parse(row.torch_keys[0]).match(weight_keys.get(module, ""))) for row in weight_map)
        row, index = next((m for m in matched if m[1] is not None), (None, ()))
        pairs = [] if row is None else _output_pairs(module, row, index, shapes, flax_outputs, theirs)
        if pairs:
            found.setdefault(row.torch_keys[0].removesuffix(".weight"), []).extend(pairs)
        else:
            left.append(module)
    return [_module_diff(name, pairs) for name, pairs in found.items()], left


def _output_pairs(
    module: str, mapping: WeightMapping, index, shapes: Mapping, flax_outputs: Mapping, torch_outputs: list
) -> list[tuple]:
    """Both sides of one module, call by call; nothing where ours does not stack its layers as the weights are."""
    pairs, depth = [], len(index)
    for number, their in enumerate(torch_outputs):
        parts = []
        for path in mapping.flax_paths:
            made = np.asarray(flax_outputs[path][number]) if number < len(flax_outputs[path]) else np.zeros(0)
            if made.ndim <= depth or made.shape[:depth] != shapes[path][:depth]:
                return pairs
            part = made[index]
            # T5's positions: ours have the heads in front, theirs behind.
            parts.append(np.moveaxis(part, -3, -1) if path.endswith("relative/table") else part)
        pairs += _align_outputs(module, parts, np.moveaxis(their, 1, -1) if mapping.transform is conv else their)
    return pairs


def _align_outputs(module: str, parts: list[np.ndarray], torch_output: np.ndarray) -> list[tuple]:
    """Both sides in one shape; nothing where they lie otherwise in memory."""
    width = torch_output.shape[-1] // len(parts)
    flat = []
    for part in parts:
        tails = [int(np.prod(part.shape[k:])) for k in range(part.ndim)]
        if part.size * len(parts) != torch_output.size or width not in tails:
            return []
        flat.append(part.reshape(-1, width))
    mine = np.concatenate(flat, axis=-1)
    return [(module, mine, torch_output.reshape(mine.shape))]


def _module_diff(name: str, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> ModuleDiff:
    apart = [(float(np.abs(mine - theirs).max()), module) for module, mine, theirs in pairs]
    apart = [(np.inf if np.isnan(number) else number, module) for number, module in apart]
    difference, worst = max(apart)
    largest = max(float(np.abs(theirs).max()) for _, _, theirs in pairs)
    return ModuleDiff(name, len({module for module, _, _ in pairs}), difference, largest, worst)
