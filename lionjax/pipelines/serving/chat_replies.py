# SPDX-License-Identifier: Apache-2.0
"""Answers of a `LiveModel` as replies of OpenAI's chat/completions, whole or in chunks, and errors as its errors."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from lionjax.core.errors import RetryError
from lionjax.core.types import UserError
from lionjax.inference.live_question import BusyError, LiveAnswer, TimeLimitError
from lionjax.pipelines.serving.answer_regions import answer_regions

STATUS_TYPES = {  # those of other statuses are invalid_request_error
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ReplyWriter:
    """Writes the reply to one request. `model`: its name."""

    def __init__(self, model: str, tags: tuple[str, ...] = ()):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.tags = list(tags)

    def whole(self, answer: LiveAnswer) -> dict[str, Any]:
        """The reply that is not streamed."""
        message = {"role": "assistant", "content": answer.answer.text, "refusal": None} | self._found(answer)
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
        """A part of a streamed reply."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self.head | {"object": "chat.completion.chunk", "choices": [choice]} | fields

    def last_chunks(self, answer: LiveAnswer, streamed: str, include_usage: bool) -> list[dict[str, Any]]:
        """The chunks that end a streamed reply: the rest of the text with its regions, and the use of tokens.

        Where the whole text does not continue what was streamed, the last delta has it as `text`.
        """
        delta = {"content": answer.rest} | self._found(answer)
        if streamed + answer.rest != answer.answer.text:
            delta["text"] = answer.answer.text
        chunks = [self.chunk(delta), self.chunk({}, answer.finish_reason)]
        if include_usage:
            last = {"object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}
            chunks.append(self.head | last)
        return chunks

    def _found(self, answer: LiveAnswer) -> dict[str, Any]:
        """The fields beside the text: `regions`, and for models that read them the `tags` and `refined` regions."""
        found: dict[str, Any] = {"regions": answer_regions(answer.answer)}
        if self.tags:
            found["tags"] = self.tags
        if (regions := answer.answer.regions) is not None:
            found["refined"] = json.loads(regions.to_json())
        return found


def usage(answer: LiveAnswer) -> dict[str, int]:
    """How many tokens a reply used."""
    prompt, completion = answer.num_prompt_tokens, answer.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_reply(status: int, message: str) -> dict[str, Any]:
    """The body of an error."""
    return {
        "error": {
            "message": message,
            "type": STATUS_TYPES.get(status, "invalid_request_error"),
            "param": None,
            "code": status,
        }
    }


def error_status(error: BaseException) -> tuple[int, str]:
    """(HTTP status, sentence) of an error; nothing of the server's inside for one that is not expected."""
    statuses = ((BusyError, 429), (TimeLimitError, 504), (RetryError, 503), (UserError, 400))
    for kind, status in statuses:
        if isinstance(error, kind):
            return status, str(error)
    return 500, f"the server failed ({type(error).__name__}); ask again, or look at its log"
