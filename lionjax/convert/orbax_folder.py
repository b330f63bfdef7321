# SPDX-License-Identifier: Apache-2.0
"""Weights from a folder straight onto a mesh, or a tensor at a time into an Orbax checkpoint laid out for one."""

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

from lionjax.convert.coverage import ConversionReport, make_report
from lionjax.convert.formats import detect
from lionjax.convert.io import orbax
from lionjax.convert.io.orbax import LazyShardedArray
from lionjax.convert.io.reader import CheckpointTensors, has_nan
from lionjax.convert.jax_folder import (
    ORIGIN,
    copy_files,
    find_companion_files,
    find_origin_files,
    holds_params,
    load_params,
    open_params,
)
from lionjax.convert.mapping.apply import TENSOR_VALUES, LazyTensor, sharded_params_from_state_dict, to_flax_leaves
from lionjax.convert.mapping.plan import ConversionPlan, MappedTensor, plan_params, raise_problems
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.files import is_disk_full
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping


def load_sharded_params(path: str | Path, mesh: Mesh, system: str | None = None) -> tuple[Any, Params]:
    """(config, params on a mesh) of a folder or file in our names or the original's, laid out by the logical axes.

    Each process reads only the bytes that its own shards need.
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
    """Weights of a folder or file as an Orbax checkpoint for a mesh, a tensor at a time; what was read and left.

    It holds the items `params` (arrays) and `config` (ours, as JSON), `origin` with what came along, and appears whole.
    Each process reads and writes the parts that its own devices will hold. Raises UserError.
    """
    start, src, dst = time.perf_counter(), Path(src), Path(dst).absolute()
    if dst.exists():
        raise UserError(f"{dst} is there already; choose a new folder")
    if orbax.is_checkpoint(src):
        raise UserError(f"{src} is an Orbax checkpoint already; Orbax restores it onto any mesh")
    orbax.return_freed_memory()
    ours = holds_params(src)
    if ours:
        config, tensors = open_params(src)
        kind, beside = detect.format_of_config(config), find_origin_files(src)
        table, _ = detect.weight_map_and_abstract_params(kind, config)
        rows, ignore = [WeightMapping(name, name) for name in tensors], ()
    else:
        source = detect.open_checkpoint(src, system)
        config, tensors, kind = source.config, source.tensors, source.checkpoint_format
        beside, ignore = find_companion_files(source.folder), kind.ignore_patterns
        rows, _ = table, _ = detect.weight_map_and_abstract_params(kind, config)
    like = kind.abstract_params(detect.model_config_of(config), mesh)
    plan = plan_params(rows, tensors, ignore, like)
    coverage = make_report(kind, plan, tensors)
    depth = {path: len(row.index_letters) for row in table for path in row.flax_paths}
    pieces = _mapped_layers(plan)

    def promise(path, sharding):
        leaf, twins, done = (_lazy_leaf_from_jax if ours else _lazy_leaf_from_torch)(plan, tensors, path, pieces[path])
        return LazyShardedArray(leaf, depth[path], sharding, twins, _nan_recorder(coverage, path), done)

    promises = {path: promise(path, target.sharding) for path, target in trees.flatten(like).items()}
    _write_atomically(dst, trees.unflatten(promises), json.loads(configs.to_json(config)), beside)
    coverage.files = (orbax.PARAMS_ITEM, orbax.CONFIG_ITEM)
    coverage.seconds = time.perf_counter() - start
    return coverage


def _nan_recorder(report: ConversionReport, path: str) -> Callable[[np.ndarray], None]:
    """Notes the path of a parameter in which a NaN is met."""

    def seen(array):
        if path not in report.nan_tensors and has_nan(array):
            report.nan_tensors.append(path)

    return seen


def _mapped_layers(plan: ConversionPlan) -> dict[str, dict[tuple, tuple[MappedTensor, int]]]:
    """{path: {layer: the piece that makes it, and which of its leaves}}."""
    layers_by_path: dict[str, dict] = {}
    for mapped in plan.mapped_tensors:
        for number, path in enumerate(mapped.mapping.flax_paths):
            layers_by_path.setdefault(path, {})[mapped.index] = (mapped, number)
    return layers_by_path


def _lazy_leaf_from_jax(plan: ConversionPlan, tensors: CheckpointTensors, path: str, mapped_layers: dict) -> tuple:
    """A leaf that is one on the disk already, to which nothing is tied; and what lets go of its pages."""
    leaf = tensors[path]

    def done(index):
        tensors.release(path)

    return (LazyTensor(leaf.shape, leaf.dtype, lambda index: leaf[(*index, ...)]), lambda index: (), done)


def _lazy_leaf_from_torch(plan: ConversionPlan, tensors: CheckpointTensors, path: str, mapped_layers: dict) -> tuple:
    """A leaf of which each layer comes from the torch tensors of one piece; what tied ones make; and what lets go."""

    def layer(index):
        problems: list[str] = []
        mapped, number = mapped_layers[index]
        parts = to_flax_leaves(mapped, tensors, problems)
        raise_problems(problems, TENSOR_VALUES)
        return parts[number]

    def twins(index):
        mapped, number = mapped_layers[index]
        return [(name, mapped.mapping.to_flax(tensors[name])[number]) for name in mapped.tied_keys]

    def done(index):
        mapped, _ = mapped_layers[index]
        for name in (*mapped.torch_keys, *mapped.tied_keys):
            tensors.release(name)

    spec = plan.output_specs[path]
    return LazyTensor(spec.shape, spec.dtype, layer), twins, done


def _write_atomically(dst: Path, arrays: Params, config: dict, companions: dict[str, Path]) -> None:
    """The checkpoint with what belongs beside it, under its name when all of it is there."""
    from jax.experimental import multihost_utils

    partial, is_main = dst.parent / f".{dst.name}.partial", jax.process_index() == 0
    needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    try:
        if is_main:
            _remove_partial(partial)
            dst.parent.mkdir(parents=True, exist_ok=True)
            if needed > (free := shutil.disk_usage(dst.parent).free):
                raise UserError(
                    f"{dst.parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written"
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
    """What an attempt left, also under the names that Orbax gives to what is not complete."""
    for path in (partial, *partial.parent.glob(f"{partial.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)
