# SPDX-License-Identifier: Apache-2.0
"""Folders in our own names: what lies in one, how it is written, and how it is opened.

Such a folder holds `lionjax.json` (the config), `params.safetensors` (or shards of it) and `origin/`, what came along
from elsewhere. An Orbax checkpoint with our config is opened as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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

JAX_STEM = "params"  # first word of its weight files
ORIGIN = "origin"
COMPANION_FILES = (  # what belongs to a model besides its weights and is handed on as it is
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "qformer_tokenizer/tokenizer.json",
    "qformer_tokenizer/spiece.model",
    "qformer_tokenizer/vocab.txt",
    "ram_tag_list.txt",
    "ram_tag_list_chinese.txt",
    "ram_tag_list_threshold.txt",
)


def save(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | None = None,
) -> None:
    """Write `params` as a folder in our own names, which `load_params` reads; arguments as those of `to_torch`."""
    flat = trees.flatten(params)
    forms = {name: TensorSpec.from_array(leaf) for name, leaf in flat.items()}
    with atomic_folder(Path(path)) as folder:
        parts = ((name, (), np.asarray(leaf)) for name, leaf in flat.items())
        write_safetensors(folder, JAX_STEM, forms, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(companions or {}, folder / ORIGIN)


def load_params(path: str | Path, like: Params | None = None) -> tuple[Any, Params]:
    """(config, params) of such a folder: memory maps (of Orbax's arrays), or with `like` arrays on its mesh.

    Each process reads only the bytes of its own shards.
    """
    config, tensors = open_params(path)
    stored = orbax.is_checkpoint(Path(path))
    if like is not None and stored:
        return config, orbax.load_sharded(tensors, like)
    if like is not None:
        return config, sharded_params_from_state_dict([WeightMapping(path, path) for path in tensors], tensors, like)
    flat = {p: np.asarray(leaf) for p, leaf in tensors.items()} if stored else tensors.arrays
    return config, trees.unflatten(flat)


def open_params(path: str | Path) -> tuple[Any, CheckpointTensors]:
    """(config, parameters by path) of a folder that `convert` wrote in our names. Nothing is read yet."""
    path = Path(path)
    if orbax.is_checkpoint(path):
        return orbax.read_config(path), orbax.open_arrays(path)
    found = _find_params_file(path)
    if found is None or not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} holds no converted model; wanted {CONFIG_FILE} and {JAX_STEM}.safetensors")
    return detect.read_config(path), open_weights(found)


def holds_params(path: Path) -> bool:
    """Whether a folder holds weights in our own names, as safetensors or as an Orbax checkpoint."""
    return orbax.is_checkpoint(path) or _find_params_file(path) is not None


def _find_params_file(path: Path) -> Path | None:
    files = [path / f"{JAX_STEM}.safetensors.index.json", path / f"{JAX_STEM}.safetensors"]
    return next((file for file in files if file.is_file()), None)


def find_companion_files(folder: Path | None) -> dict[str, Path]:
    """What lies beside the weights and is handed on as it is."""
    beside = {} if folder is None else {name: folder / name for name in COMPANION_FILES}
    return {name: file for name, file in beside.items() if file.is_file()}


def find_origin_files(folder: Path) -> dict[str, Path]:
    """What came along from elsewhere with weights that are in our names now."""
    origin = [file for file in sorted((folder / ORIGIN).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder / ORIGIN)): file for file in origin}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies of files under the names that they have in `folder`."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
