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
from lionjax.convert.formats.checkpoint_format import Published, Source, read_settings
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, whole_folder, write_safetensors
from lionjax.convert.jax_folder import copy_files, holds_params, open_params
from lionjax.convert.mapping.apply import leaf_parts, tensor_parts
from lionjax.convert.mapping.plan import Plan, plan_params, plan_state
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Row, copy_bits

THEIRS = "model"  # first word of its weight files


def from_torch(path: str | Path, system: str | None = None) -> tuple[Any, Params]:
    """(config, params) of a checkpoint with the original's names; params are numpy arrays in the checkpoint's dtype.

    `system` names the kind of model where the files do not say it. Raises UserError with all that does not fit.
    """
    source = detect.open_source(Path(path), system)
    plan = plan_in(source)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.made.items()}
    for leaf, index, part in leaf_parts(plan, source.tensors, source.tensors.forget):
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
        config, flat = merged(config, flat)
    kind, plan = plan_out(config, flat)
    parts = tensor_parts(plan, flat)
    write_out(config, kind, plan, parts, Path(path), shard_bytes, companions or {})


def table_of(path: str | Path, system: str | None = None) -> tuple[Row, ...]:
    """The rows of a folder or file of weights, in our names or the original's. Nothing is read but what it is."""
    path = Path(path)
    ours = holds_params(path)
    config = open_params(path)[0] if ours else detect.open_source(path, system).config
    rows, _ = detect.table_and_model(detect.of_config(config), config)
    return rows


def plan_in(source: Source) -> Plan:
    rows, model = detect.table_and_model(source.kind, source.config)
    return plan_params(rows, source.tensors, source.kind.ignore, model)


def plan_out(config: Any, flat: Mapping) -> tuple[Published, Plan]:
    kind = detect.of_config(config)
    rows, model = detect.table_and_model(kind, config)
    return kind, plan_state(rows, flat, model)


def merged(config: Any, flat: Mapping) -> tuple[Any, Mapping]:
    """Config and parameters without LoRA, which is in the matrices now."""
    system = detect.system_in(config)
    if (lora := loras.of(system)) is None:
        raise UserError("this model has no LoRA that could be merged")
    plain = loras.with_lora(system, dataclasses.replace(lora, rank=0))
    return with_system(config, plain), loras.merged(flat, lora)


def with_system(config: Any, system: Any) -> Any:
    """The config, or the whole experiment that it is, with another system's config."""
    return system if detect.system_in(config) is config else dataclasses.replace(config, system=system)


def write_out(config, kind: Published, plan: Plan, parts, dst: Path, shard_bytes: int, beside: Mapping[str, Path]):
    """The folder for torch's side, with what belongs beside the weights: what came along from there, tokenizers."""
    files: list[str] = []
    with whole_folder(dst) as folder:
        # A LoRA's rows come last, so its tensors do. Grouping holds one tensor more, so it is only done for a LoRA.
        groups = itertools.groupby(parts, lambda part: loras.is_detour(part[0]))
        for detour, group in groups if any(map(loras.is_detour, plan.made)) else [(False, parts)]:
            forms = {n: form for n, form in plan.made.items() if loras.is_detour(n) == detour}
            where = folder / loras.FOLDER if detour else folder
            where.mkdir(exist_ok=True)
            if detour:  # PEFT knows one file only
                names = write_safetensors(where, loras.WEIGHTS, forms, group, 2**62)
                files += [f"{loras.FOLDER}/{name}" for name in names]
            else:
                files += write_safetensors(where, THEIRS, forms, group, shard_bytes)
        copy_files(beside, folder)
        settings = read_settings(folder / "config.json")
        dtype = max((form.dtype for form in plan.made.values()), key=lambda d: (d.itemsize <= 4, d.itemsize)).name
        known = kind.settings(detect.system_in(config)) | {"dtype": dtype}
        settings = _over(settings, known)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        _write_adapter(config, plan, settings, folder / loras.FOLDER)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        files += model_card.write_processors(config, folder)
        (folder / "README.md").write_text(model_card.card(kind.name, config, settings, plan.made))
    return (*files, "config.json", CONFIG_FILE, "README.md")


def _write_adapter(config: Any, plan: Plan, settings: dict, folder: Path) -> None:
    """What PEFT wants to know of the LoRA whose tensors lie in `folder`; nothing where there is none."""
    detours = [name for name in plan.made if loras.is_detour(name)]
    if detours:
        lora = loras.of(detect.system_in(config))
        matrices = {n for n, form in plan.made.items() if len(form.shape) == 2 and n not in detours}
        architecture = (settings.get("architectures") or [""])[0]
        said = loras.settings(lora, detours, matrices, architecture)
        (folder / loras.CONFIG).write_text(json.dumps(said, indent=2) + "\n")


def _over(old: dict, new: dict) -> dict:
    """Settings with new ones over them, part by part."""
    parts = {key for key in old.keys() & new.keys() if isinstance(old[key], dict) and isinstance(new[key], dict)}
    return old | new | {key: _over(old[key], new[key]) for key in parts}
