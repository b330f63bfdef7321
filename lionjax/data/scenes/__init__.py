# SPDX-License-Identifier: Apache-2.0
"""The synthetic scenes: colored shapes with exact boxes, masks and answers."""

import functools

from lionjax.core import moved

__getattr__ = functools.partial(moved.find, "data.scenes")  # names that version 0.1 had here
