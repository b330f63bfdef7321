# SPDX-License-Identifier: Apache-2.0
"""Errors that are one sentence for the user. Imports nothing, so that the command line starts fast."""


class UserError(Exception):
    """A mistake that the user can fix: one clear sentence, shown without a traceback, exit code 2."""

    exit_code = 2  # launchers do not start the command again


class RetryError(UserError):
    """A failure that the same command may not have the next time, such as a host that does not answer: exit code 75."""

    exit_code = 75  # launchers start the command again


def check_choices(config, **choices) -> None:
    """Raise ValueError for a field of `config` whose value is not among its `choices`, {field: allowed values}."""
    for field, allowed in choices.items():
        value = getattr(config, field)
        if value not in allowed:
            raise ValueError(f"{field} is {value!r}; it can be one of {', '.join(map(str, allowed))}")
