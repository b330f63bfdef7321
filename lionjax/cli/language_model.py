# SPDX-License-Identifier: Apache-2.0
"""Arguments of the language model that a verb asks: a folder of weights, or a model behind an endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_language_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a language model."""
    model = parser.add_argument_group("language model", "a folder of weights, or a model behind an endpoint")
    model.add_argument("--lm", metavar="DIR", type=Path, help="a converted or published decoder or T5, or a run")
    model.add_argument("--model", metavar="NAME", default="", help="the endpoint's name of the model")
    model.add_argument("--endpoint", metavar="URL", default="", help="default: $OPENAI_BASE_URL; key: $OPENAI_API_KEY")
    model.add_argument("--api", choices=("chat", "completions"), default="chat", help="default: chat")
    model.add_argument("--at-once", metavar="N", type=int, default=4, help="requests in flight (default: 4)")
    model.add_argument("--budget", metavar="TOKENS", type=int, help="tokens that the run may use at most")


def open_language_model(args: argparse.Namespace, journal: str):
    """The language model that the arguments name; `journal`: name of the file of its replies.

    `args` has `workdir` and `seed` beside the arguments of `add_language_model_arguments`. Raises UserError if both or
    none are named.
    """
    from lionjax.core.errors import UserError

    if args.lm is None and not args.model:
        raise UserError("there is no language model; give --lm DIR, or --model NAME of an endpoint")
    if args.lm is not None and (args.model or args.endpoint):
        raise UserError("both --lm and an endpoint were given; give one of them")
    if args.lm is not None:
        import lionjax
        from lionjax.pipelines.loaded_model import LoadedModel

        return LoadedModel(lionjax.load(args.lm), args.lm.name, args.seed)
    return open_endpoint(args, journal)


def open_endpoint(args: argparse.Namespace, journal: str):
    """The endpoint that the arguments name, with the journal `workdir/llm/{journal}.jsonl`."""
    from lionjax.pipelines.chat_endpoint import ChatEndpoint, EndpointConfig

    config = EndpointConfig(args.model, args.endpoint, args.api, args.at_once, budget=args.budget)
    return ChatEndpoint(config, args.workdir / "llm" / f"{journal}.jsonl")


def print_plan(args: argparse.Namespace, requests, journal: str) -> None:
    """Print what a run would ask: requests, those that the journal answers, tokens at most, the first prompt."""
    from lionjax.pipelines.chat_endpoint import max_tokens_of

    pending = open_endpoint(args, journal).pending(requests) if args.model else requests
    tokens = sum(map(max_tokens_of, pending))
    print(f"{len(requests)} requests, {len(requests) - len(pending)} of them answered already; about {tokens:,} tokens")
    if requests:
        print(f"the first prompt:\n{requests[0].prompt}")
