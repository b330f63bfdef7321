# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the API of OpenAI's chat/completions and completions, and fails as scripted."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Failure:
    """What the server does instead of answering: a status with a body, a cut body, or a closed connection."""

    def __init__(self, status=0, body=None, headers=None, is_cut=False):
        self.status, self.body, self.headers, self.is_cut = status, body, headers or {}, is_cut


def error_body(message, code=None):
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


FAST = {"retry-after-ms": "1"}
TOO_MANY = Failure(429, error_body("slow down"), FAST)
BROKEN = Failure(500, error_body("broken"), FAST)
CLOSED = Failure()


def chat_reply(text, finish_reason="stop", log_probs=(), usage=(7, 3)):
    content = [{"token": token, "logprob": value, "bytes": None, "top_logprobs": []} for token, value in log_probs]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    choice["logprobs"] = {"content": content} if log_probs else None
    reply = {"id": "1", "object": "chat.completion", "created": 1700000000, "model": "m", "choices": [choice]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return reply


def text_reply(text, log_probs=(), finish_reason="stop"):
    found = {"tokens": [t for t, _ in log_probs], "token_logprobs": [v for _, v in log_probs], "text_offset": []}
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": found if log_probs else None}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class EndpointServer:
    """`url`, `bodies` (of all requests, in order of arrival) and `headers`; `failures` are used up first."""

    def __init__(self, reply, failures=()):
        self.reply, self.failures, self.bodies, self.headers = reply, list(failures), [], []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    failure = server.failures.pop(0) if server.failures else None
                reply = server.reply(body) if failure is None else failure
                if not isinstance(reply, Failure):
                    self.write(200, reply, {})
                elif reply.status:
                    self.write(reply.status, reply.body, reply.headers, reply.is_cut)
                else:
                    self.close_connection = True

            def write(self, status, body, headers, is_cut=False):
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                kind = "text/html" if isinstance(body, str) else "application/json"
                for name, value in ({"content-type": kind, "content-length": len(content)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if is_cut else content)
                self.close_connection = is_cut

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def endpoint_server(reply, failures=()):
    """A running `EndpointServer`; `reply(body)` gives the JSON of a reply or a `Failure`."""
    server = EndpointServer(reply, failures)
    try:
        yield server
    finally:
        server.close()


def prompt_of(body) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
