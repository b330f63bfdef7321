# SPDX-License-Identifier: Apache-2.0
"""Checkpoint conversion from folder to folder, one tensor at a time: `convert`, with optional resizing."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lionjax.convert.companions import ORIGIN, PROCESSOR_FILES, copy_files, find_companion_files, find_origin_files
from lionjax.convert.coverage import ConversionReport, make_report
from lionjax.convert.formats import detect, token_ids
from lionjax.convert.formats.checkpoint_format import CheckpointSource, read_hf_config
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.formats.hf_config import merge_hf_config
from lionjax.convert.io import orbax
from lionjax.convert.io.reader import has_nan
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, atomic_folder, write_safetensors
from lionjax.convert.jax_folder import JAX_STEM, open_params
from lionjax.convert.mapping.apply import iter_param_slices, iter_torch_tensors
from lionjax.convert.mapping.plan import plan_state_dict
from lionjax.convert.processor_files import add_tokens, resized_processor_files
from lionjax.convert.resize import ResizePlan, interpolate_position_embeddings, resize_token_embeddings
from lionjax.convert.torch_folder import merge_lora_weights, plan_from_torch, plan_to_torch, write_torch_folder
from lionjax.core import config as configs
from lionjax.core import hub
from lionjax.core.types import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ResizeOptions:
    """Resizing applied by `convert(..., to="jax")`."""

    added_tokens: tuple[str, ...] = ()  # appended to the vocabulary and to tokenizer.json
    pad_vocab_to_multiple_of: int = 1  # rows of the token embeddings
    image_size: int | None = None  # pixels a side; position embeddings are interpolated


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    system: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: str | Path | None = None,
    merge_lora: bool = False,
    resize_options: ResizeOptions = ResizeOptions(),
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> ConversionReport:
    """Convert the checkpoint `src` into the new folder `dst`; returns the report of what was read, written and skipped.

    `to` is "jax" (parameter paths, `params.safetensors`) or "torch" (the original's keys, `model.safetensors`).
    `shard_bytes` is the largest size of one file. Only with `to="jax"`: `system` names the checkpoint format where
    config.json does not, `adapter` is a PEFT folder with a LoRA for `src`, `base` is the model that `src` is a delta
    of or a LoRA for, `vision_tower` is the folder of an original LLaVA's CLIP, and `resize_options` changes vocabulary
    and image size. `merge_lora` merges a LoRA into the weights; without it, it stays separate, in torch in a subfolder
    `adapter`. `dst` is renamed into place when it is complete. Raises UserError for wrong options and for every problem
    between checkpoint and model.
    """
    src = hub.local_path(src)
    start = time.perf_counter()
    if to not in ("jax", "torch"):
        raise UserError(f"to is {to!r}; it can be 'jax' or 'torch'")
    has_parts = any(part is not None for part in (adapter, base, vision_tower))
    has_options = has_parts or resize_options != ResizeOptions()
    is_orbax = orbax.is_checkpoint(Path(src))
    if to == "jax" and merge_lora and is_orbax:
        raise UserError(f"{src} is an Orbax checkpoint, whose LoRA stays separate; merge it with --to torch")
    if to == "torch" and has_options:
        raise UserError("base, adapter, added tokens and image_size work with --to jax only; convert --to jax first")
    if is_orbax:
        orbax.return_freed_memory()
    if to == "jax" and is_orbax:
        if has_options:
            raise UserError(
                f"{src} is an Orbax checkpoint; base, adapter, added tokens and image_size need a torch checkpoint"
            )
        report = _convert_orbax_to_jax(Path(src), Path(dst), shard_bytes)
    elif to == "jax":
        parts = (part and Path(part) for part in (adapter, base, vision_tower))
        source = detect.open_checkpoint(Path(src), system, *parts, merge_lora)
        report = _convert_torch_to_jax(source, Path(dst), shard_bytes, resize_options)
    else:
        report = _convert_jax_to_torch(Path(src), Path(dst), shard_bytes, merge_lora)
    report.seconds = time.perf_counter() - start
    for name in report.nan_tensors:
        log.warning("tensor %r holds NaN", name)
    return report


def _convert_torch_to_jax(
    source: CheckpointSource, dst: Path, shard_bytes: int, resize_options: ResizeOptions
) -> ConversionReport:
    plan = plan_from_torch(source)
    report = make_report(source.checkpoint_format, plan, source.tensors)
    for name, copies in source.tied.items():
        report.tied[name] = (*report.tied.get(name, ()), *copies)
    companions = find_companion_files(source.folder)
    resize_plan, new_contents = _plan_resize(source, resize_options, companions)
    config = detect.replace_model_config(source.config, resize_plan.config)
    if source.folder is not None:
        hf_config = read_hf_config(source.folder / "config.json")
        token_ids.check_token_ids(resize_plan.config, token_ids.read_vocabulary(source.folder), hf_config)

    transforms = {name: mapped.mapping.transform for mapped in plan.mapped_tensors for name in mapped.torch_keys[:1]}

    def release(name, array):
        if has_nan(np.asarray(array)):
            report.nan_tensors.append(name)
        if name in transforms and array.ndim == 1 and transforms[name].drops(np.asarray(array)):
            report.ignored[f"{name} (keys)"] = "biases on keys, which change no output"
        source.tensors.release(name, array)

    with atomic_folder(dst) as folder:
        parts = resize_plan.apply(iter_param_slices(plan, source.tensors, release))
        files = write_safetensors(folder, JAX_STEM, resize_plan.resized_specs(plan.output_specs), parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(companions, folder / ORIGIN)
        for name, content in new_contents.items():
            (folder / ORIGIN / name).write_bytes(content)
        report.files = (*files, CONFIG_FILE)
    return report


def _convert_orbax_to_jax(src: Path, dst: Path, shard_bytes: int) -> ConversionReport:
    """Convert an Orbax checkpoint into a lionjax folder; returns the report."""
    config, tensors = open_params(src)
    checkpoint_format = detect.format_of_config(config)
    weight_map, abstract_params = detect.weight_map_and_abstract_params(checkpoint_format, config)
    plan = plan_state_dict(
        weight_map, tensors, abstract_params
    )  # raises for arrays that are no parameters of the model
    specs, parts = orbax.specs_and_layers(tensors, weight_map)
    with atomic_folder(dst) as folder:
        files = write_safetensors(folder, JAX_STEM, specs, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(find_origin_files(src), folder / ORIGIN)
    report = make_report(checkpoint_format, plan, tensors)
    report.files = (*files, CONFIG_FILE)
    return report


def _plan_resize(
    source: CheckpointSource, resize_options: ResizeOptions, companions: Mapping[str, Path]
) -> tuple[ResizePlan, dict[str, bytes]]:
    """(resize plan, {name of a companion file: its new content}) for these options."""
    model_config = detect.model_config_of(source.config)
    plan, new_contents, num_known_tokens = ResizePlan(model_config), {}, None
    if resize_options == ResizeOptions():
        return plan, new_contents
    if resize_options.added_tokens:
        num_known_tokens, new_contents = add_tokens(companions, resize_options.added_tokens)
    if resize_options.added_tokens or resize_options.pad_vocab_to_multiple_of > 1:
        num_added, multiple = len(resize_options.added_tokens), resize_options.pad_vocab_to_multiple_of
        plan = plan.compose(resize_token_embeddings(model_config, num_added, num_known_tokens, multiple))
    if resize_options.image_size is not None:
        plan = plan.compose(interpolate_position_embeddings(plan.config, resize_options.image_size))
        settings = {name: read_hf_config(companions[name]) for name in PROCESSOR_FILES if name in companions}
        for name, content in resized_processor_files(settings, resize_options.image_size).items():
            new_contents[name] = json.dumps(content, indent=2).encode()
    if "config.json" in companions:
        released = read_hf_config(companions["config.json"])
        dtype = released.get("dtype") or released.get("torch_dtype") or "float32"
        hf_config = merge_hf_config(released, source.checkpoint_format, plan.config, dtype)
        if hf_config["model_type"] == released.get("model_type"):
            new_contents["config.json"] = json.dumps(hf_config, indent=2).encode()
    return plan, new_contents


def _convert_jax_to_torch(src: Path, dst: Path, shard_bytes: int, merge_lora: bool) -> ConversionReport:
    config, tensors = open_params(src)
    config, flat_params = merge_lora_weights(config, tensors) if merge_lora else (config, tensors)
    checkpoint_format, plan = plan_to_torch(config, flat_params)
    report = make_report(checkpoint_format, plan, tensors)
    parts = iter_torch_tensors(plan, flat_params, tensors.release)
    companions = find_origin_files(src)
    report.files = write_torch_folder(config, checkpoint_format, plan, parts, dst, shard_bytes, companions)
    return report
