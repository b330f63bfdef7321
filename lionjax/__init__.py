# SPDX-License-Identifier: Apache-2.0
"""Region-aware vision-language models in JAX: `lionjax.load(folder)` returns a model that answers prompts about images.

Importing this package is cheap: JAX and other dependencies are imported on first use.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from lionjax.core import moved

if TYPE_CHECKING:  # for type checkers and editors, as `__getattr__` imports on first use
    from lionjax import convert as convert
    from lionjax.pipelines.loading import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load"]


sys.meta_path.append(moved.Finder())


def __getattr__(name: str):
    if name == "load":
        return importlib.import_module("lionjax.pipelines.loading").load
    if name == "convert":
        return importlib.import_module("lionjax.convert")
    if name in moved.MOVED:  # a module path of an earlier version
        return importlib.import_module(f"lionjax.{name}")
    raise AttributeError(f"lionjax has no attribute {name!r}; available: {', '.join(__all__)}")


def __dir__():
    return sorted({*globals(), *__all__})
