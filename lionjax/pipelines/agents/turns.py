# SPDX-License-Identifier: Apache-2.0
"""What all styles of agents share: settings, the record of a turn, bounded requests and bounded observations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lionjax.core.errors import UserError, check_choices, check_ranges
from lionjax.pipelines.completion import Completion, LanguageModel, Request
from lionjax.pipelines.tools.definition import Tool, find_tool

STYLES = ("tools", "visual-chatgpt", "mm-react")
MAX_REPLY, MAX_OBSERVATION = 20_000, 8_000  # characters that are read of a reply, and given of an observation
MAX_CALLS = 32  # of tools in one turn


@dataclass(frozen=True)
class AgentConfig:
    """How a language model uses tools. Raises UserError for values out of range.

    `style`: "tools" for tool calling of OpenAI's API, or a published protocol. `max_rounds`: replies that may call
    tools in one turn; `max_tokens`: of a reply. `shows_images`: "tools" sends the images themselves too.
    `compatible`: keep what a style's released code does where ours mends it (see its module).
    """

    style: str = "tools"
    max_rounds: int = 8
    max_tokens: int = 1024
    shows_images: bool = False
    compatible: bool = False

    def __post_init__(self):
        check_choices(self, UserError, style=STYLES)
        check_ranges(self, max_rounds=">= 1 and <= 100", max_tokens=">= 1")
        if self.shows_images and self.style != "tools":
            raise UserError(f"the style {self.style} names images in its text only; leave out --show")


@dataclass(frozen=True)
class Step:
    """A call of a tool: its arguments and the observation as the language model wrote and reads them."""

    tool: str
    arguments: str
    observation: str
    is_error: bool = False


@dataclass(frozen=True)
class Turn:
    """A question with its answer and the tools used. `problem`: why there is no answer; empty if there is one."""

    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    problem: str = ""


class Agent(Protocol):
    """A conversation in which a language model uses tools."""

    def respond(self, text: str, images: Sequence[str] = ()) -> Turn:
        """The answer to a text about images of the work folder."""


class EndOfTurnError(Exception):
    """A turn ends without an answer, for the reason in the message."""


def request_reply(model: LanguageModel, request: Request) -> Completion:
    """The reply to one request, cut to a bounded length. Raises EndOfTurnError for one that is not usable."""
    (reply,) = model.complete([request])
    if reply is None:
        raise EndOfTurnError("the budget is used up")
    if not reply.is_readable:
        raise EndOfTurnError(f"the language model's reply is not readable ({reply.problem})")
    return Completion(reply.text[:MAX_REPLY], problem=reply.problem, tool_calls=reply.tool_calls)


def require_answer(text: str) -> str:
    """The text. Raises EndOfTurnError for an empty one, as of a reply that is cut behind `AI:`."""
    if not text.strip():
        raise EndOfTurnError("the language model's answer is empty")
    return text.strip()


def call_tool(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any] | str) -> tuple[Step, Any]:
    """(a call with its result as JSON text, the result), or with one sentence that begins `Error:`, and None."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    if len(written) > MAX_REPLY:
        return Step(name[:80], written[:80], f"Error: the arguments have {len(written)} characters", True), None
    try:
        tool = find_tool(tools, name)
        result = tool.call_json(arguments) if isinstance(arguments, str) else tool.call(arguments)
    except UserError as error:
        return Step(name[:80], written, f"Error: {error}"[:MAX_OBSERVATION], True), None
    return Step(name, written, json.dumps(result, ensure_ascii=False)[:MAX_OBSERVATION]), result


def run_tool(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any] | str) -> Step:
    """The step of `call_tool`."""
    return call_tool(tools, name, arguments)[0]
