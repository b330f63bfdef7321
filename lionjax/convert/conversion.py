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

from lionjax.convert.coverage import Coverage, coverage_of
from lionjax.convert.formats import detect
from lionjax.convert.formats.checkpoint_format import Source, read_settings
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.io import orbax
from lionjax.convert.io.reader import has_nan
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, whole_folder, write_safetensors
from lionjax.convert.jax_folder import ORIGIN, OURS, companions_of, copy_files, open_params, origin_of
from lionjax.convert.mapping.apply import leaf_parts, tensor_parts
from lionjax.convert.mapping.plan import plan_state
from lionjax.convert.resize import Surgery, add_to_tokenizer, added_words, picture_size, said_of_pictures
from lionjax.convert.torch_folder import merged, plan_in, plan_out, with_system, write_out
from lionjax.core import config as configs
from lionjax.core.types import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Tables to be changed on the way in: new words behind the vocabulary, a multiple to fill it to, a picture size."""

    words: tuple[str, ...] = ()
    vocab_multiple: int = 1
    image: int | None = None


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    system: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: str | Path | None = None,
    merge_lora: bool = False,
    wanted: Wanted = Wanted(),
    base: str | Path | None = None,
) -> Coverage:
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
    extra = adapter is not None or base is not None or wanted != Wanted()
    if to == "torch" and extra:
        raise UserError("bases, adapters, words and picture sizes are added on the way to jax")
    stored = orbax.holds_checkpoint(Path(src))
    if stored:
        orbax.return_freed_memory()
    if to == "jax" and stored:
        if extra:
            raise UserError("bases, adapters, words and picture sizes go with an original's weights")
        coverage = _convert_stored(Path(src), Path(dst), shard_bytes)
    elif to == "jax":
        source = detect.open_source(Path(src), system, adapter and Path(adapter), base and Path(base))
        coverage = _convert_in(source, Path(dst), shard_bytes, wanted)
    else:
        coverage = _convert_out(Path(src), Path(dst), shard_bytes, merge_lora)
    coverage.seconds = time.perf_counter() - start
    for name in coverage.nan:
        log.warning("tensor %r holds NaN", name)
    return coverage


def _convert_in(source: Source, dst: Path, shard_bytes: int, wanted: Wanted) -> Coverage:
    plan = plan_in(source)
    coverage = coverage_of(source.kind, plan, source.tensors)
    for name, others in source.copied.items():
        coverage.tied[name] = (*coverage.tied.get(name, ()), *others)
    beside = companions_of(source.folder)
    surgery, texts = _surgery(detect.system_in(source.config), wanted, beside)
    config = with_system(source.config, surgery.config)

    def done(name, array):
        if has_nan(np.asarray(array)):
            coverage.nan.append(name)
        source.tensors.forget(name, array)

    with whole_folder(dst) as folder:
        parts = surgery.parts(leaf_parts(plan, source.tensors, done))
        files = write_safetensors(folder, OURS, surgery.forms(plan.made), parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(beside, folder / ORIGIN)
        for name, content in texts.items():
            (folder / ORIGIN / name).write_bytes(content)
        coverage.files = (*files, CONFIG_FILE)
    return coverage


def _convert_stored(src: Path, dst: Path, shard_bytes: int) -> Coverage:
    """An Orbax checkpoint into a folder in our own names."""
    config, tensors = open_params(src)
    kind = detect.of_config(config)
    rows, model = detect.table_and_model(kind, config)
    plan = plan_state(rows, tensors, model)  # refuses what is no parameter of this model
    forms, parts = orbax.layers(tensors, rows)
    with whole_folder(dst) as folder:
        files = write_safetensors(folder, OURS, forms, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(origin_of(src), folder / ORIGIN)
    coverage = coverage_of(kind, plan, tensors)
    coverage.files = (*files, CONFIG_FILE)
    return coverage


def _surgery(system: Any, wanted: Wanted, beside: Mapping[str, Path]) -> tuple[Surgery, dict[str, bytes]]:
    """The tables that change, and what they change in the files that come along."""
    made, texts, known = Surgery(system), {}, None
    if wanted.words and (file := beside.get("tokenizer.json")) is not None:
        known, texts["tokenizer.json"] = add_to_tokenizer(file, wanted.words)
    if wanted.words or wanted.vocab_multiple > 1:
        words, multiple = len(wanted.words), wanted.vocab_multiple
        made = made.then(added_words(system, words, known, multiple))
    if wanted.image is not None:
        made = made.then(picture_size(made.config, wanted.image))
        if (file := beside.get("preprocessor_config.json")) is not None:
            said = said_of_pictures(read_settings(file), wanted.image)
            texts["preprocessor_config.json"] = json.dumps(said, indent=2).encode()
    return made, texts


def _convert_out(src: Path, dst: Path, shard_bytes: int, merge_lora: bool) -> Coverage:
    config, tensors = open_params(src)
    config, flat = merged(config, tensors) if merge_lora else (config, tensors)
    kind, plan = plan_out(config, flat)
    coverage = coverage_of(kind, plan, tensors)
    parts = tensor_parts(plan, flat, tensors.forget)
    coverage.files = write_out(config, kind, plan, parts, dst, shard_bytes, origin_of(src))
    return coverage
