# SPDX-License-Identifier: Apache-2.0
"""Folders with lionjax parameters: save, load and open them.

Such a folder holds `lionjax.json` (the config), `params.safetensors` (or its shards) and `origin/` (tokenizer and
settings files of the source). An Orbax checkpoint with a lionjax config is opened as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.companions import ORIGIN, copy_files, resolve_companions
from lionjax.convert.formats import detect
from lionjax.convert.formats.detect import CONFIG_FILE
from lionjax.convert.io import orbax
from lionjax.convert.io.reader import CheckpointTensors, open_weights
from lionjax.convert.io.safetensors_writer import SHARD_BYTES, atomic_folder, write_safetensors
from lionjax.convert.mapping.apply import sharded_params_from_state_dict
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping

JAX_STEM = "params"  # file name of the weights, without shard number and suffix


def save(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | str | Path | None = None,
) -> None:
    """Write `params` as a lionjax folder, which `load_params` reads; arguments and errors as in `to_torch`."""
    flat_params, files = trees.flatten(params), resolve_companions(companions)
    specs = {name: TensorSpec.from_array(leaf) for name, leaf in flat_params.items()}
    with atomic_folder(Path(path)) as folder:
        parts = ((name, (), np.asarray(leaf)) for name, leaf in flat_params.items())
        write_safetensors(folder, JAX_STEM, specs, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(files, folder / ORIGIN)


def load_params(path: str | Path, like: Params | None = None) -> tuple[Any, Params]:
    """(config, params) of a lionjax folder or Orbax checkpoint.

    Params are memory maps (from Orbax: numpy arrays); with `like`, a tree of abstract arrays with shardings, they are
    jax.Arrays with these shardings, of which each process reads only its own shards. Raises UserError as `open_params`,
    and where `like` differs from the folder.
    """
    config, tensors = open_params(path)
    is_orbax = orbax.is_checkpoint(Path(path))
    if like is not None and is_orbax:
        return config, orbax.load_sharded(tensors, like)
    if like is not None:
        return config, sharded_params_from_state_dict([WeightMapping(path, path) for path in tensors], tensors, like)
    flat_params = {p: np.asarray(leaf) for p, leaf in tensors.items()} if is_orbax else tensors.arrays
    return config, trees.unflatten(flat_params)


def open_params(path: str | Path) -> tuple[Any, CheckpointTensors]:
    """(config, parameters by path) of a lionjax folder or Orbax checkpoint; values are read on access.

    Raises UserError where `path` is neither.
    """
    path = Path(path)
    if orbax.is_checkpoint(path):
        return orbax.read_config(path), orbax.open_arrays(path)
    params_file = _find_params_file(path)
    if params_file is None or not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} holds no lionjax model ({CONFIG_FILE} and {JAX_STEM}.safetensors); "
            "convert a torch checkpoint with lionjax convert --to jax"
        )
    return detect.read_config(path), open_weights(params_file)


def holds_params(path: Path) -> bool:
    """Whether a folder holds lionjax parameters, as safetensors or as an Orbax checkpoint."""
    return orbax.is_checkpoint(path) or _find_params_file(path) is not None


def _find_params_file(path: Path) -> Path | None:
    files = [path / f"{JAX_STEM}.safetensors.index.json", path / f"{JAX_STEM}.safetensors"]
    return next((file for file in files if file.is_file()), None)
