# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between PyTorch state dicts (Hugging Face safetensors) and Flax parameters, in both directions.

One weight map (a tuple of `WeightMapping`) serves both directions; values keep their bits and their dtype.
In memory: `params_from_state_dict`, `state_dict_from_params`, `sharded_params_from_state_dict` (onto a mesh).
A folder into memory and back: `from_torch`, `to_torch`. A folder into a folder, one tensor at a time: `convert`.
A lionjax folder holds `lionjax.json` (the config), `params.safetensors` (or its shards) and `origin/` (tokenizer and
settings files copied from the source).

Names are imported lazily, because every module of the package imports this file first.
"""

import importlib
from typing import TYPE_CHECKING

from lionjax.core import moved

if TYPE_CHECKING:  # for editors and type checkers: the module of each name
    from lionjax.convert.companions import ORIGIN, copy_files, find_origin_files
    from lionjax.convert.conversion import ResizeOptions, convert
    from lionjax.convert.coverage import ConversionReport
    from lionjax.convert.jax_folder import holds_params, load_params, open_params, save
    from lionjax.convert.mapping.apply import (
        params_from_state_dict,
        sharded_params_from_state_dict,
        state_dict_from_params,
    )
    from lionjax.convert.mapping.plan import plan_params, plan_state_dict
    from lionjax.convert.torch_folder import from_torch, to_torch, weight_map_of

__all__ = [
    "ORIGIN",
    "ConversionReport",
    "ResizeOptions",
    "convert",
    "copy_files",
    "find_origin_files",
    "from_torch",
    "holds_params",
    "load_params",
    "open_params",
    "params_from_state_dict",
    "sharded_params_from_state_dict",
    "plan_params",
    "plan_state_dict",
    "save",
    "state_dict_from_params",
    "weight_map_of",
    "to_torch",
]


# {name in version 0.1: name of today}
RENAMED = {
    "Coverage": "ConversionReport",
    "Wanted": "ResizeOptions",
    "params_from": "params_from_state_dict",
    "placed_from": "sharded_params_from_state_dict",
    "plan_state": "plan_state_dict",
    "state_from": "state_dict_from_params",
    "table_of": "weight_map_of",
}


def __getattr__(name: str):
    name = RENAMED.get(name, name)
    if f"convert.{name}" in moved.MOVED:  # a module of version 0.1
        return importlib.import_module(f"lionjax.convert.{name}")
    if name not in __all__:
        raise AttributeError(f"lionjax.convert has no attribute {name!r}")
    from lionjax.convert import companions, conversion, coverage, jax_folder, torch_folder
    from lionjax.convert.mapping import apply, plan

    for home in (companions, coverage, conversion, jax_folder, torch_folder, plan, apply):
        if name in vars(home):
            return vars(home)[name]
    raise AttributeError(f"lionjax.convert lists {name!r} in __all__, but none of its modules defines it")


def __dir__():
    return sorted({*globals(), *__all__})
