# SPDX-License-Identifier: Apache-2.0
"""Weights from a folder straight onto a mesh, and from there into an Orbax checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lionjax import config as configs
from lionjax import convert, convert_systems
from lionjax.convert_tables import placed_from
from lionjax.interfaces import Params, UserError
from lionjax.weight_rows import Row


def load_placed(path: str | Path, mesh: Mesh, system: str | None = None) -> tuple[Any, Params]:
    """(config, params on a mesh) of a folder or file in our names or the original's, laid out by the logical axes.

    Each process reads only the bytes that its own shards need.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob(f"{convert.OURS}.safetensors*")):
        config, tensors = convert.open_params(path)
        rows, ignore = [Row(name, name) for name in tensors], ()
    else:
        source = convert_systems.open_source(path, system)
        config, tensors, ignore = source.config, source.tensors, source.kind.ignore
        rows, _ = convert_systems.table_and_model(source.kind, config)
    kind = convert_systems.of_config(config)
    like = kind.abstract(convert_systems.system_in(config), mesh)
    return config, placed_from(rows, tensors, like, ignore)


def save_orbax(
    src: str | Path, dst: str | Path, mesh: Mesh, system: str | None = None
) -> tuple[Any, Params]:
    """Weights of a folder or file as an Orbax checkpoint, each process writing its own shards on the mesh.

    It holds `params` (Orbax's StandardSave) and `config` (ours, as JSON), and appears whole. What is handed back is
    what was written.
    """
    import orbax.checkpoint as ocp

    dst = Path(dst).absolute()
    if dst.exists():
        raise UserError(f"{dst} is there already; choose a new folder")
    config, params = load_placed(src, mesh, system)
    said = json.loads(configs.to_json(config))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "config")) as writer:
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(said)}
        writer.save(dst, args=ocp.args.Composite(**items))
    return config, params
