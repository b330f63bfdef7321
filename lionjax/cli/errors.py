# SPDX-License-Identifier: Apache-2.0
"""Command-line errors: usage errors, one-sentence explanations, and exit codes."""

from __future__ import annotations

import argparse
import os

from lionjax.core.errors import UserError, missing_module
from lionjax.core.files import is_disk_full


class UsageError(Exception):
    """An invalid command line. Not a UserError, whose module imports JAX and would slow down --help."""


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and accepts no abbreviated flags, which could hide a config field."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message}; see `{self.prog} --help`")


def describe_error(error: BaseException) -> tuple[str, int]:
    """The (message, exit code) of an exception."""
    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lionjax"):
        return str(missing_module(error)), 2
    lines = str(error).strip().splitlines() or ["no message"]
    if is_disk_full(error):
        return f"the disk is full ({lines[0]}); free some space and run the same command again", 2
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}", 2
    hint = "" if os.environ.get("LIONJAX_TRACEBACK") else "; set LIONJAX_TRACEBACK=1 for the traceback"
    return f"unexpected {type(error).__name__}: {lines[0]}{hint}", 1


def positive_int(text: str) -> int:
    """An integer above 0 from the command line. Raises ArgumentTypeError for anything else."""
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)
