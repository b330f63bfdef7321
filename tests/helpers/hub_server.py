# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on the loopback address: repositories in memory, downloads with ranges, commits."""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Hub:
    """`files`: {repository: {path: bytes}}, data sets as "datasets/ORG/NAME". `requests`: (method, path) so far.

    `private`: repositories that want the token. `cut_after`: bytes after which the next download breaks off, or None.
    """

    def __init__(self):
        self.files, self.requests, self.private, self.cut_after, self.url = {}, [], set(), None, ""
        self.ranges: list[str] = []

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        parts = path.split("/")
        if path == "api/repos/create":
            row = json.loads(body)
            name = f"{row['organization']}/{row['name']}" if row.get("organization") else row["name"]
            if not has_token:
                return self.error(401, "no token")
            hub.files.setdefault(name, {})
            return self.json({"url": f"{hub.url}/{name}", "id": name})
        if path == "api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        is_api = parts[0] == "api"
        kind, rest = ("models", parts) if not is_api else (parts[1], parts[2:])
        if not is_api and parts[0] == "datasets":
            kind, rest = "datasets", parts[1:]
        repo = ("datasets/" if kind == "datasets" else "") + "/".join(rest[:2])
        if repo not in hub.files or (repo in hub.private and not has_token):
            return self.error(401, "no such repository", "RepoNotFound")
        action, revision, *file = [*rest[2:4], *("revision", "main")[len(rest[2:4]) :], *rest[4:]]
        if revision not in ("main", hub.sha(repo)):
            return self.error(404, "no such revision", "RevisionNotFound")
        if action == "revision":
            siblings = [{"rfilename": name} for name in hub.files[repo]]
            return self.json({"id": "/".join(rest[:2]), "sha": hub.sha(repo), "siblings": siblings})
        if action == "tree":
            return self.json(
                [{"type": "file", "path": k, "size": len(v), "oid": ""} for k, v in hub.files[repo].items()]
            )
        if action == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.json({"files": [{"path": row["path"]} | mode for row in json.loads(body)["files"]]})
        if action == "commit":
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    hub.files[repo][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            oid = hub.sha(repo)
            return self.json({"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        if action == "resolve":
            return self.file(repo, "/".join(file))
        return self.error(404, f"no answer to {path}")

    def file(self, repo: str, name: str):
        hub = self.hub
        if name not in hub.files[repo]:
            return self.error(404, "no such file", "EntryNotFound")
        content = hub.files[repo][name]
        headers = {"X-Repo-Commit": hub.sha(repo), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        start, requested = 0, self.headers.get("Range")
        if requested and self.command == "GET":
            hub.ranges.append(requested)
            start = int(requested.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for key, value in (headers | {"Content-Length": str(len(content) - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            cut, hub.cut_after = (hub.cut_after, None) if name.endswith(".safetensors") else (None, hub.cut_after)
            self.wfile.write(content[start:][:cut])
            if cut is not None:  # breaks off
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, content: dict | list):
        self.reply(200, json.dumps(content).encode())

    def error(self, status: int, text: str, code: str = ""):
        self.reply(status, json.dumps({"error": text}).encode(), {"X-Error-Code": code, "X-Error-Message": text})

    def reply(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        ours = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for key, value in (ours | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
