# SPDX-License-Identifier: Apache-2.0
"""`lionjax serve` and `lionjax demo`: a model behind OpenAI's chat API, with a web page."""

from __future__ import annotations

import argparse
from pathlib import Path

PORT, DEMO_PORT = 8000, 7860


def add_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the arguments of `lionjax serve`; `port` is the default."""
    parser.add_argument("dir", metavar="DIR", type=Path, help="a run folder or a folder of weights")
    host_help = "address to bind (default: 127.0.0.1, this machine only; 0.0.0.0: all interfaces)"
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    parser.add_argument("--port", metavar="PORT", type=int, default=port, help=f"port to bind (default: {port})")
    parser.add_argument("--name", help="name of the model for clients (default: the folder's name)")
    parser.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, to tag images")
    refiner_help = "a refiner's folder, for a model that reads regions (default: the one in the model's folder)"
    parser.add_argument("--refiner", metavar="DIR", type=Path, help=refiner_help)
    prompt_length_help = "maximum prompt length in tokens with chat history, at least that of training (default: 256)"
    parser.add_argument("--prompt-length", metavar="N", type=int, default=256, help=prompt_length_help)
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=0, help="of an answer (default: the model's own)"
    )
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="answers generated at once (default: 8)")
    waiting_help = "requests beyond these that may wait; more get status 429 (default: 64)"
    parser.add_argument("--max-waiting", metavar="N", type=int, default=64, help=waiting_help)
    parser.add_argument("--timeout", metavar="S", type=float, default=120, help="seconds of an answer (default: 120)")
    size_help = "largest request in MiB, with its image (default: 20)"
    parser.add_argument("--max-request", metavar="MIB", type=int, default=20, help=size_help)
    parser.add_argument("--int8", action="store_true", help="round the language model's matrices to int8")


def model_name(folder: Path) -> str:
    """The name for clients: that of the folder, of its repository where it is a snapshot of the hub, or that ships."""
    folder = folder.resolve()
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return repository.rpartition("--")[2].removeprefix("shipped:")


def serve(args: argparse.Namespace) -> None:
    """Run `lionjax serve`. Raises UserError for settings out of range."""
    from lionjax.core.errors import check_ranges
    from lionjax.inference.live_question import LiveConfig
    from lionjax.pipelines.serving import chat_server

    check_ranges(args, "--", port=">= 1 and <= 65535", prompt_length=">= 1")
    live = LiveConfig(args.slots, args.max_tokens, args.max_waiting, args.timeout)
    name = args.name or model_name(args.dir)
    config = chat_server.ServerConfig(name, args.host, args.port, args.max_request, live)
    chat_server.serve(args.dir, config, args.tagger, args.prompt_length, args.refiner, args.int8)
