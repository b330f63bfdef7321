# SPDX-License-Identifier: Apache-2.0
"""Load weights from a folder onto a mesh, or write them, one tensor at a time, as a sharded Orbax checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.convert.companions import ORIGIN, copy_files, find_companion_files, find_origin_files
from lionjax.convert.coverage import ConversionReport, make_report
from lionjax.convert.formats import detect
from lionjax.convert.io import orbax
from lionjax.convert.io.orbax import LazyShardedArray
from lionjax.convert.io.reader import CheckpointTensors, has_nan
from lionjax.convert.jax_folder import holds_params, load_params, open_params
from lionjax.convert.mapping.apply import TENSOR_VALUES, LazyTensor, sharded_params_from_state_dict, to_flax_leaves
from lionjax.convert.mapping.plan import ConversionPlan, MappedTensor, plan_params, raise_problems
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.files import is_disk_full
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping


def load_sharded_params(path: str | Path, mesh: Mesh, system: str | None = None) -> tuple[Any, Params]:
    """(config, params) of a lionjax or PyTorch checkpoint, as jax.Arrays sharded over `mesh` by their logical axes.

    Each process reads only the bytes of its own shards. `system` names the checkpoint format where config.json does
    not. Raises UserError.
    """
    path = Path(path)
    if holds_params(path):
        config, like = open_params(path)[0], None
    else:
        source = detect.open_checkpoint(path, system)
        config = source.config
    checkpoint_format = detect.format_of_config(config)
    like = checkpoint_format.abstract_params(detect.model_config_of(config), mesh)
    if holds_params(path):
        return load_params(path, like)
    weight_map, _ = detect.weight_map_and_abstract_params(source.checkpoint_format, config)
    return config, sharded_params_from_state_dict(
        weight_map, source.tensors, like, source.checkpoint_format.ignore_patterns
    )


def save_orbax(src: str | Path, dst: str | Path, mesh: Mesh, system: str | None = None) -> ConversionReport:
    """Write a lionjax or PyTorch checkpoint as an Orbax checkpoint sharded over `mesh`, one tensor at a time.

    Returns the report of what was read and skipped. `dst` holds the items `params` (arrays) and `config` (JSON), and
    `origin/` (tokenizer and settings files); it is renamed into place when it is complete. Each process reads and
    writes the shards of its own devices. `system` names the checkpoint format where config.json does not. Raises
    UserError where `dst` exists, `src` is an Orbax checkpoint, or checkpoint and model differ.
    """
    start, src, dst = time.perf_counter(), Path(src), Path(dst).absolute()
    if dst.exists():
        raise UserError(f"{dst} already exists; choose a new folder")
    if orbax.is_checkpoint(src):
        raise UserError(f"{src} is an Orbax checkpoint already; load it onto any mesh with load_sharded_params")
    orbax.return_freed_memory()
    is_lionjax = holds_params(src)
    if is_lionjax:
        config, tensors = open_params(src)
        checkpoint_format, companions = detect.format_of_config(config), find_origin_files(src)
        model_map, _ = detect.weight_map_and_abstract_params(checkpoint_format, config)
        weight_map, ignore = [WeightMapping(name, name) for name in tensors], ()
    else:
        source = detect.open_checkpoint(src, system)
        config, tensors, checkpoint_format = source.config, source.tensors, source.checkpoint_format
        companions, ignore = find_companion_files(source.folder), checkpoint_format.ignore_patterns
        model_map, _ = detect.weight_map_and_abstract_params(checkpoint_format, config)
        weight_map = model_map
    like = checkpoint_format.abstract_params(detect.model_config_of(config), mesh)
    plan = plan_params(weight_map, tensors, ignore, like)
    report = make_report(checkpoint_format, plan, tensors)
    depth = {path: len(mapping.index_letters) for mapping in model_map for path in mapping.flax_paths}
    mapped_layers = _mapped_layers(plan)
    make_lazy_leaf = _lazy_leaf_from_jax if is_lionjax else _lazy_leaf_from_torch

    def make_lazy_array(path, sharding):
        leaf, tied_layers, release = make_lazy_leaf(plan, tensors, path, mapped_layers[path])
        return LazyShardedArray(leaf, depth[path], sharding, tied_layers, _nan_recorder(report, path), release)

    lazy_arrays = {path: make_lazy_array(path, target.sharding) for path, target in trees.flatten(like).items()}
    _write_atomically(dst, trees.unflatten(lazy_arrays), json.loads(configs.to_json(config)), companions)
    report.files = (orbax.PARAMS_ITEM, orbax.CONFIG_ITEM)
    report.seconds = time.perf_counter() - start
    return report


def _nan_recorder(report: ConversionReport, path: str) -> Callable[[np.ndarray], None]:
    """A function that adds `path` to `report.nan_tensors` when it is called with an array that holds a NaN."""

    def check_part(array):
        if path not in report.nan_tensors and has_nan(array):
            report.nan_tensors.append(path)

    return check_part


def _mapped_layers(plan: ConversionPlan) -> dict[str, dict[tuple, tuple[MappedTensor, int]]]:
    """{path: {layer index: (mapped tensor, position of the path in its flax_paths)}}."""
    layers_by_path: dict[str, dict] = {}
    for mapped in plan.mapped_tensors:
        for number, path in enumerate(mapped.mapping.flax_paths):
            layers_by_path.setdefault(path, {})[mapped.index] = (mapped, number)
    return layers_by_path


def _lazy_leaf_from_jax(plan: ConversionPlan, tensors: CheckpointTensors, path: str, mapped_layers: dict) -> tuple:
    """(lazy tensor, function to its tied layers: none, function that releases a layer) of a lionjax parameter."""
    leaf = tensors[path]

    def release(index):
        tensors.release(path)

    return (LazyTensor(leaf.shape, leaf.dtype, lambda index: leaf[(*index, ...)]), lambda index: (), release)


def _lazy_leaf_from_torch(plan: ConversionPlan, tensors: CheckpointTensors, path: str, mapped_layers: dict) -> tuple:
    """(lazy tensor, function to its tied layers, function that releases a layer) of a parameter from torch tensors."""

    def get_layer(index):
        problems: list[str] = []
        mapped, number = mapped_layers[index]
        parts = to_flax_leaves(mapped, tensors, problems)
        raise_problems(problems, TENSOR_VALUES)
        return parts[number]

    def tied_layers(index):
        mapped, number = mapped_layers[index]
        return [(name, mapped.mapping.to_flax(tensors[name])[number]) for name in mapped.tied_keys]

    def release(index):
        mapped, _ = mapped_layers[index]
        for name in (*mapped.torch_keys, *mapped.tied_keys):
            tensors.release(name)

    spec = plan.output_specs[path]
    return LazyTensor(spec.shape, spec.dtype, get_layer), tied_layers, release


def _write_atomically(dst: Path, arrays: Params, config: dict, companions: dict[str, Path]) -> None:
    """Write checkpoint and companions to a temporary folder and rename it to `dst`.

    Raises UserError where the disk is full or writing fails; the temporary folder is removed.
    """
    from jax.experimental import multihost_utils

    partial, is_main = dst.parent / f".{dst.name}.partial", jax.process_index() == 0
    needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    try:
        if is_main:
            _remove_partial(partial)
            dst.parent.mkdir(parents=True, exist_ok=True)
            if needed > (free := shutil.disk_usage(dst.parent).free):
                raise UserError(
                    f"{dst.parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written; "
                    "free some space or choose another DST"
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"begin {dst}")
        orbax.write_checkpoint(partial, arrays, config)
        if is_main:
            copy_files(companions, partial / ORIGIN)
            os.rename(partial, dst)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"end {dst}")
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0][:200]
        reason = "the disk is full" if is_disk_full(error) else text
        raise UserError(f"{dst} could not be written: {reason}; nothing was left behind") from error
    finally:
        if is_main:
            _remove_partial(partial)


def _remove_partial(partial: Path) -> None:
    """Remove a partial checkpoint, also under Orbax's names of incomplete checkpoints."""
    for path in (partial, *partial.parent.glob(f"{partial.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)
