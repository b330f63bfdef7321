# SPDX-License-Identifier: Apache-2.0
"""Tokens/s of `lionjax serve`: several clients at once against one, over HTTP, and who of them waits longest.

python -m benchmarks.serving RUN [--clients 8] [--rounds 4] [--slots 8] [--talk]     # the tiny flagship's run folder

Each client asks streamed questions about scenes of its own, one after another, for a number of rounds, each about
another scene or (--talk) all about one; sampling at temperature 1 with other seeds makes all answers different, so that
no answer is shared. One client alone is measured on
the same server, and on one with a single slot, which is the best that one client can have. Server and clients are
processes of their own.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
START_SECONDS = 900
QUESTION = "Describe the image in one short sentence."


@contextlib.contextmanager
def server(run: Path, slots: int) -> Iterator[str]:
    """The address of `lionjax serve` with so many slots, once it answers."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(run), "--port", str(port), "--slots", str(slots), "--name", "model"]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, "-m", "lionjax.cli", *words], stderr=told, env=env)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        try:
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"{url}/health").raise_for_status()
                    yield url
                    return
                time.sleep(0.2)
            told.seek(0)
            raise SystemExit(f"the server did not start: {told.read()[-500:]}")
        finally:
            process.terminate()
            process.wait()


@functools.cache
def body(image: int, seed: int) -> bytes:
    """A streamed question about scene number `image`."""
    from PIL import Image

    from lionjax.data.scenes import render, world

    scene = world.sample_scene("heldout", image, 0)
    buffer = io.BytesIO()
    Image.fromarray(render.render_scene(scene, 224)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": "model", "messages": [{"role": "user", "content": content}], "stream": True, "temperature": 1.0}
    asked |= {"seed": seed, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


def ask(session, url: str, content: bytes) -> dict[str, float]:
    """Ask one question; {"tokens", "seconds", "first"}: first is the time to the first piece of text."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    headers = {"Content-Type": "application/json"}
    path = f"{url}/v1/chat/completions"
    with session.stream("POST", path, content=content, headers=headers, timeout=300) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    return {"tokens": tokens, "seconds": time.perf_counter() - began, "first": first}


def measure(url: str, clients: int, rounds: int, number: int, talk: bool) -> dict[str, float]:
    """Tokens/s of all clients together, of the slowest and the fastest, and the longest time to the first text.

    `number`: of the measurement, of which each has images and seeds of its own; `talk`: a client has one image.
    """
    import httpx

    first = 10_000 * number
    bodies = [  # made before the clock starts: clients and server share the processor
        [
            body(first + rounds * client + (0 if talk else turn), first + rounds * client + turn)
            for turn in range(rounds)
        ]
        for client in range(clients)
    ]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        # Making a session reads all certificates of the system, for 30 ms of the processor.
        sessions = [stack.enter_context(httpx.Client()) for _ in range(clients)]
        began = time.perf_counter()
        asked = list(
            pool.map(lambda client: [ask(sessions[client], url, one) for one in bodies[client]], range(clients))
        )
        seconds = time.perf_counter() - began
    rates = [sum(one["tokens"] for one in rows) / sum(one["seconds"] for one in rows) for rows in asked]
    return {
        "clients": clients,
        "tokens_per_second": sum(one["tokens"] for rows in asked for one in rows) / seconds,
        "slowest": min(rates),
        "fastest": max(rates),
        "longest_first": max(one["first"] for rows in asked for one in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each kind, in turn; the median is told")
    parser.add_argument("--talk", action="store_true", help="each client asks about one image, not a new one each time")
    args = parser.parse_args()
    numbers = itertools.count()
    kinds: dict[str, list[dict[str, float]]] = {}
    with server(args.run, args.slots) as url, server(args.run, 1) as alone:
        for address in (url, alone):
            measure(address, args.clients, 2, next(numbers), args.talk)
        for _ in range(args.turns):
            for name, given in (
                (f"{args.clients} clients, {args.slots} slots", (url, args.clients, args.rounds)),
                (f"1 client, {args.slots} slots", (url, 1, args.rounds)),
                ("1 client, 1 slot", (alone, 1, args.rounds)),
            ):
                kinds.setdefault(name, []).append(measure(*given, next(numbers), args.talk))
    print("| | tokens/s | slowest client | fastest client | longest time to the first text, s |\n|---|---|---|---|---|")
    medians = {}
    for name, rows in kinds.items():
        keys = ("tokens_per_second", "slowest", "fastest", "longest_first")
        medians[name] = [statistics.median(row[key] for row in rows) for key in keys]
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in medians[name]) + " |")
    many, one, best = (values[0] for values in medians.values())
    print(f"\n{many / one:.2f} times one client on the same server, {many / best:.2f} times one client on one slot")


if __name__ == "__main__":
    main()
