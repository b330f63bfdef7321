# SPDX-License-Identifier: Apache-2.0
"""Errors that are one sentence for the user. Imports only small modules, so that the command line starts fast."""

import math
import operator
from collections.abc import Iterator

OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
# Modules of the extras in pyproject.toml.
EXTRA_MODULES = {
    "data": ("grain", "array_record", "tensorflow_datasets", "pyarrow"),
    "torch": ("torch", "transformers"),
    "tpu": ("libtpu",),
    "prepare": ("apache_beam",),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "serve": ("starlette", "uvicorn"),
    "demo": ("gradio",),
    "llm": ("openai",),
    "mcp": ("mcp",),
    "opencv": ("cv2",),
    "xlsx": ("openpyxl",),
}
DTYPES = ("float32", "bfloat16", "float16")  # of parameters and of the computation


class UserError(Exception):
    """A mistake that the user can fix: one clear sentence, shown without a traceback, exit code 2."""

    exit_code = 2  # launchers do not start the command again


class RetryError(UserError):
    """A failure that the same command may not have the next time, such as a host that does not answer: exit code 75."""

    exit_code = 75  # launchers start the command again


class LongPromptError(UserError):
    """A prompt of more tokens than the model reads; other prompts can still be asked."""


def missing_module(error: ModuleNotFoundError, purpose: str = "this") -> UserError:
    """What a user is told who lacks a module: the command that installs its extra, which `purpose` needs."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRA_MODULES.items() if module in modules), None)
    package = module if extra is None else f"lionjax[{extra}]"
    return UserError(f"{purpose} needs {module}, which is not installed; run `pip install '{package}'`")


def check_choices(config, error: type[Exception] = ValueError, /, **choices) -> None:
    """Raise `error` for a field of `config` whose value is not among its `choices`, {field: allowed values}."""
    for field, allowed in choices.items():
        value = getattr(config, field)
        if value not in allowed:
            raise error(f"{field} is {value!r}; it can be one of {', '.join(map(str, allowed))}")


def check_ranges(config, where: str = "", **ranges: str) -> None:
    """Raise UserError for a field with a number out of its range, {field: range}, and for NaN and infinity.

    A range is a text such as ">= 0" or ">= 0 and < 1". Of a tuple every number is checked; None has no range. `where`
    precedes the field's name in the message.
    """
    for field, text in ranges.items():
        value = getattr(config, field)
        bounds = [bound.split() for bound in text.split(" and ")]
        for number in _numbers(value):
            if not (math.isfinite(number) and all(OPERATORS[sign](number, float(end)) for sign, end in bounds)):
                raise UserError(f"{where}{field} is {value!r}; give a finite number {text}")


def check_finite(config, where: str = "") -> None:
    """Raise UserError for a field of `config` that is or holds NaN or infinity."""
    for field, value in vars(config).items():
        if not all(math.isfinite(number) for number in _numbers(value)):
            raise UserError(f"{where}{field} is {value!r}; give finite numbers")


def check_dtype(config, field: str, where: str = "") -> None:
    """Raise UserError if a field of `config` is not the name of a dtype that parameters can have."""
    value = getattr(config, field)
    if value not in DTYPES:
        raise UserError(f"{where}{field} is {value!r}; choose one of {', '.join(DTYPES)}")


def _numbers(value) -> Iterator[int | float]:
    """All numbers in a value: itself, or those in a tuple or list and in the ones inside it."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
