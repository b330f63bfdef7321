# SPDX-License-Identifier: Apache-2.0
"""The command line: `lionjax VERB`. Loads nothing heavy, so that --help is fast."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    from lionjax.cli import entry

    return entry.main(argv)
