# SPDX-License-Identifier: Apache-2.0
"""The chat server in a thread of this process, on a free port of this machine."""

import base64
import contextlib
import io
import struct
import threading
import time
import zlib

import numpy as np
import uvicorn
from PIL import Image

from lionjax.inference.live import LiveModel
from lionjax.inference.live_question import LiveConfig
from lionjax.pipelines.serving.chat_server import ChatServer, ServerConfig, build_app
from lionjax.pipelines.serving.web_page import Page


@contextlib.contextmanager
def served(model, folder, live=LiveConfig(), key="", max_request_mib=2, name="small"):  # noqa: B008
    """(address, the `LiveModel`) of a model while it is served."""
    with LiveModel(model, live) as live_model, serving(live_model, folder, live, key, max_request_mib, name) as url:
        yield url, live_model


@contextlib.contextmanager
def serving(live_model, folder, live=LiveConfig(), key="", max_request_mib=20, name="small"):  # noqa: B008
    """The address at which a live model is served."""
    config = ServerConfig(name, port=0, max_request_mib=max_request_mib, live=live)
    page = Page(live_model.model, name, folder, live_model.max_new_tokens, has_key=bool(key))
    app = build_app(ChatServer(live_model, config, page, key=key))
    options = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def picture(seed=0, size=(50, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(content) -> str:
    """A data URL of an image or of bytes, called a PNG."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png_of_size(width, height) -> bytes:
    """A PNG whose header promises so many pixels; it holds few."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def messages(text, url=None, **fields):
    """One question of a user, with an image."""
    image = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return [{"role": "user", "content": [{"type": "text", "text": text}, *image], **fields}]
