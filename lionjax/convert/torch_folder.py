# SPDX-License-Identifier: Apache-2.0
"""Weights with the original's names: read into memory, written as a folder, and the table that says how.

The folder is one that transformers opens: safetensors, config.json, a model card; a LoRA in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert import model_card
from lionjax.convert.formats import detect
from lionjax.convert.formats import peft as loras
from lionjax.convert.formats.checkpoint_format import CheckpointFormat, CheckpointSource, read_hf_config
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, atomic_folder, write_safetensors
from lionjax.convert.jax_folder import copy_files, holds_params, open_params
from lionjax.convert.mapping.apply import iter_param_slices, iter_torch_tensors
from lionjax.convert.mapping.plan import ConversionPlan, plan_params, plan_state_dict
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping, copy_bits

TORCH_STEM = "model"  # first word of its weight files


def from_torch(path: str | Path, system: str | None = None) -> tuple[Any, Params]:
    """(config, params) of a checkpoint with the original's names; params are numpy arrays in the checkpoint's dtype.

    `system` names the kind of model where the files do not say it. Raises UserError with all that does not fit.
    """
    source = detect.open_checkpoint(Path(path), system)
    plan = plan_from_torch(source)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.output_specs.items()}
    for leaf, index, part in iter_param_slices(plan, source.tensors, source.tensors.release):
        copy_bits(flat[leaf][(*index, ...)], part)
    return source.config, trees.unflatten(flat)


def to_torch(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | None = None,
    merge_lora: bool = False,
) -> None:
    """Write `params` as a folder with the original's names: safetensors, config.json, a model card.

    `config` is the system's, or the experiment that trained it. `companions`: further files by their names there,
    such as tokenizers. A LoRA goes into a folder `adapter` as PEFT writes it, or into the matrices with `merge_lora`.
    Raises UserError when something does not fit, or stands at `path` already.
    """
    flat = trees.flatten(params)
    if merge_lora:
        config, flat = merge_lora_weights(config, flat)
    kind, plan = plan_to_torch(config, flat)
    parts = iter_torch_tensors(plan, flat)
    write_torch_folder(config, kind, plan, parts, Path(path), shard_bytes, companions or {})


def weight_map_of(path: str | Path, system: str | None = None) -> tuple[WeightMapping, ...]:
    """The rows of a folder or file of weights, in our names or the original's. Nothing is read but what it is."""
    path = Path(path)
    ours = holds_params(path)
    config = open_params(path)[0] if ours else detect.open_checkpoint(path, system).config
    rows, _ = detect.weight_map_and_abstract_params(detect.format_of_config(config), config)
    return rows


def plan_from_torch(source: CheckpointSource) -> ConversionPlan:
    rows, model = detect.weight_map_and_abstract_params(source.checkpoint_format, source.config)
    return plan_params(rows, source.tensors, source.checkpoint_format.ignore_patterns, model)


def plan_to_torch(config: Any, flat_params: Mapping) -> tuple[CheckpointFormat, ConversionPlan]:
    kind = detect.format_of_config(config)
    rows, model = detect.weight_map_and_abstract_params(kind, config)
    return kind, plan_state_dict(rows, flat_params, model)


def merge_lora_weights(config: Any, flat_params: Mapping) -> tuple[Any, Mapping]:
    """Config and parameters without LoRA, which is in the matrices now."""
    system = detect.model_config_of(config)
    if (lora := loras.find_lora_config(system)) is None:
        raise UserError("this model has no LoRA that could be merged")
    plain = loras.with_lora(system, dataclasses.replace(lora, rank=0))
    return replace_model_config(config, plain), loras.merge_lora(flat_params, lora)


def replace_model_config(config: Any, model_config: Any) -> Any:
    """The config, or the whole experiment that it is, with another system's config."""
    return model_config if detect.model_config_of(config) is config else dataclasses.replace(config, model=model_config)


def write_torch_folder(
    config,
    checkpoint_format: CheckpointFormat,
    plan: ConversionPlan,
    parts,
    dst: Path,
    shard_bytes: int,
    companions: Mapping[str, Path],
):
    """The folder for torch's side, with what belongs beside the weights: what came along from there, tokenizers."""
    files: list[str] = []
    with atomic_folder(dst) as folder:
        # A LoRA's rows come last, so its tensors do. Grouping holds one tensor more, so it is only done for a LoRA.
        groups = itertools.groupby(parts, lambda part: loras.is_lora_key(part[0]))
        for detour, group in groups if any(map(loras.is_lora_key, plan.output_specs)) else [(False, parts)]:
            forms = {n: form for n, form in plan.output_specs.items() if loras.is_lora_key(n) == detour}
            where = folder / loras.ADAPTER_FOLDER if detour else folder
            where.mkdir(exist_ok=True)
            if detour:  # PEFT knows one file only
                names = write_safetensors(where, loras.ADAPTER_STEM, forms, group, 2**62)
                files += [f"{loras.ADAPTER_FOLDER}/{name}" for name in names]
            else:
                files += write_safetensors(where, TORCH_STEM, forms, group, shard_bytes)
        copy_files(companions, folder)
        settings = read_hf_config(folder / "config.json")
        dtype = max(
            (form.dtype for form in plan.output_specs.values()), key=lambda d: (d.itemsize <= 4, d.itemsize)
        ).name
        known = checkpoint_format.config_to_hf(detect.model_config_of(config)) | {"dtype": dtype}
        settings = _deep_update(settings, known)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        _write_adapter_config(config, plan, settings, folder / loras.ADAPTER_FOLDER)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        files += model_card.write_processor_configs(config, folder)
        (folder / "README.md").write_text(
            model_card.render_model_card(checkpoint_format.name, config, settings, plan.output_specs)
        )
    return (*files, "config.json", CONFIG_FILE, "README.md")


def _write_adapter_config(config: Any, plan: ConversionPlan, settings: dict, folder: Path) -> None:
    """What PEFT wants to know of the LoRA whose tensors lie in `folder`; nothing where there is none."""
    detours = [name for name in plan.output_specs if loras.is_lora_key(name)]
    if detours:
        lora = loras.find_lora_config(detect.model_config_of(config))
        matrices = {n for n, form in plan.output_specs.items() if len(form.shape) == 2 and n not in detours}
        architecture = (settings.get("architectures") or [""])[0]
        said = loras.adapter_config(lora, detours, matrices, architecture)
        (folder / loras.ADAPTER_CONFIG_FILE).write_text(json.dumps(said, indent=2) + "\n")


def _deep_update(old: dict, new: dict) -> dict:
    """Settings with new ones over them, part by part."""
    parts = {key for key in old.keys() & new.keys() if isinstance(old[key], dict) and isinstance(new[key], dict)}
    return old | new | {key: _deep_update(old[key], new[key]) for key in parts}
