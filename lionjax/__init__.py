# SPDX-License-Identifier: Apache-2.0
"""Region-aware multimodal language models in JAX: `load` a folder and ask it about pictures.

Importing this package costs nothing: JAX and the rest come with the first thing that is used.
"""

import importlib
import sys

from lionjax.core import moved

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load"]


sys.meta_path.append(moved.Finder())


def __getattr__(name: str):
    if name == "load":
        return importlib.import_module("lionjax.inference.loading").load
    if name == "convert":
        return importlib.import_module("lionjax.convert")
    raise AttributeError(f"lionjax has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted({*globals(), *__all__})
