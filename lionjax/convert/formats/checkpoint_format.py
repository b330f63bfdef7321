# SPDX-License-Identifier: Apache-2.0
"""What describes a published checkpoint format, and the opened checkpoint itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lionjax.convert.io.reader import MAX_HEADER_BYTES, CheckpointTensors
from lionjax.core.types import Batch, Params, UserError


@dataclasses.dataclass(frozen=True)
class CheckpointFormat:
    """One kind of checkpoint. `config` and `settings` go from the original's config.json to ours and back."""

    name: str
    model_types: tuple[str, ...]  # in config.json
    matches: Callable[[Any], bool]  # whether one of our configs is of this kind
    config_from_hf: Callable[[dict], Any]
    config_to_hf: Callable[[Any], dict]
    weight_map: Callable[[Any], tuple]
    abstract_params: Callable[..., Params]  # (config, mesh=None): shapes of the whole tree, and where it lies
    # Names that say nothing: patterns, matched whole, with the reason in a comment of theirs, (?#...).
    ignore_patterns: tuple[str, ...] = ()
    # (name, name of the tensor it equals where it is missing)
    tied_keys: tuple[tuple[str, str], ...] = ()
    base_model_prefix: str = ""  # stands before all names, and is left away in files of the bare model
    inner_prefix: str = ""  # stands before the names in files where more lies around the model
    # What the names in a file say of the config.
    infer_from_keys: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    # The tensors under the table's names, with parts that lie in other files: (config, tensors, folder) -> tensors.
    prepare_tensors: Callable[[Any, CheckpointTensors, Path], CheckpointTensors] = lambda config, tensors, folder: (
        tensors
    )


def require_supported(supported: bool, found: str, allowed: str) -> None:
    """Raise UserError for a model with settings that the code here does not compute."""
    if not supported:
        raise UserError(f"this model has {found}; only {allowed} is known")


def read_hf_config(path: Path) -> dict:
    """A config.json; nothing where there is none. Raises UserError when it cannot be read."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is too large")
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} wants a JSON object")
    return settings


def token_id(hf_config: dict, name: str, default: int) -> int:
    """A token id of config.json, which may be missing, null or a list."""
    value = hf_config.get(name)
    value = value[0] if isinstance(value, list) and value else value
    return default if value is None else int(value)


def abstract_params(c: Any, mesh: Any = None) -> Params:
    """Shapes of the whole tree of a system that reads pictures and texts, and where they lie on a mesh."""
    import jax

    from lionjax.core import sharding

    side = c.vision.image
    image = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    ids, row = jax.ShapeDtypeStruct((1, 2), "int32"), jax.ShapeDtypeStruct((1,), "int32")
    batch = Batch(image, ids, ids, ids, ids, ids, ids, ids, row, row)
    return sharding.abstract_params(c.init, jax.random.key(0), batch, mesh=mesh)


def abstract_vision_params(module: Any, image_size: int, mesh: Any) -> Params:
    """Shapes of the tree of a flax module that sees one picture of so many pixels a side, and where they lie."""
    import jax

    from lionjax.core import sharding

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32")
    return sharding.abstract_params(lambda key, x: module.init(key, x)["params"], jax.random.key(0), image, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that has been recognised and opened, not read."""

    checkpoint_format: CheckpointFormat
    config: Any
    tensors: CheckpointTensors
    folder: Path | None  # where its tokenizer and settings lie
    tied: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # tensor -> those made from it
