# SPDX-License-Identifier: Apache-2.0
"""Run a model and its transformers class on the same inputs in float32 and compare their outputs module by module.

Compared are modules with a weight (projections, norms, embeddings), over all layers. The weight map says which Flax
module corresponds to which torch module.
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

RELATIVE_TOLERANCE = 1e-3  # relative to a module's largest value; float32 rounding is about 1e-6
# Formats whose class in transformers 5.23 gives a part a boolean mask, which eager attention adds as a number.
BOOLEAN_MASKS = ("grounding-dino",)
WEIGHT_SUFFIXES = ("/kernel", "/scale", "/table")  # of the paths of the parameters that identify a module


@dataclasses.dataclass(frozen=True)
class ModuleDiff:
    """Largest difference of one module's outputs over all layers, and the largest value of the torch outputs."""

    name: str
    num_layers: int
    max_abs_diff: float
    max_abs_value: float
    worst_module: str  # torch name of the module with the largest difference

    @property
    def relative_diff(self) -> float:
        return self.max_abs_diff / self.max_abs_value if self.max_abs_value else self.max_abs_diff


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """The modules in execution order, then the model's results; and the modules that could not be compared."""

    module_diffs: tuple[ModuleDiff, ...]
    not_compared: tuple[str, ...]

    @property
    def all_close(self) -> bool:
        return all(stage.relative_diff <= RELATIVE_TOLERANCE for stage in self.module_diffs)

    def __str__(self) -> str:
        wide = max(len(stage.name) for stage in self.module_diffs)
        lines = [f"{'stage':{wide}}  layers  largest difference  largest number"]
        for s in self.module_diffs:
            mark = "" if s.relative_diff <= RELATIVE_TOLERANCE else f"  <- differs most in {s.worst_module}"
            lines.append(f"{s.name:{wide}}  {s.num_layers:6}  {s.max_abs_diff:18.2e}  {s.max_abs_value:14.3g}{mark}")
        if self.not_compared:
            lines.append(f"not compared: {', '.join(group_numbered_names(self.not_compared))}")
        return "\n".join(lines)


def verify(config: Any, params: Params, folder: str | Path) -> VerificationReport:
    """Compare a model in memory with a PyTorch folder that transformers runs, as a whole or in parts (`HF_PARTS`).

    Raises UserError where transformers cannot load or run it.
    """
    import jax

    model_config, folder = detect.model_config_of(config), Path(folder)
    checkpoint_format = detect.format_of_config(model_config)
    if hf_parts := HF_PARTS.get(checkpoint_format.name, lambda model_config: [])(model_config):
        tensors = detect.open_checkpoint(folder, checkpoint_format.name).tensors
        return _verify_parts(hf_parts, trees.flatten(params), tensors)
    if (folder / loras.ADAPTER_FOLDER).is_dir():
        raise UserError(f"transformers would leave out the LoRA of {folder}; convert with --merge-lora to verify")
    torch_model = _load_transformers_model(checkpoint_format, model_config, folder)
    run = COMPARISON_RUNS[checkpoint_format.name](model_config, np.random.default_rng(0))
    params = trees.cast(jax.tree.map(np.asarray, params), "float32")

    def forward(params, *inputs):
        return run.module.apply(
            {"params": params}, *inputs, method=run.method, capture_intermediates=True, mutable="intermediates"
        )

    flax_results, state = jax.jit(forward)(params, *run.flax_inputs)
    calls = _flax_outputs_by_path(state["intermediates"])
    results, torch_outputs = _run_with_hooks(torch_model, run.torch_inputs)
    weight_map, abstract_params = detect.weight_map_and_abstract_params(checkpoint_format, model_config)
    compared_map = [
        mapping for mapping in weight_map if mapping.flax_paths and mapping.flax_paths[0].endswith(WEIGHT_SUFFIXES)
    ]
    layers = {p: leaf.shape for p, leaf in trees.flatten(abstract_params).items()}
    calls = {path: calls.get(path.rpartition("/")[0], ()) for path in layers}
    module_diffs, not_compared = _compare_modules(
        compared_map,
        layers,
        calls,
        torch_outputs,
        _match_weight_keys(torch_model, torch_outputs, checkpoint_format, folder),
    )
    for name, flax_result in flax_results.items():
        module_diffs.append(_module_diff(name, [(name, np.asarray(flax_result), results[name])]))
    return VerificationReport(tuple(module_diffs), tuple(not_compared))


def _verify_parts(hf_parts: list[HFPart], flat_params: Mapping, tensors: Mapping) -> VerificationReport:
    """Compare each part as a model of its own, which transformers loads from a temporary folder."""
    module_diffs, not_compared, used_keys = [], [], set()
    for part in hf_parts:
        checkpoint_format = detect.format_of_config(part.config)
        weight_map, abstract_params = detect.weight_map_and_abstract_params(checkpoint_format, part.config)
        shapes = trees.flatten(abstract_params)
        # Parameters that only the part's model has are random (needed to run a vision tower inside a BLIP-2).
        rng = np.random.default_rng(0)
        random = {p: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for p, x in shapes.items()}
        state = state_dict_from_params(weight_map, trees.unflatten(random))
        hf_tensors, keys = part.to_hf_tensors(tensors, state)
        part_params = part.select_params(flat_params, shapes)
        if not part.compared_prefix and (
            missing := sorted(state.keys() - hf_tensors.keys()) or sorted(shapes.keys() - part_params.keys())
        ):
            raise UserError(f"the part {part.name!r} lacks {len(missing)} weights, such as {missing[0]!r}")
        state |= {name: array.astype(np.float32) for name, array in hf_tensors.items()}
        used_keys |= keys
        with tempfile.TemporaryDirectory() as folder:
            specs = {name: TensorSpec.from_array(array) for name, array in state.items()}
            parts = ((name, (), array) for name, array in state.items())
            write_safetensors(Path(folder), "model", specs, parts)
            (Path(folder) / "config.json").write_text(json.dumps(checkpoint_format.config_to_hf(part.config)))
            report = verify(part.config, trees.unflatten(random | part_params), folder)
        compared = [stage for stage in report.module_diffs if stage.name.startswith(part.compared_prefix)]
        module_diffs += [dataclasses.replace(stage, name=f"{part.name}: {stage.name}") for stage in compared]
        not_compared += [name for name in report.not_compared if name.startswith(part.compared_prefix)]
    biases = {re.sub(r"qkv\.bias$", "q_bias", name) for name in used_keys}
    biases |= {name.replace("q_bias", "v_bias") for name in biases}
    biases |= {re.sub(r"attn\.(query|key|value)\.", "attn.qkv.", name) for name in used_keys}
    biases |= {re.sub(r"\.(query|key|value)\.(weight|bias)$", r".in_proj_\2", name) for name in used_keys}
    unused = {re.sub(r"\.(weight|bias)$", "", name) for name in tensors if name not in used_keys | biases}
    return VerificationReport(tuple(module_diffs), (*not_compared, *sorted(unused)))


def _load_transformers_model(checkpoint_format: CheckpointFormat, model_config: Any, folder: Path):
    """The transformers model in float32. Raises UserError without a class for it or with missing weights."""
    architecture = (checkpoint_format.config_to_hf(model_config).get("architectures") or [""])[0]
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--verify runs the torch model and needs {error.name}; install lionjax[torch]") from error
    model_class = getattr(transformers, architecture, None)
    if checkpoint_format.name not in COMPARISON_RUNS or model_class is None:
        known = ", ".join(sorted(COMPARISON_RUNS.keys() | HF_PARTS.keys()))
        raise UserError(f"transformers has no class to run a {checkpoint_format.name}; --verify works with {known}")
    transformers.logging.set_verbosity_error()
    load_args = {"dtype": torch.float32, "output_loading_info": True}
    if checkpoint_format.name not in BOOLEAN_MASKS:
        load_args["attn_implementation"] = "eager"
    try:
        model, loading_info = model_class.from_pretrained(folder, **load_args)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights for transformers, such as {missing[0]!r}")
    return model.eval()


def _flax_outputs_by_path(tree: Mapping, path: str = "") -> dict[str, tuple]:
    """{module path: its outputs, one per call} of Flax's captured intermediates."""
    outputs = {}
    for name, value in tree.items():
        if name == "__call__":
            outputs[path.rstrip("/")] = value
        else:
            outputs |= _flax_outputs_by_path(value, f"{path}{name}/")
    return outputs


def _run_with_hooks(model, torch_inputs: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, list[np.ndarray]]]:
    """(the torch model's results, {module name: its outputs}) for modules with a weight, in order of the first call."""
    import torch

    torch_outputs: dict[str, list[np.ndarray]] = {}

    def make_hook(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            torch_outputs.setdefault(name, []).append(output.numpy())

        return hook

    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            module.register_forward_hook(make_hook(name))
    with torch.no_grad():
        results = model(**{name: torch.from_numpy(value) for name, value in torch_inputs.items()})
    return {name: value.numpy() for name, value in results.items() if hasattr(value, "numpy")}, torch_outputs


def _match_weight_keys(
    model, torch_outputs: Mapping, checkpoint_format: CheckpointFormat, folder: Path
) -> dict[str, str]:
    """{torch module: the checkpoint's name of its weight}: by name, or by values where transformers renames it."""
    tensors = detect.open_checkpoint(folder).tensors  # under the names of the weight map
    modules, names, matched = dict(model.named_modules()), {}, set()
    for module in torch_outputs:
        candidates = [
            f"{front}{module}.weight"
            for front in ("", checkpoint_format.base_model_prefix, checkpoint_format.inner_prefix)
        ]
        names[module] = next((name for name in candidates if name in tensors), "")
        matched.add(names[module])
    unmatched = {name: array for name, array in tensors.items() if name not in matched}
    for module in (module for module, name in names.items() if not name):
        weight = modules[module].weight.detach().numpy()
        matches = [n for n, array in unmatched.items() if array.shape == weight.shape and _same_values(array, weight)]
        if matches:
            names[module] = max(matches, key=lambda n: difflib.SequenceMatcher(None, n, module).ratio())
            del unmatched[names[module]]
    return {module: name for module, name in names.items() if name}


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1)[:4096].astype(np.float32), b.reshape(-1)[:4096])


def _compare_modules(
    weight_map, shapes: Mapping, flax_outputs: Mapping, torch_outputs: Mapping, weight_keys: Mapping
) -> tuple[list, list]:
    """(differences of the modules that both models have, torch modules that could not be compared)."""
    pairs_by_name: dict[str, list] = {}
    not_compared = []
    for module, module_outputs in torch_outputs.items():
        matched = (
            (mapping, KeyTemplate.parse(mapping.torch_keys[0]).match(weight_keys.get(module, "")))
            for mapping in weight_map
        )
        mapping, index = next((m for m in matched if m[1] is not None), (None, ()))
        pairs = [] if mapping is None else _output_pairs(module, mapping, index, shapes, flax_outputs, module_outputs)
        if pairs:
            pairs_by_name.setdefault(mapping.torch_keys[0].removesuffix(".weight"), []).extend(pairs)
        else:
            not_compared.append(module)
    return [_module_diff(name, pairs) for name, pairs in pairs_by_name.items()], not_compared


def _output_pairs(
    module: str, mapping: WeightMapping, index, shapes: Mapping, flax_outputs: Mapping, torch_outputs: list
) -> list[tuple]:
    """(module, Flax output, torch output) per call; [] where the outputs are not stacked over layers as the weights."""
    pairs, depth = [], len(index)
    for number, torch_output in enumerate(torch_outputs):
        parts = []
        for path in mapping.flax_paths:
            flax_output = np.asarray(flax_outputs[path][number]) if number < len(flax_outputs[path]) else np.zeros(0)
            if flax_output.ndim <= depth or flax_output.shape[:depth] != shapes[path][:depth]:
                return pairs
            part = flax_output[index]
            # T5's relative position bias has the heads first in Flax, last in torch.
            parts.append(np.moveaxis(part, -3, -1) if path.endswith("relative/table") else part)
        pairs += _align_outputs(
            module, parts, np.moveaxis(torch_output, 1, -1) if mapping.transform is conv else torch_output
        )
    return pairs


def _align_outputs(module: str, parts: list[np.ndarray], torch_output: np.ndarray) -> list[tuple]:
    """Both outputs in one shape; [] where their layouts differ."""
    width = torch_output.shape[-1] // len(parts)
    flat = []
    for part in parts:
        tails = [int(np.prod(part.shape[k:])) for k in range(part.ndim)]
        if part.size * len(parts) != torch_output.size or width not in tails:
            return []
        flat.append(part.reshape(-1, width))
    flax_output = np.concatenate(flat, axis=-1)
    return [(module, flax_output, torch_output.reshape(flax_output.shape))]


def _module_diff(name: str, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> ModuleDiff:
    diffs = [(float(np.abs(flax_output - torch_output).max()), module) for module, flax_output, torch_output in pairs]
    diffs = [(np.inf if np.isnan(number) else number, module) for number, module in diffs]
    difference, worst = max(diffs)
    largest = max(float(np.abs(torch_output).max()) for _, _, torch_output in pairs)
    return ModuleDiff(name, len({module for module, _, _ in pairs}), difference, largest, worst)
