# SPDX-License-Identifier: Apache-2.0
"""`lionjax serve`: an HTTP server with OpenAI's chat/completions for a `LiveModel`, and the web page.

Nothing is fetched for a client, nothing that it sends is written to disk, and of this machine's files only the page and
its example images are served. Sizes, numbers and times are limited, so that no client keeps the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lionjax.core.errors import check_ranges
from lionjax.core.types import UserError
from lionjax.inference import tagger
from lionjax.inference.live import LiveModel
from lionjax.inference.live_question import BusyError, Event, LiveAnswer, LiveConfig
from lionjax.inference.loading import with_prompt_length
from lionjax.pipelines.loading import load
from lionjax.pipelines.serving import chat_requests
from lionjax.pipelines.serving.chat_replies import ReplyWriter, error_reply, error_status
from lionjax.pipelines.serving.image_tags import ImageTags
from lionjax.pipelines.serving.web_page import Page

log = logging.getLogger(__name__)

KEY_VARIABLE = "LIONJAX_API_KEY"
READ_SECONDS = 30.0  # for a request to arrive
STOP_SECONDS = 5  # for open replies when the server stops
PREPARED_AT_ONCE = 2  # questions whose images are decoded at a time, each up to processor.max_pixels
MAX_CONNECTIONS = 512


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and what it takes. Raises UserError for values out of range.

    `name`: of the model, for clients. `max_request_mib`: of a request with its images. `live`: limits of answering. The
    key, if there is to be one, is in the environment variable LIONJAX_API_KEY only.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_request_mib: int = 20
    live: LiveConfig = LiveConfig()

    def __post_init__(self):
        check_ranges(self, port=">= 0 and <= 65535", max_request_mib=">= 1")

    @property
    def max_open(self) -> int:
        """Requests that may be open, with those whose images are read."""
        return self.live.num_slots + self.live.max_waiting


class StatusError(Exception):
    """An error with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ChatServer:
    """The endpoints of one model. `key`: what clients must send as a bearer token; "": nothing."""

    def __init__(self, live: LiveModel, config: ServerConfig, page: Page, tags: ImageTags | None = None, key: str = ""):
        self.live, self.config, self.page, self.tags, self.key = live, config, page, tags, key
        self.created = int(time.time())
        self.num_open = 0
        self._preparing = asyncio.Semaphore(PREPARED_AT_ONCE)

    # ------------------------------------------------------------------ small endpoints

    async def health(self, request: Request) -> Response:
        """Whether questions are answered, and how many are open."""
        is_alive = self.live.is_alive
        content = {"status": "ok" if is_alive else "stopped", "open": self.live.num_open}
        return JSONResponse(content, 200 if is_alive else 503)

    async def models(self, request: Request) -> Response:
        """OpenAI's list of models, with the one that is served; or that one."""
        self._require_key(request)
        model = {"id": self.config.name, "object": "model", "created": self.created, "owned_by": "lionjax"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._require_name(name)
        return JSONResponse(model)

    def _require_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise StatusError(401, "the key is missing or wrong; send the server's key as a bearer token")

    def _require_name(self, name: str) -> None:
        if name != self.config.name:
            raise StatusError(404, f"there is no model {name[:80]!r}; this server has {self.config.name!r}")

    # ------------------------------------------------------------------ chat

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat/completions."""
        self._require_key(request)
        if self.num_open >= self.config.max_open:
            raise BusyError(f"{self.num_open} requests are open, and no more may be; ask again later")
        self.num_open += 1
        reply = None
        try:
            answering = _Answering(self, request, chat_requests.parse_request(await self._read_json(request)))
            self._require_name(answering.chat.model)
            async with self._preparing:
                await answering.submit()
            if not answering.chat.stream:
                return JSONResponse(await answering.whole())
            reply = await answering.streamed(self._release)
            return reply
        finally:
            if reply is None:
                self._release()

    def _release(self) -> None:
        self.num_open -= 1

    async def _read_json(self, request: Request) -> Any:
        """The body as JSON, of limited size and within READ_SECONDS."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise StatusError(415, "the request is no JSON; send it with the content type application/json")
        limit = self.config.max_request_mib * 2**20
        too_large = StatusError(413, f"the request is larger than {self.config.max_request_mib} MiB; shrink the image")
        if int(request.headers.get("content-length", "0")) > limit:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > limit:
                        raise too_large
        except TimeoutError:
            raise StatusError(408, f"the request did not arrive in {READ_SECONDS:g} s; send it again") from None
        try:
            return await asyncio.to_thread(json.loads, content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is no valid JSON: {error}") from error

    def find_tags(self, image: Any) -> tuple[str, ...]:
        """The tags that the server's tagger finds in an image; none without a tagger or an image."""
        return () if self.tags is None or image is None else self.tags.find(image)


class _StreamedReply(StreamingResponse):
    """Server-sent events; `on_end` is called however the reply ends."""

    def __init__(self, lines: AsyncIterator[str], on_end: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self.on_end = on_end

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


class _Answering:
    """One question from its submission to the last byte of its reply."""

    def __init__(self, server: ChatServer, request: Request, chat: chat_requests.ChatRequest):
        self.server, self.request, self.chat = server, request, chat
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._ticket, self._writer = None, ReplyWriter(server.config.name, chat.tags)

    async def submit(self) -> None:
        """Queue the question. Raises UserError for what cannot be asked."""
        self._ticket = await asyncio.to_thread(self._submit)
        self.chat = dataclasses.replace(self.chat, image_url="")  # as large as the request

    def _submit(self) -> Any:
        chat, live, image = self.chat, self.server.live, None
        if chat.image_url:
            image = chat_requests.open_data_url(chat.image_url, live.model.processor.config.max_pixels)
        tags = chat.tags or self.server.find_tags(image)
        self._writer = ReplyWriter(self.server.config.name, tags)
        return live.submit(chat.to_question(image, tags), self._listen)

    def _listen(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Stop answering."""
        self.server.live.cancel(self._ticket)

    async def _next_event(self) -> str | LiveAnswer:
        """The next piece or the answer; cancels where the client has left. Raises what the answering raises."""
        tasks = [asyncio.ensure_future(self._events.get()), asyncio.ensure_future(self._disconnected())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                raise StatusError(408, "the client has left")
            event = tasks[0].result()
        except BaseException:
            self.cancel()
            raise
        finally:
            for task in tasks:
                task.cancel()
        if isinstance(event, Exception):
            raise event
        return event

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def whole(self) -> dict[str, Any]:
        """The whole reply."""
        while isinstance(event := await self._next_event(), str):
            pass
        return self._writer.whole(event)

    async def streamed(self, release: Callable[[], None]) -> Response:
        """The reply as server-sent events, once there is something to send. `release` is called at its end."""
        first = await self._next_event()

        def on_end() -> None:
            self.cancel()
            release()

        return _StreamedReply(self._lines(first), on_end)

    async def _lines(self, event: Event) -> AsyncIterator[str]:
        streamed = ""
        yield _line(self._writer.chunk({"role": "assistant", "content": ""}))
        while isinstance(event, str):
            streamed += event
            yield _line(self._writer.chunk({"content": event}))
            event = await self._events.get()
        if isinstance(event, LiveAnswer):
            for chunk in self._writer.last_chunks(event, streamed, self.chat.include_usage):
                yield _line(chunk)
        else:
            yield _line(error_reply(*error_status(event)))
        yield "data: [DONE]\n\n"


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def build_app(server: ChatServer) -> Starlette:
    """The server as an ASGI application."""

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            status, message = error.status_code, f"{request.method} {request.url.path[:80]} is not served here"
        elif isinstance(error, StatusError):
            status, message = error.status, str(error)
        else:
            status, message = error_status(error)
        headers = {429: {"retry-after": "1"}, 504: {"x-should-retry": "false"}}.get(status)
        return JSONResponse(error_reply(status, message), status, headers=headers)

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        *server.page.routes(),
    ]
    errors = dict.fromkeys((HTTPException, StatusError, UserError, Exception), on_error)
    return Starlette(routes=routes, exception_handlers=errors)


def require_free_port(host: str, port: int) -> None:
    """Raise UserError where nothing can listen at an address."""
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot serve at {host}:{port} ({error.strerror}); choose another --port") from error


def serve(
    folder: Path,
    config: ServerConfig,
    tagger_folder: Path | None = None,
    prompt_length: int = 256,
    refiner_folder: Path | None = None,
    int8: bool = False,
) -> None:
    """Load a model and serve it until Ctrl-C.

    `prompt_length` is the maximum number of prompt tokens including previous turns; a longer training length is used
    instead. Raises UserError if the port is taken.
    """
    require_free_port(config.host, config.port)  # before the slow model load
    model = load(folder, refiner=refiner_folder, int8=int8)
    model = with_prompt_length(model, max(prompt_length, model.processor.config.max_prompt_tokens))
    tags = None if tagger_folder is None else ImageTags(tagger.load(tagger_folder))
    with LiveModel(model, config.live) as live:
        print("compiling the programs of the model", file=sys.stderr)
        live.warm_up()
        key = os.environ.get(KEY_VARIABLE, "")
        page = Page(model, config.name, folder, live.max_new_tokens, has_tagger=tags is not None, has_key=bool(key))
        server = ChatServer(live, config, page, tags, key)
        options = uvicorn.Config(
            build_app(server),
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        address = f"http://{config.host}:{config.port}"
        print(f"{address} serves {folder}, {address}/v1 as OpenAI's API; press Ctrl-C to stop", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(options).run()
