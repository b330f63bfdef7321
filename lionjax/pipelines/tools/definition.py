# SPDX-License-Identifier: Apache-2.0
"""One definition of a tool: a typed function, from which its schema, its checks and its three interfaces follow."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import threading
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lionjax.core.errors import UserError
from lionjax.pipelines.completion import valid_text

log = logging.getLogger(__name__)

Image = Annotated[str, "file name of an image in the work folder, such as image/1a2b3c4d.png"]
Words = Annotated[str, "names of things between commas, such as: a red cat, a dog"]
Question = Annotated[str, "a question about the image"]
Box = Annotated[list[float], "x0, y0, x1, y1 as fractions of the image's width and height, each in 0..1"]
Boxes = Annotated[list[list[float]], "boxes, each x0, y0, x1, y1 as fractions of the image, in 0..1"]
Labels = Annotated[str, "texts to draw beside the boxes, between commas; empty for none"]

MAX_TEXT, MAX_ITEMS, MAX_NUMBER = 2000, 64, 1e9  # characters of a text, entries of a list
JSON_TYPES = {str: "string", float: "number", int: "integer", bool: "boolean"}


@dataclass(frozen=True)
class Tool:
    """A function that a language model may call.

    `description` says what it does and by which model; `cost` what a call takes. `parameters`: JSON schema.
    """

    name: str
    description: str
    cost: str
    function: Callable[..., Any]
    lock: threading.RLock

    @property
    def hints(self) -> dict[str, Any]:
        """{parameter: annotation}."""
        return {k: v for k, v in typing.get_type_hints(self.function, include_extras=True).items() if k != "return"}

    @property
    def optional(self) -> dict[str, Any]:
        """{parameter: default} of parameters that may be left out."""
        parameters = inspect.signature(self.function).parameters
        return {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        properties = {name: _schema(hint) for name, hint in self.hints.items()}
        required = [name for name in properties if name not in self.optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    @property
    def openai_schema(self) -> dict[str, Any]:
        """The tool as an entry of `tools` in OpenAI's API."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them. Raises UserError, one sentence, for those that do not fit."""
        hints = self.hints
        if unknown := [name for name in arguments if name not in hints]:
            known = ", ".join(hints) or "none"
            raise UserError(f"{self.name} has no argument {unknown[0]!r:.80}; it takes {known}")
        if missing := [name for name in hints if name not in arguments and name not in self.optional]:
            raise UserError(f"{self.name} needs the argument {missing[0]}")
        return {name: _check(value, hints[name], name) for name, value in arguments.items()}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """The result, JSON. Raises UserError, one sentence, for arguments that do not fit and for what goes wrong."""
        checked = self.check(arguments)
        with self.lock:
            try:
                return _to_json(self.function(**checked))
            except UserError:
                raise
            except Exception as error:
                log.warning("the tool %s failed: %s", self.name, type(error).__name__, exc_info=True)
                raise UserError(f"the tool {self.name} failed with an unexpected {type(error).__name__}") from error

    def call_json(self, arguments: str) -> Any:
        """As `call`, for arguments as the JSON text that a model wrote. Raises UserError if they are no JSON object."""
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"the arguments of {self.name} are no JSON; give an object") from error
        if not isinstance(parsed, dict):
            raise UserError(f"the arguments of {self.name} are a {type(parsed).__name__}; give a JSON object")
        return self.call(parsed)


def find_tool(tools: typing.Iterable[Tool], name: str) -> Tool:
    """The tool of a name. Raises UserError if there is none."""
    by_name = {tool.name: tool for tool in tools}
    if name not in by_name:
        raise UserError(f"there is no tool {name!r:.80}; use one of {', '.join(by_name)}")
    return by_name[name]


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of an annotation: a text, number, truth value or list of such, with its description."""
    if typing.get_origin(hint) is Annotated:
        inner, description = typing.get_args(hint)
        return _schema(inner) | {"description": description}
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": _schema(typing.get_args(hint)[0])}
    return {"type": JSON_TYPES[hint]}


def _check(value: Any, hint: Any, name: str) -> Any:
    """The value as the annotation has it. Raises UserError for another type, and for what is too long."""
    if typing.get_origin(hint) is Annotated:
        return _check(value, typing.get_args(hint)[0], name)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{name} is {_abbreviate(value)}; give a list of at most {MAX_ITEMS}")
        if len(value) > MAX_ITEMS:
            raise UserError(f"{name} has {len(value)} entries; give at most {MAX_ITEMS}")
        return [_check(one, typing.get_args(hint)[0], name) for one in value]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < MAX_NUMBER:  # not so for NaN
            return float(value)
        raise UserError(f"{name} has a number that is not finite or {MAX_NUMBER:.0e} and more; give a smaller one")
    elif hint is not float and type(value) is hint:
        if hint is not str or len(value) <= MAX_TEXT:
            return valid_text(value) if hint is str else value
        raise UserError(f"{name} has {len(value)} characters; give at most {MAX_TEXT}")
    raise UserError(f"{name} is {_abbreviate(value)}; give a {JSON_TYPES[hint]}")


def _to_json(result: Any) -> Any:
    """A result with its dataclasses as objects."""
    if isinstance(result, list):
        return [_to_json(one) for one in result]
    return dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result


def _abbreviate(value: Any) -> str:
    text = f"{value:.60}" if isinstance(value, str) else type(value).__name__
    return repr(text) if isinstance(value, str) else f"a {text}"
