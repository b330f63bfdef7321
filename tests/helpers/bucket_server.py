# SPDX-License-Identifier: Apache-2.0
"""A small Google Cloud Storage on the loopback address: objects of one bucket in memory, by its JSON API.

A bucket "private" is refused, and "broken" answers that it is unavailable.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class Handler(BaseHTTPRequestHandler):
    """`objects`: {name: (bytes, generation)} of the bucket. `requests`: (method, object or prefix, range) so far.

    `refusal(method, name)`: the status and text with which a request is refused, or None; "" is the name of a list.
    """

    objects: dict[str, tuple[bytes, int]]
    requests: list[tuple[str, str, str]]
    refusal: Callable[[str, str], tuple[int, bytes] | None]
    generations = itertools.count(1000)  # an object that is deleted and made again has another one
    one_at_a_time = threading.Lock()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # head and body in one packet: else each reply waits for 40 ms

    def log_message(self, *_):
        pass

    def do_GET(self):
        url, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        match = re.fullmatch(rf"/storage/v1/b/{BUCKET}/o(?:/(.+))?", url.path)
        name = unquote(match[1] or "") if match else ""
        if status := {"private": 403, "broken": 503}.get(url.path.split("/")[4], 0):
            return self.reply(status, b"{}")
        if refused := self.refusal("GET", name):
            return self.reply(*refused)
        self.requests.append(("GET", name or query.get("prefix", [""])[0], self.headers.get("Range", "")))
        if not match or (name and name not in self.objects):
            return self.reply(404, b"{}")
        if not name:
            start, end = (query.get(key, [""])[0] for key in ("startOffset", "endOffset"))
            names = [name for name in sorted(self.objects) if name.startswith(query.get("prefix", [""])[0])]
            names = [name for name in names if start <= name and (not end or name < end)]
            rows = [self.metadata(name) for name in names]
            return self.reply(200, json.dumps({"kind": "storage#objects", "items": rows}).encode())
        if query.get("alt") != ["media"]:
            return self.reply(200, json.dumps(self.metadata(name)).encode())
        content, generation = self.objects[name]
        if query.get("ifGenerationNotMatch") == [str(generation)]:
            return self.reply(304, b"", generation)
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            if start >= len(content):
                return self.reply(416, b"")
            part = content[start : end + 1]
            return self.reply(206, part, generation, f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.reply(200, content, generation)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        name = query["name"][0]
        if refused := self.refusal("POST", name):
            return self.reply(*refused)
        if url.path.split("/")[5] != BUCKET:
            return self.reply(404, b'{"error": {"message": "The specified bucket does not exist."}}')
        self.requests.append(("POST", name, ""))
        with self.one_at_a_time:
            if not self.is_expected(name, query):
                return self.reply(412, b"{}")
            self.objects[name] = (body, next(self.generations))
            self.reply(200, json.dumps(self.metadata(name)).encode())

    def do_DELETE(self):
        url, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        name = unquote(url.path.split("/o/")[1])
        if refused := self.refusal("DELETE", name):
            return self.reply(*refused)
        self.requests.append(("DELETE", name, ""))
        with self.one_at_a_time:
            if not self.is_expected(name, query):
                return self.reply(412, b"{}")
            self.reply(404 if self.objects.pop(name, None) is None else 204, b"")

    def is_expected(self, name: str, query: dict) -> bool:
        expected = query.get("ifGenerationMatch", [""])[0]
        return not expected or int(expected) == self.objects.get(name, (b"", 0))[1]

    def metadata(self, name: str) -> dict:
        content, generation = self.objects[name]
        return {"kind": "storage#object", "name": name, "size": str(len(content)), "generation": str(generation)}

    def reply(self, status: int, content: bytes, generation: int | None = None, content_range: str = "") -> None:
        self.send_response(status)
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running_bucket() -> Iterator[tuple[str, type[Handler]]]:
    """(address, handler with the bucket's objects and requests) of a server that runs within the context."""
    fields = {"objects": {}, "requests": [], "refusal": staticmethod(lambda method, name: None)}
    handler = type("BucketHandler", (Handler,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
