# SPDX-License-Identifier: Apache-2.0
"""The command line: `lionjax VERB`. Loads nothing heavy, so that --help is fast."""

import functools
from collections.abc import Sequence

from lionjax.core import moved

__getattr__ = functools.partial(moved.find, "cli")  # names that version 0.1 had here


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    from lionjax.cli import entry

    return entry.main(argv)
