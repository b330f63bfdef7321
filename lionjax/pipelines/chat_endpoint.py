# SPDX-License-Identifier: Apache-2.0
"""A language model behind an OpenAI-compatible endpoint, asked once for each question (extra `lionjax[llm]`).

Replies are kept in a journal under a key of what was asked, so that a run that stopped continues without paying twice,
and a changed question is asked again. The API key is read from OPENAI_API_KEY only and written nowhere.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lionjax.core.errors import RetryError, UserError, check_choices, check_ranges
from lionjax.core.journal import Journal, journal_key
from lionjax.pipelines.completion import Completion, Request, ToolCall, num_characters, valid_text, valid_texts

log = logging.getLogger(__name__)

APIS = ("chat", "completions")
URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
MIN_KEY_LENGTH = 8
BYTES_PER_TOKEN = 4  # of English text, for estimates
MAX_MALFORMED = 2  # replies that are no completion, one after the other, before a run stops
TOO_LONG = re.compile(r"context.{0,20}(length|size|window)|maximum.{0,20}(length|tokens)|too (long|many tokens)", re.I)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """An endpoint and how it is asked. Raises UserError for a value that is not possible.

    - `model`: the name that the server knows; `url`: of the API, as in http://127.0.0.1:8000/v1 (default:
      $OPENAI_BASE_URL).
    - `api`: "chat" for chat/completions, "completions" for base models, which continue the prompt itself.
    - `at_once`: requests in flight; `max_retries`: of one request after 408, 409, 429, 5xx and lost connections.
    - `budget`: maximum number of tokens, of prompts and replies, that a run may use; None: no limit.
    """

    model: str
    url: str = ""
    api: str = "chat"
    at_once: int = 4
    max_retries: int = 8
    timeout_seconds: float = 600.0
    budget: int | None = None

    def __post_init__(self):
        check_choices(self, UserError, api=APIS)
        check_ranges(self, at_once=">= 1", max_retries=">= 0", timeout_seconds="> 0")
        if self.budget is not None:
            check_ranges(self, budget=">= 1")
        if not self.model:
            raise UserError("the endpoint has no model; give the name of one that the server has")
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UserError(
                f"the endpoint is {self.base_url!r}; give a URL as http://127.0.0.1:8000/v1 or set {URL_VARIABLE}"
            )

    @property
    def base_url(self) -> str:
        """The URL of the API."""
        return self.url or os.environ.get(URL_VARIABLE, "")

    @property
    def host(self) -> str:
        """Host and port of the URL, without user name and password."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2]


@dataclasses.dataclass
class Usage:
    """What a run has asked for. `num_estimated`: replies whose tokens the server did not count."""

    num_asked: int = 0
    num_from_journal: int = 0
    num_unreadable: int = 0
    num_refused: int = 0
    num_without_log_probs: int = 0
    num_over_budget: int = 0
    num_estimated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MalformedReplyError(Exception):
    """A reply of a server that is not a completion."""


class ChatEndpoint:
    """A `LanguageModel` behind an endpoint. `journal` is the file of the replies."""

    def __init__(self, config: EndpointConfig, journal: Path, count_tokens: Callable[[str], int] | None = None):
        self.config, self.journal, self.count_tokens = config, Journal(journal), count_tokens or estimate
        self.usage, self.created = Usage(), None
        self._lock, self._client = threading.Lock(), None
        self._reserved_tokens = 0
        self._asks_log_probs = True

    def key(self, request: Request) -> str:
        """The journal's key of a request to this model; not of the endpoint, which may move."""
        asked = dataclasses.asdict(request)
        del asked["may_be_cut"]  # what we make of a reply, not what is asked
        return journal_key({"api": self.config.api, "model": self.config.model, **asked})

    def pending(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that the journal has no reply to, each once."""
        return list({self.key(r): r for r in requests if self.journal.get(self.key(r)) is None}.values())

    def max_tokens_of(self, request: Request) -> int:
        """An estimate of the tokens that a request may use: prompt and longest reply."""
        return max_tokens_of(request, self.count_tokens)

    def complete(self, requests: Sequence[Request]) -> list[Completion | None]:
        """The reply to each request in order, `at_once` in flight; those in the journal are not asked for again.

        None for those that the budget leaves out. Raises UserError for what asking again does not mend (no such
        endpoint or model, no permission, an invalid request) and RetryError where the server stays overloaded or out of
        reach; replies until then are in the journal.
        """
        require_openai()
        pending, run = self.pending(requests), _Run()
        refused: dict[str, Completion] = {}

        def work(request: Request) -> None:
            if run.is_over or not self._reserve(request, run):
                return
            try:
                reply = self._request(request)
            except Exception as error:  # raised below, when the other requests in flight are in the journal
                run.stop(error)
                return
            finally:
                self._release(request)
            if "key" not in reply:
                refused[self.key(request)] = Completion("", problem=reply["problem"])

        with ThreadPoolExecutor(self.config.at_once) as pool:
            try:
                list(pool.map(work, pending))
            except BaseException as error:
                run.stop(error)  # Ctrl-C: only what is in flight ends
                raise
        if run.error is not None:
            self._raise(run.error)
        if run.is_over_budget:
            log.warning(
                "the budget of %d tokens is used up; the remaining questions were not asked", self.config.budget
            )
        replies = [self._completion(request, refused) for request in requests]
        self._count(requests, replies, len(requests) - len(pending))
        return replies

    def _reserve(self, request: Request, run: _Run) -> bool:
        """Whether the budget has room for a request, beside those in flight; if not, the run asks nothing further."""
        with self._lock:
            used = self.usage.prompt_tokens + self.usage.completion_tokens + self._reserved_tokens
            needed = self.max_tokens_of(request)
            if self.config.budget is not None and used + needed > self.config.budget:
                run.is_over_budget = True
                return False
            self._reserved_tokens += needed
            return True

    def _release(self, request: Request) -> None:
        with self._lock:
            self._reserved_tokens -= self.max_tokens_of(request)

    def _request(self, request: Request) -> dict[str, Any]:
        """Ask the server; the journal's row of the reply, or {"problem": reason} for a request that it refuses."""
        import openai

        began, num_malformed = time.monotonic(), 0
        while True:
            with_log_probs = self._asks_log_probs and request.needs_log_probs
            try:
                row = self._parse(self._send(request, with_log_probs), request)
                break
            except openai.BadRequestError as error:
                if problem := _refusal(error):
                    return {"problem": problem}
                if not (with_log_probs and "logprob" in error.message.lower()):
                    raise
                self._asks_log_probs = False
            except (MalformedReplyError, openai.APIResponseValidationError, json.JSONDecodeError) as error:
                num_malformed += 1
                if num_malformed > MAX_MALFORMED:
                    raise MalformedReplyError(redact(str(error))) from error
        row["seconds"] = round(time.monotonic() - began, 3)
        return self.journal.add(self.key(request), row)

    def _send(self, request: Request, with_log_probs: bool) -> Any:
        """The server's reply, as the openai package reads it. Raises that package's errors."""
        client, is_chat = self._open_client(), self.config.api == "chat"
        fields: dict[str, Any] = {
            "model": self.config.model,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        fields |= {"stop": list(request.stop)} if request.stop else {}
        fields |= {"logprobs": True if is_chat else 1} if with_log_probs else {}
        if not is_chat:
            return client.completions.create(prompt=valid_text(request.prompt), **fields)
        fields |= {"tools": list(request.tools)} if request.tools else {}
        return client.chat.completions.create(messages=valid_texts(request.messages), **fields)

    def _open_client(self) -> Any:
        import openai

        with self._lock:
            if self._client is None:
                c = self.config
                self._client = openai.OpenAI(
                    api_key=api_key() or "none",
                    base_url=c.base_url,
                    max_retries=c.max_retries,
                    timeout=c.timeout_seconds,
                )
            return self._client

    def _parse(self, reply: Any, request: Request) -> dict[str, Any]:
        """The journal's row of a reply. Raises MalformedReplyError for one that is not a completion."""
        try:
            choice = reply.choices[0]
            is_chat = self.config.api == "chat"
            text = _read_content(choice.message.content) if is_chat else choice.text
            refusal = getattr(choice.message, "refusal", None) if is_chat else None
            calls = _read_tool_calls(choice.message) if is_chat else []
            reason = choice.finish_reason or "stop"
        except (AttributeError, IndexError, TypeError) as error:
            raise MalformedReplyError(f"{_redacted_start(reply)!r}") from error
        if not (isinstance(text, str | None) and isinstance(reason, str)):
            raise MalformedReplyError(f"{_redacted_start(text)!r}, finish_reason {_redacted_start(reason)!r}")
        tokens, log_probs = _read_log_probs(choice, is_chat)
        usage = getattr(reply, "usage", None)
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        is_counted = all(isinstance(count, int) and count >= 0 for count in counts)
        if not is_counted:
            counts = [self.count_tokens(request.prompt), self.count_tokens(text or "")]
        with self._lock:
            created = getattr(reply, "created", None)
            self.created = created if isinstance(created, int) else self.created
            self.usage.num_asked += 1
            self.usage.num_estimated += not is_counted
            self.usage.prompt_tokens += counts[0]
            self.usage.completion_tokens += counts[1]
        is_refusal = refusal or (text is None and not calls)
        row = {
            "text": redact(text or ""),
            "tokens": list(map(redact, tokens)),
            "token_log_probs": log_probs,
            "finish_reason": "refusal" if is_refusal else redact(reason),
            "prompt_tokens": counts[0],
            "completion_tokens": counts[1],
        }
        return row | ({"tool_calls": [list(map(redact, call)) for call in calls]} if calls else {})

    def _completion(self, request: Request, refused: dict[str, Completion]) -> Completion | None:
        """The journal's reply to a request, or that it was refused; None if it was not asked."""
        if (row := self.journal.get(self.key(request))) is None:
            return refused.get(self.key(request))
        reason = row["finish_reason"]
        usable = ("stop", "length") if request.may_be_cut else ("stop",)
        calls = tuple(ToolCall(*call) for call in row.get("tool_calls", ()))
        problem = "" if reason in usable or (calls and reason == "tool_calls") else reason
        return Completion(row["text"], tuple(row["tokens"]), tuple(row["token_log_probs"]), problem, calls)

    def _count(self, requests: Sequence[Request], replies: Sequence[Completion | None], num_from_journal: int) -> None:
        usage = self.usage
        usage.num_from_journal += num_from_journal
        usage.num_over_budget += sum(reply is None for reply in replies)
        usage.num_refused += sum(reply is not None and reply.problem.startswith("refused") for reply in replies)
        usage.num_unreadable += sum(
            reply is not None and bool(reply.problem) and not reply.problem.startswith("refused") for reply in replies
        )
        asked = [reply for request, reply in zip(requests, replies) if request.needs_log_probs]
        without = sum(reply is not None and reply.is_readable and not reply.token_log_probs for reply in asked)
        if without and not usage.num_without_log_probs:
            log.warning("%s gives no log-probabilities with its replies", self.config.host)
        usage.num_without_log_probs += without

    def describe(self) -> dict[str, Any]:
        """Host, model, settings and use, for report.json; nothing secret."""
        c = self.config
        return {"endpoint": c.host, "model": c.model, "api": c.api, "created": self.created} | vars(self.usage)

    def _raise(self, error: BaseException) -> None:
        """Raise an error of a request as one sentence that says what mends it."""
        import openai

        c, where = self.config, f"{self.config.host} with model {self.config.model!r}"
        kept = f"{len(self.journal)} replies are kept in {self.journal.path}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            raise UserError(f"{where} refuses the key (status {error.status_code}); set {KEY_VARIABLE}") from error
        if isinstance(error, openai.NotFoundError):
            raise UserError(f"{where} is not there (status 404); check the endpoint's URL and --model") from error
        if isinstance(error, MalformedReplyError):
            raise UserError(
                f"{where} answers what is no completion ({error}); check that the URL is that of the API, which often "
                "ends in /v1"
            ) from error
        if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
            raise UserError(f"the account at {where} has no quota left; {kept}") from error
        if isinstance(error, openai.APITimeoutError):
            reason = f"does not answer in {c.timeout_seconds:g} seconds"
        elif isinstance(error, openai.APIConnectionError):
            reason = "is out of reach"
        elif isinstance(error, openai.APIStatusError) and (error.status_code in (408, 409, 429) or _is_server(error)):
            reason = f"still answers with status {error.status_code}"
        elif isinstance(error, openai.APIStatusError):
            message = redact(" ".join(str(error.message).split()))[:200]
            raise UserError(f"{where} does not take the request (status {error.status_code}): {message}") from error
        else:
            raise error
        raise RetryError(
            f"{where} {reason} after {c.max_retries} retries; {kept}, and the same command continues there"
        ) from error


@dataclasses.dataclass
class _Run:
    """State that the threads of one `complete` share."""

    error: BaseException | None = None
    is_over_budget: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_over_budget or self.error is not None

    def stop(self, error: BaseException) -> None:
        """Ask nothing further; the first error counts."""
        self.error = self.error or error


def api_key() -> str:
    """The key of the API from the environment; "" where none is set."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def redact(text: str) -> str:
    """What a server sent, with the key as stars where it sends it back; keys that are too short to be one stay.

    Lone surrogates, which a reply may have and no file, are replaced.
    """
    key, text = api_key(), valid_text(text)
    return text.replace(key, "***") if len(key) >= MIN_KEY_LENGTH else text


def _redacted_start(reply: object) -> str:
    """The first words of what a server sent."""
    return redact(str(reply))[:60]


def estimate(text: str) -> int:
    """About the number of tokens of an English text."""
    return -(-len(valid_text(text).encode()) // BYTES_PER_TOKEN)


def max_tokens_of(request: Request, count_tokens: Callable[[str], int] = estimate) -> int:
    """An estimate of the tokens that a request uses at most: its prompt with calls and tools, and the longest reply."""
    further = num_characters(request) - len(request.prompt)
    return count_tokens(request.prompt) + -(-further // BYTES_PER_TOKEN) + request.max_tokens


def require_openai() -> None:
    """Raise UserError if the openai package is not installed."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError("an endpoint needs the openai package; install it with pip install 'lionjax[llm]'") from error


def _is_server(error: Any) -> bool:
    return error.status_code >= 500


def _refusal(error: Any) -> str:
    """Why a server refuses one request and may answer others; "" where it would refuse every one."""
    if error.code == "content_filter":
        return "refused: content_filter"
    is_too_long = error.code == "context_length_exceeded" or TOO_LONG.search(str(error.message))
    return "refused: too long" if is_too_long else ""


def _read_log_probs(choice: Any, is_chat: bool) -> tuple[list[str], list[float]]:
    """(tokens, their log-probabilities) of a reply; both empty unless the server gives one for every token."""
    found = getattr(choice, "logprobs", None)
    if is_chat:
        pairs = [(item.token, item.logprob) for item in getattr(found, "content", None) or ()]
    else:
        pairs = list(zip(getattr(found, "tokens", None) or (), getattr(found, "token_logprobs", None) or ()))
    if not all(isinstance(token, str) and isinstance(value, int | float) for token, value in pairs):
        return [], []
    return [token for token, _ in pairs], [float(value) for _, value in pairs]


def _read_content(content: object) -> object:
    """A content's text; that of its parts of type text, joined, where a server sends parts."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content


def _read_tool_calls(message: Any) -> list[list[str]]:
    """[id, name, arguments] of each function that a message calls; other kinds of calls are passed over."""
    found = []
    for call in getattr(message, "tool_calls", None) or ():
        function = getattr(call, "function", None)
        parts = [getattr(call, "id", ""), getattr(function, "name", None), getattr(function, "arguments", "")]
        if isinstance(parts[1], str):
            found.append([part if isinstance(part, str) else json.dumps(part, default=str) for part in parts])
    return found
