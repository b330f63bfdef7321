# SPDX-License-Identifier: Apache-2.0
"""Compare the outputs of a converted model with those of the original PyTorch model, module by module."""

import functools

from lionjax.core import moved

__getattr__ = functools.partial(moved.find, "convert.verify")  # names that version 0.1 had here
