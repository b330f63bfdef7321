# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints: read into memory (`from_torch`) and write (`to_torch`) Hugging Face folders.

A written folder holds safetensors, config.json and a model card, and opens with transformers' `from_pretrained`; a LoRA
is in the subfolder `adapter` (PEFT).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert import model_card
from lionjax.convert.companions import copy_files, find_companion_files, resolve_companions
from lionjax.convert.formats import detect
from lionjax.convert.formats import peft as loras
from lionjax.convert.formats.checkpoint_format import CheckpointFormat, CheckpointSource, read_hf_config
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.formats.hf_config import merge_hf_config
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, atomic_folder, write_safetensors
from lionjax.convert.jax_folder import holds_params, open_params
from lionjax.convert.mapping.apply import iter_param_slices, iter_torch_tensors
from lionjax.convert.mapping.plan import ConversionPlan, plan_params, plan_state_dict
from lionjax.convert.processor_files import complete_processor_files, read_image_processor
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping, copy_bits
from lionjax.models import parts as submodels

TORCH_STEM = "model"  # file name of the weights, without shard number and suffix


def from_torch(path: str | Path, system: str | None = None) -> tuple[Any, Params]:
    """(config, params) of a PyTorch checkpoint; params are numpy arrays in the checkpoint's dtype.

    `system` names the checkpoint format where config.json does not. Raises UserError with all problems.
    """
    source = detect.open_checkpoint(Path(path), system)
    plan = plan_from_torch(source)
    flat_params = {path: np.empty(spec.shape, spec.dtype) for path, spec in plan.output_specs.items()}
    for leaf, index, part in iter_param_slices(plan, source.tensors, source.tensors.release):
        copy_bits(flat_params[leaf][(*index, ...)], part)
    return source.config, trees.unflatten(flat_params)


def to_torch(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | str | Path | None = None,
    merge_lora: bool = False,
) -> None:
    """Write `params` as a PyTorch folder: safetensors, config.json, a model card.

    `config` is the model's config, or the experiment that trained it. `shard_bytes` is the largest size of one file.
    `companions`: {name in the folder: file to copy}, such as tokenizers, or the folder that `params` were loaded from,
    whose tokenizer, processor, chat template and generation files are copied. A LoRA is written to the subfolder
    `adapter` (PEFT), or merged into its kernels with `merge_lora`. Raises UserError for problems between config and
    params, and when `path` exists and is not empty.
    """
    flat_params = trees.flatten(params)
    if merge_lora:
        config, flat_params = merge_lora_weights(config, flat_params)
    checkpoint_format, plan = plan_to_torch(config, flat_params)
    parts = iter_torch_tensors(plan, flat_params)
    write_torch_folder(config, checkpoint_format, plan, parts, Path(path), shard_bytes, resolve_companions(companions))


def weight_map_of(path: str | Path, system: str | None = None) -> tuple[WeightMapping, ...]:
    """The weight map of a lionjax folder, or of a PyTorch folder or file. Reads the config and names, no values."""
    path = Path(path)
    config = open_params(path)[0] if holds_params(path) else detect.open_checkpoint(path, system).config
    weight_map, _ = detect.weight_map_and_abstract_params(detect.format_of_config(config), config)
    return weight_map


def plan_from_torch(source: CheckpointSource) -> ConversionPlan:
    """The plan of a PyTorch checkpoint to parameters. Raises UserError with all problems."""
    weight_map, abstract_params = detect.weight_map_and_abstract_params(source.checkpoint_format, source.config)
    return plan_params(weight_map, source.tensors, source.checkpoint_format.ignore_patterns, abstract_params)


def plan_to_torch(config: Any, flat_params: Mapping) -> tuple[CheckpointFormat, ConversionPlan]:
    """(checkpoint format, plan) of parameters by path to a PyTorch checkpoint. Raises UserError with all problems."""
    checkpoint_format = detect.format_of_config(config)
    weight_map, abstract_params = detect.weight_map_and_abstract_params(checkpoint_format, config)
    return checkpoint_format, plan_state_dict(weight_map, flat_params, abstract_params)


def merge_lora_weights(config: Any, flat_params: Mapping) -> tuple[Any, Mapping]:
    """(config with LoRA rank 0, parameters by path with the LoRA merged into the kernels).

    Raises UserError where the model has no LoRA.
    """
    model_config = detect.model_config_of(config)
    if (lora := loras.find_lora_config(model_config)) is None:
        raise UserError("this model has no LoRA to merge; leave out --merge-lora")
    return detect.replace_model_config(config, loras.without_lora(model_config)), loras.merge_lora(flat_params, lora)


def write_torch_folder(
    config,
    checkpoint_format: CheckpointFormat,
    plan: ConversionPlan,
    parts,
    dst: Path,
    shard_bytes: int,
    companions: Mapping[str, Path],
):
    """Write the PyTorch folder `dst`: weights, companions, config.json and model card; returns the file names."""
    files: list[str] = []
    with atomic_folder(dst) as folder:
        # LoRA tensors come last in `parts`. groupby holds one more tensor in memory, so it is used for a LoRA only.
        groups = itertools.groupby(parts, lambda part: loras.is_lora_key(part[0]))
        for is_lora, group in groups if any(map(loras.is_lora_key, plan.output_specs)) else [(False, parts)]:
            specs = {n: spec for n, spec in plan.output_specs.items() if loras.is_lora_key(n) == is_lora}
            subfolder = folder / loras.ADAPTER_FOLDER if is_lora else folder
            subfolder.mkdir(exist_ok=True)
            if is_lora:  # PEFT reads a single file, so no shards
                names = write_safetensors(subfolder, loras.ADAPTER_STEM, specs, group, 2**62)
                files += [f"{loras.ADAPTER_FOLDER}/{name}" for name in names]
            else:
                files += write_safetensors(subfolder, TORCH_STEM, specs, group, shard_bytes)
        copy_files(companions, folder)
        model_config = detect.model_config_of(config)
        # The base's, without the LoRA: PEFT keeps that in float32 over a base in bfloat16.
        dtypes = [spec.dtype for name, spec in plan.output_specs.items() if not loras.is_lora_key(name)]
        dtype = max(dtypes, key=lambda d: (d.itemsize <= 4, d.itemsize)).name
        hf_config = merge_hf_config(read_hf_config(folder / "config.json"), checkpoint_format, model_config, dtype)
        (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if any(map(loras.is_lora_key, plan.output_specs)):
            lora = loras.find_lora_config(model_config)
            architecture = (hf_config.get("architectures") or [""])[0]
            settings = loras.adapter_config(lora, plan.output_specs, architecture, checkpoint_format.module_names)
            file = folder / loras.ADAPTER_FOLDER / loras.ADAPTER_CONFIG_FILE
            file.write_text(json.dumps(settings, indent=2) + "\n")
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        files += complete_processor_files(config, folder, hf_config, submodels.image_size_of(model_config))
        image_settings, names = read_image_processor(folder), find_companion_files(folder)
        (folder / "README.md").write_text(
            model_card.render_model_card(checkpoint_format.name, config, hf_config, plan, names, image_settings)
        )
    return (*files, "config.json", CONFIG_FILE, "README.md")
