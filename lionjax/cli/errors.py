# SPDX-License-Identifier: Apache-2.0
"""Command-line errors: usage errors, one-sentence explanations, and exit codes."""

from __future__ import annotations

import argparse
import errno
import os


class UsageError(Exception):
    """A command line that cannot be read. UserError's module imports JAX, too slow for --help."""


class StrictParser(argparse.ArgumentParser):
    """argparse that raises its errors and takes no abbreviations, which could hide a field."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message}; see `{self.prog} --help`")


def describe_error(error: BaseException) -> tuple[str, int]:
    """(what to say, exit code) of an exception."""
    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130
    from lionjax.core.types import UserError

    if isinstance(error, UserError):
        return str(error), 2
    lines = str(error).strip().splitlines() or ["no message"]
    if is_disk_full(error):
        return f"the disk is full ({lines[0]}); make room and give the same command again", 2
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}", 2
    more = "" if os.environ.get("LIONJAX_TRACEBACK") else "; set LIONJAX_TRACEBACK=1 for the traceback"
    return f"unexpected {type(error).__name__}: {lines[0]}{more}", 1


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that no space is left, by its number or its text."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
