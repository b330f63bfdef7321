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

from lionjax.convert.coverage import Coverage, coverage_of
from lionjax.convert.formats import detect
from lionjax.convert.io import orbax
from lionjax.convert.io.orbax import Promise
from lionjax.convert.io.reader import Tensors, has_nan
from lionjax.convert.io.safetensors_writer import FULL
from lionjax.convert.jax_folder import (
    ORIGIN,
    companions_of,
    copy_files,
    holds_params,
    load_params,
    open_params,
    origin_of,
)
from lionjax.convert.mapping.apply import THE_NUMBERS, Computed, leaves_of, placed_from
from lionjax.convert.mapping.plan import Piece, Plan, plan_params, refuse
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Row

FULL_WORDS = ("no space left", "file too large", "disk quota")


def load_placed(path: str | Path, mesh: Mesh, system: str | None = None) -> tuple[Any, Params]:
    """(config, params on a mesh) of a folder or file in our names or the original's, laid out by the logical axes.

    Each process reads only the bytes that its own shards need.
    """
    path = Path(path)
    if holds_params(path):
        config, like = open_params(path)[0], None
    else:
        source = detect.open_source(path, system)
        config = source.config
    kind = detect.of_config(config)
    like = kind.abstract(detect.system_in(config), mesh)
    if holds_params(path):
        return load_params(path, like)
    rows, _ = detect.table_and_model(source.kind, config)
    return config, placed_from(rows, source.tensors, like, source.kind.ignore)


def save_orbax(src: str | Path, dst: str | Path, mesh: Mesh, system: str | None = None) -> Coverage:
    """Weights of a folder or file as an Orbax checkpoint for a mesh, a tensor at a time; what was read and left.

    It holds the items `params` (arrays) and `config` (ours, as JSON), `origin` with what came along, and appears whole.
    Each process reads and writes the parts that its own devices will hold. Raises UserError.
    """
    start, src, dst = time.perf_counter(), Path(src), Path(dst).absolute()
    if dst.exists():
        raise UserError(f"{dst} is there already; choose a new folder")
    if orbax.holds_checkpoint(src):
        raise UserError(f"{src} is an Orbax checkpoint already; Orbax restores it onto any mesh")
    orbax.return_freed_memory()
    ours = holds_params(src)
    if ours:
        config, tensors = open_params(src)
        kind, beside = detect.of_config(config), origin_of(src)
        table, _ = detect.table_and_model(kind, config)
        rows, ignore = [Row(name, name) for name in tensors], ()
    else:
        source = detect.open_source(src, system)
        config, tensors, kind = source.config, source.tensors, source.kind
        beside, ignore = companions_of(source.folder), kind.ignore
        rows, _ = table, _ = detect.table_and_model(kind, config)
    like = kind.abstract(detect.system_in(config), mesh)
    plan = plan_params(rows, tensors, ignore, like)
    coverage = coverage_of(kind, plan, tensors)
    depth = {path: len(row.letters) for row in table for path in row.paths}
    pieces = _pieces(plan)

    def promise(path, sharding):
        leaf, twins, done = (_mapped if ours else _made)(plan, tensors, path, pieces[path])
        return Promise(leaf, depth[path], sharding, twins, _warn_of(coverage, path), done)

    promises = {path: promise(path, target.sharding) for path, target in trees.flatten(like).items()}
    _write_whole(dst, trees.unflatten(promises), json.loads(configs.to_json(config)), beside)
    coverage.files = (orbax.PARAMS, orbax.CONFIG)
    coverage.seconds = time.perf_counter() - start
    return coverage


def _warn_of(coverage: Coverage, path: str) -> Callable[[np.ndarray], None]:
    """Notes the path of a parameter in which a NaN is met."""

    def seen(array):
        if path not in coverage.nan and has_nan(array):
            coverage.nan.append(path)

    return seen


def _pieces(plan: Plan) -> dict[str, dict[tuple, tuple[Piece, int]]]:
    """{path: {layer: the piece that makes it, and which of its leaves}}."""
    pieces: dict[str, dict] = {}
    for piece in plan.pieces:
        for number, path in enumerate(piece.row.paths):
            pieces.setdefault(path, {})[piece.index] = (piece, number)
    return pieces


def _mapped(plan: Plan, tensors: Tensors, path: str, pieces: dict) -> tuple:
    """A leaf that is one on the disk already, to which nothing is tied; and what lets go of its pages."""
    leaf = tensors[path]

    def done(index):
        tensors.forget(path)

    return (Computed(leaf.shape, leaf.dtype, lambda index: leaf[(*index, ...)]), lambda index: (), done)


def _made(plan: Plan, tensors: Tensors, path: str, pieces: dict) -> tuple:
    """A leaf of which each layer comes from the torch tensors of one piece; what tied ones make; and what lets go."""

    def layer(index):
        problems: list[str] = []
        piece, number = pieces[index]
        parts = leaves_of(piece, tensors, problems)
        refuse(problems, THE_NUMBERS)
        return parts[number]

    def twins(index):
        piece, number = pieces[index]
        return [(name, piece.row.to_flax(tensors[name])[number]) for name in piece.tied]

    def done(index):
        piece, _ = pieces[index]
        for name in (*piece.tensors, *piece.tied):
            tensors.forget(name)

    form = plan.made[path]
    return Computed(form.shape, form.dtype, layer), twins, done


def _write_whole(dst: Path, promises: Params, config: dict, beside: dict[str, Path]) -> None:
    """The checkpoint with what belongs beside it, under its name when all of it is there."""
    from jax.experimental import multihost_utils

    partial, first = dst.parent / f".{dst.name}.partial", jax.process_index() == 0
    needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(promises))
    try:
        if first:
            _remove(partial)
            dst.parent.mkdir(parents=True, exist_ok=True)
            if needed > (free := shutil.disk_usage(dst.parent).free):
                raise UserError(
                    f"{dst.parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written"
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"begin {dst}")
        orbax.write(partial, promises, config)
        if first:
            copy_files(beside, partial / ORIGIN)
            os.rename(partial, dst)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"end {dst}")
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0][:200]
        full = getattr(error, "errno", None) in FULL or any(w in text.lower() for w in FULL_WORDS)
        reason = "the disk is full" if full else text
        raise UserError(f"{dst} could not be written: {reason}; nothing was left behind") from error
    finally:
        if first:
            _remove(partial)


def _remove(partial: Path) -> None:
    """What an attempt left, also under the names that Orbax gives to what is not complete."""
    for path in (partial, *partial.parent.glob(f"{partial.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)
