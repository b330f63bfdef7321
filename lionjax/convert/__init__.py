# SPDX-License-Identifier: Apache-2.0
"""Weights both ways: a table of rows is read from torch names to our paths, and the same table back.

In memory: `params_from_state_dict`, `state_dict_from_params`, and `sharded_params_from_state_dict` onto a mesh. Folders as a whole: `from_torch`,
`to_torch`. From folder to folder, a tensor at a time: `convert`. Numbers keep their exact bits and their
dtype. A folder in our own names holds `lionjax.json` (the config), `params.safetensors` (or shards of it)
and `origin/`, what came along from elsewhere.

Every module of the package loads this file, so it loads none: a name comes with its first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers: where each name lies
    from lionjax.convert.conversion import ResizeOptions, convert
    from lionjax.convert.coverage import ConversionReport
    from lionjax.convert.jax_folder import ORIGIN, copy_files, holds_params, load_params, open_params, save
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


# {name of version 0.1: today's}
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
    if name not in __all__:
        raise AttributeError(f"lionjax.convert has no attribute {name!r}")
    from lionjax.convert import conversion, coverage, jax_folder, torch_folder
    from lionjax.convert.mapping import apply, plan

    for home in (coverage, conversion, jax_folder, torch_folder, plan, apply):
        if name in vars(home):
            return vars(home)[name]
    raise AttributeError(f"lionjax.convert offers {name!r} and no module of it has it")


def __dir__():
    return sorted({*globals(), *__all__})
