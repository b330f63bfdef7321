# SPDX-License-Identifier: Apache-2.0
"""The interface between methods that continue text and the language models that do: an endpoint or a loaded model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from lionjax.core.errors import UserError

Message = Mapping[str, Any]  # of a conversation, as OpenAI's API has it: role, content, tool_calls, tool_call_id


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Settings of a continuation.

    `stop`: texts before which the continuation ends. `sample`: number of the sample where one prompt is continued
    several times. `may_be_cut`: a continuation that reaches `max_tokens` counts as an answer; else it is unreadable.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    sample: int = 0
    may_be_cut: bool = False


@dataclass(frozen=True)
class CompletionRequest(Continuation):
    """A prompt to continue."""

    prompt: str

    tools = ()
    needs_log_probs = True

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation of one message."""
        return ({"role": "user", "content": self.prompt},)


@dataclass(frozen=True)
class ChatRequest(Continuation):
    """A conversation to continue. `tools`: OpenAI's schemas of callable functions.

    `text`: the conversation as models read it that only continue text; empty: one line for each role.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""

    needs_log_probs = False

    @property
    def prompt(self) -> str:
        """The conversation as one text, for models without roles, that ends where the next message begins."""
        if self.text:
            return self.text
        lines = [f"{one['role']}: {one.get('content') or ''}" for one in self.messages]
        return "\n\n".join([*lines, "assistant:"])

    @property
    def completion(self) -> CompletionRequest:
        """The request for models that only continue text. Raises UserError for one with tools."""
        if self.tools:
            raise UserError(
                "this model cannot call tools by itself; use an endpoint with --api chat, or --style visual-chatgpt"
            )
        stop = self.stop or ("\nuser:",)
        settings = {field.name: getattr(self, field.name) for field in fields(Continuation)}
        return CompletionRequest(self.prompt, **settings | {"stop": stop})


Request = CompletionRequest | ChatRequest


@dataclass(frozen=True)
class ToolCall:
    """A function that a reply calls, with its arguments as JSON text; nothing of it is checked."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Completion:
    """A continuation. `token_log_probs` are those of `tokens`; both are empty where the server gives none.

    `problem`: why there is no usable text, such as "length" or "content_filter"; empty for a usable one.
    """

    text: str
    tokens: tuple[str, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    problem: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def is_readable(self) -> bool:
        return not self.problem


class LanguageModel(Protocol):
    """A language model that continues prompts and is not trained."""

    def complete(self, requests: Sequence[Request]) -> list[Completion | None]:
        """The continuation of each request in the order of the requests; None: not asked, as a budget is used up."""

    def describe(self) -> dict:
        """What report.json says of the model and of its use so far."""


def valid_text(text: str) -> str:
    """The text with halves of surrogate pairs joined and lone ones, which no encoding of files has, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def valid_texts(tree: Any) -> Any:
    """A tree of dicts, lists and tuples with `valid_text` of all texts in it."""
    if isinstance(tree, Mapping):
        return {valid_text(name): valid_texts(part) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [valid_texts(part) for part in tree]
    return valid_text(tree) if isinstance(tree, str) else tree


def num_characters(request: Request) -> int:
    """The length of what a model reads: the conversation, calls in it and the schemas of its tools."""
    calls = [one["tool_calls"] for one in request.messages if one.get("tool_calls")]
    return len(request.prompt) + sum(len(json.dumps(part)) for part in (*calls, *request.tools))
