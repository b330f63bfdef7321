# SPDX-License-Identifier: Apache-2.0
"""`CheckpointFormat`, the description of a published checkpoint format, and `CheckpointSource`, an open checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lionjax.convert.io.key_names import check_config_not_quantized
from lionjax.convert.io.reader import MAX_HEADER_BYTES, CheckpointTensors
from lionjax.core import config as configs
from lionjax.core.files import check_downloaded
from lionjax.core.types import Batch, Params, UserError


@dataclasses.dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format: how a config and tensor names map between PyTorch and lionjax."""

    name: str
    model_types: tuple[str, ...]  # values of model_type in config.json
    matches: Callable[[Any], bool]  # whether a lionjax model config has this format
    config_from_hf: Callable[[dict], Any]  # config.json -> lionjax config
    config_to_hf: Callable[[Any], dict]  # lionjax config -> config.json
    # config -> WeightMappings; vision-language models have them as a method.
    weight_map: Callable[[Any], tuple] = lambda config: config.weight_map()
    # (config, mesh=None) -> jax.ShapeDtypeStructs, on a mesh with shardings.
    abstract_params: Callable[..., Params] = lambda config, mesh=None: abstract_vlm_params(config, mesh)
    # Regular expressions of tensor names that are skipped (full match); the report prints their comment, (?#reason).
    ignore_patterns: tuple[str, ...] = ()
    # (name, name of the tensor it is tied to): added where the file omits it.
    tied_keys: tuple[tuple[str, str], ...] = ()
    base_model_prefix: str = ""  # prefix of all names; files of the bare model omit it
    inner_prefix: str = ""  # prefix of the model's names in files of a larger model
    # (regular expression, replacement): names of other versions -> names of the weight map.
    key_patterns: tuple[tuple[str, str], ...] = ()
    # (regular expression, replacement): names of the weight map -> module names of transformers' class, for PEFT.
    module_names: tuple[tuple[str, str], ...] = ()
    # (config, tensor names) -> config with the fields that only the names determine.
    infer_from_keys: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    # (config.json, folder or file, folder of the vision tower) -> config.json with settings of other files.
    complete_config: Callable[[dict, Path, Path | None], dict] = lambda hf_config, path, vision_tower: hf_config
    # (config, tensors, folder) -> tensors under the weight map's names, with those of other files in the folder.
    prepare_tensors: Callable[[Any, CheckpointTensors, Path], CheckpointTensors] = lambda config, tensors, folder: (
        tensors
    )


def read_hf_config(path: Path) -> dict:
    """The contents of a config.json, {} where it does not exist.

    Raises UserError where it is not a JSON object, and where it describes quantized weights.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        check_downloaded(path)
        hf_config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(hf_config, dict):
        raise UserError(f"{path} holds a JSON {type(hf_config).__name__}; it must hold an object")
    if path.name == "config.json":
        check_config_not_quantized(hf_config, path, [file.name for file in path.parent.iterdir()])
    return hf_config


OWN_PREFIX = "lionjax_"  # of a model_type that transformers has no class for
SYSTEM_KEY = "system"  # the lionjax config in such a config.json


def lionjax_hf_config(c: Any, format_name: str) -> dict:
    """config.json with the lionjax config as JSON, for models that no class of transformers can describe."""
    return {"model_type": OWN_PREFIX + format_name, SYSTEM_KEY: json.loads(configs.to_json(c))}


def read_lionjax_config(hf_config: dict) -> Any:
    """The lionjax config that `lionjax_hf_config` put into a config.json."""
    return configs.from_json(json.dumps(hf_config[SYSTEM_KEY]))


def class_format(
    name: str,
    config_class: str,
    functions: tuple[Callable[[dict], Any], Callable[[Any], dict], Callable[[Any], tuple], Callable[..., Params]],
    **fields: Any,
) -> CheckpointFormat:
    """A format of the models of one config class, `config_class`.

    `functions`: config_from_hf, config_to_hf, weight_map and abstract_params; `fields`: other fields of
    CheckpointFormat.
    """
    return CheckpointFormat(name, (name,), lambda c: type(c).__name__ == config_class, *functions, **fields)


def lionjax_config_format(name: str, config_class: str, **fields: Any) -> CheckpointFormat:
    """A format of models of one config class, `config_class`, whose config.json holds the lionjax config.

    `fields`: other fields of CheckpointFormat.
    """
    defaults = {
        "config_from_hf": read_lionjax_config,
        "config_to_hf": lambda c: lionjax_hf_config(c, name),
        "matches": lambda c: type(c).__name__ == config_class,
    }
    return CheckpointFormat(name, (OWN_PREFIX + name, name), **defaults | fields)


def abstract_vlm_params(c: Any, mesh: Any) -> Params:
    """Abstract parameters (shapes, dtypes, on a mesh also shardings) of a vision-language model config."""
    import jax

    from lionjax.core import sharding

    side = c.vision.image
    image = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    ids, row = jax.ShapeDtypeStruct((1, 2), "int32"), jax.ShapeDtypeStruct((1,), "int32")
    batch = Batch(image, ids, ids, ids, ids, ids, ids, ids, row, row)
    return sharding.abstract_params(sharding.traced_init(c), jax.random.key(0), batch, mesh=mesh)


def abstract_vision_params(module: Any, image_size: int, mesh: Any) -> Params:
    """Abstract parameters of a Flax module that takes an image (1, S, S, 3), S = `image_size` pixels."""
    import jax

    from lionjax.core import sharding

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32")
    return sharding.abstract_params(lambda key, x: module.init(key, x)["params"], jax.random.key(0), image, mesh=mesh)


def abstract_language_params(module: Any, forward: Callable[[Any, Any], Any], mesh: Any) -> Params:
    """Abstract parameters of a Flax module; `forward(module, ids)` uses all of them, for token ids (1, 2)."""
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract_params(
        lambda key: module.init(key, ids, method=forward)["params"], jax.random.key(0), mesh=mesh
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that is recognized and opened; its tensors are read on access."""

    checkpoint_format: CheckpointFormat
    config: Any
    tensors: CheckpointTensors
    folder: Path | None  # of its tokenizer and settings files
    tied: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # tensor -> tied tensors that were added
