# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a run: curves, tables and answers."""

import functools

from lionjax.core import moved

__getattr__ = functools.partial(moved.find, "evaluation.report")  # names that version 0.1 had here
