# SPDX-License-Identifier: Apache-2.0
"""From folder to folder, a tensor at a time: `convert`, and what may change on the way in."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.coverage import ConversionReport, make_report
from lionjax.convert.formats import detect
from lionjax.convert.formats.checkpoint_format import CheckpointSource, read_hf_config
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.io import orbax
from lionjax.convert.io.reader import has_nan
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, atomic_folder, write_safetensors
from lionjax.convert.jax_folder import (
    JAX_STEM,
    ORIGIN,
    copy_files,
    find_companion_files,
    find_origin_files,
    open_params,
)
from lionjax.convert.mapping.apply import iter_param_slices, iter_torch_tensors
from lionjax.convert.mapping.plan import plan_state_dict
from lionjax.convert.resize import (
    ResizePlan,
    add_tokens_to_tokenizer,
    interpolate_position_embeddings,
    resize_preprocessor_config,
    resize_token_embeddings,
)
from lionjax.convert.torch_folder import (
    merge_lora_weights,
    plan_from_torch,
    plan_to_torch,
    replace_model_config,
    write_torch_folder,
)
from lionjax.core import config as configs
from lionjax.core.types import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ResizeOptions:
    """Tables to be changed on the way in: new words behind the vocabulary, a multiple to fill it to, a picture size."""

    added_tokens: tuple[str, ...] = ()
    pad_vocab_to_multiple_of: int = 1
    image_size: int | None = None


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
) -> ConversionReport:
    """A folder into a folder, a tensor at a time: `to` "jax" (our names) or "torch" (the original's).

    `system` names the kind of model where the source does not say it; `adapter` is a folder of PEFT's with a LoRA for
    it; `base` is the model from which the source is a difference; `wanted` changes tables; all four on the way in. On
    the way to torch a LoRA is written into a folder `adapter`, or merged into its matrices. The new folder appears when
    it is complete. Raises UserError, in words, for everything that does not fit.
    """
    start = time.perf_counter()
    if to not in ("jax", "torch"):
        raise UserError(f"to is {to!r}; it can be 'jax' or 'torch'")
    if merge_lora and to == "jax":
        raise UserError("a LoRA is merged on the way to torch; here it stays beside its matrices")
    extra = adapter is not None or base is not None or resize_options != ResizeOptions()
    if to == "torch" and extra:
        raise UserError("bases, adapters, words and picture sizes are added on the way to jax")
    stored = orbax.is_checkpoint(Path(src))
    if stored:
        orbax.return_freed_memory()
    if to == "jax" and stored:
        if extra:
            raise UserError("bases, adapters, words and picture sizes go with an original's weights")
        coverage = _convert_orbax_to_jax(Path(src), Path(dst), shard_bytes)
    elif to == "jax":
        source = detect.open_checkpoint(Path(src), system, adapter and Path(adapter), base and Path(base))
        coverage = _convert_torch_to_jax(source, Path(dst), shard_bytes, resize_options)
    else:
        coverage = _convert_jax_to_torch(Path(src), Path(dst), shard_bytes, merge_lora)
    coverage.seconds = time.perf_counter() - start
    for name in coverage.nan_tensors:
        log.warning("tensor %r holds NaN", name)
    return coverage


def _convert_torch_to_jax(
    source: CheckpointSource, dst: Path, shard_bytes: int, resize_options: ResizeOptions
) -> ConversionReport:
    plan = plan_from_torch(source)
    coverage = make_report(source.checkpoint_format, plan, source.tensors)
    for name, others in source.tied.items():
        coverage.tied[name] = (*coverage.tied.get(name, ()), *others)
    beside = find_companion_files(source.folder)
    surgery, texts = _plan_resize(detect.model_config_of(source.config), resize_options, beside)
    config = replace_model_config(source.config, surgery.config)

    def done(name, array):
        if has_nan(np.asarray(array)):
            coverage.nan_tensors.append(name)
        source.tensors.release(name, array)

    with atomic_folder(dst) as folder:
        parts = surgery.apply(iter_param_slices(plan, source.tensors, done))
        files = write_safetensors(folder, JAX_STEM, surgery.resized_specs(plan.output_specs), parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(beside, folder / ORIGIN)
        for name, content in texts.items():
            (folder / ORIGIN / name).write_bytes(content)
        coverage.files = (*files, CONFIG_FILE)
    return coverage


def _convert_orbax_to_jax(src: Path, dst: Path, shard_bytes: int) -> ConversionReport:
    """An Orbax checkpoint into a folder in our own names."""
    config, tensors = open_params(src)
    kind = detect.format_of_config(config)
    rows, model = detect.weight_map_and_abstract_params(kind, config)
    plan = plan_state_dict(rows, tensors, model)  # refuses what is no parameter of this model
    forms, parts = orbax.specs_and_layers(tensors, rows)
    with atomic_folder(dst) as folder:
        files = write_safetensors(folder, JAX_STEM, forms, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(find_origin_files(src), folder / ORIGIN)
    coverage = make_report(kind, plan, tensors)
    coverage.files = (*files, CONFIG_FILE)
    return coverage


def _plan_resize(
    model_config: Any, resize_options: ResizeOptions, companions: Mapping[str, Path]
) -> tuple[ResizePlan, dict[str, bytes]]:
    """The tables that change, and what they change in the files that come along."""
    made, texts, known = ResizePlan(model_config), {}, None
    if resize_options.added_tokens and (file := companions.get("tokenizer.json")) is not None:
        known, texts["tokenizer.json"] = add_tokens_to_tokenizer(file, resize_options.added_tokens)
    if resize_options.added_tokens or resize_options.pad_vocab_to_multiple_of > 1:
        words, multiple = len(resize_options.added_tokens), resize_options.pad_vocab_to_multiple_of
        made = made.compose(resize_token_embeddings(model_config, words, known, multiple))
    if resize_options.image_size is not None:
        made = made.compose(interpolate_position_embeddings(made.config, resize_options.image_size))
        if (file := companions.get("preprocessor_config.json")) is not None:
            said = resize_preprocessor_config(read_hf_config(file), resize_options.image_size)
            texts["preprocessor_config.json"] = json.dumps(said, indent=2).encode()
    return made, texts


def _convert_jax_to_torch(src: Path, dst: Path, shard_bytes: int, merge_lora: bool) -> ConversionReport:
    config, tensors = open_params(src)
    config, flat = merge_lora_weights(config, tensors) if merge_lora else (config, tensors)
    kind, plan = plan_to_torch(config, flat)
    coverage = make_report(kind, plan, tensors)
    parts = iter_torch_tensors(plan, flat, tensors.release)
    coverage.files = write_torch_folder(config, kind, plan, parts, dst, shard_bytes, find_origin_files(src))
    return coverage
