# SPDX-License-Identifier: Apache-2.0
"""`lionjax answer`: questions about captions, for a language model that stays as it is."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax answer`."""
    parser.add_argument(
        "questions", metavar="QUESTIONS", type=Path, help="JSON Lines: question, captions, tags, answers"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", type=Path, required=True, help="answers, report, journal of replies"
    )
    parser.add_argument("--method", choices=("pica", "promptcap"), default="pica", help="default: pica")
    parser.add_argument("--examples", metavar="FILE", type=Path, help="JSON Lines of solved questions, as QUESTIONS")
    parser.add_argument(
        "--features", metavar="NPZ", type=Path, help="features that choose the examples; else at random"
    )
    parser.add_argument("--shots", metavar="N", type=int, default=16, help="examples in a prompt (default: 16)")
    parser.add_argument("--ensemble", metavar="K", type=int, default=1, help="pica: prompts a question (paper: 5)")
    parser.add_argument("--no-tags", action="store_true", help="pica: the caption alone")
    parser.add_argument("--similarity", default="imagequestion", help="question or imagequestion (default)")
    parser.add_argument("--limit", metavar="N", type=int, help="maximum number of questions")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (default: 0)")
    model = parser.add_argument_group("language model", "a folder of weights, or a model behind an endpoint")
    model.add_argument("--lm", metavar="DIR", type=Path, help="a converted or published decoder or T5, or a run")
    model.add_argument("--model", metavar="NAME", default="", help="the endpoint's name of the model")
    model.add_argument("--endpoint", metavar="URL", default="", help="default: $OPENAI_BASE_URL; key: $OPENAI_API_KEY")
    model.add_argument("--api", choices=("chat", "completions"), default="chat", help="default: chat")
    model.add_argument("--at-once", metavar="N", type=int, default=4, help="requests in flight (default: 4)")
    model.add_argument("--budget", metavar="TOKENS", type=int, help="tokens that the run may use at most")
    model.add_argument("--dry-run", action="store_true", help="print the number of requests and the first prompt")


def answer(args: argparse.Namespace) -> None:
    """Run `lionjax answer`. Raises UserError for files and settings that do not fit."""
    from lionjax.core.types import UserError
    from lionjax.pipelines import answering
    from lionjax.pipelines.captions_as_text import read_questions

    if args.lm is None and not args.model and not args.dry_run:
        raise UserError("there is no language model; give --lm DIR, or --model NAME of an endpoint")
    if args.lm is not None and (args.model or args.endpoint):
        raise UserError("both --lm and an endpoint were given; give one of them")
    config = answering.AnsweringConfig(
        args.method, args.shots, args.ensemble, not args.no_tags, args.similarity, args.seed
    )
    rows = read_questions(args.questions)
    examples = read_questions(args.examples) if args.examples else []
    features = answering.read_features(args.features, len(rows), len(examples)) if args.features else None
    orders = answering.choose_examples(config, features, len(rows), len(examples))
    rows, orders = rows[: args.limit], orders[: args.limit]
    if args.dry_run:
        _print_plan(args, answering, rows, examples, orders, config)
        return
    model = _open_model(args)
    report = answering.write_answers(
        args.workdir, rows, answering.answer_rows(model, rows, examples, orders, config), model, config
    )
    print(f"{report['num_answered']} of {report['num_questions']} questions are answered in {args.workdir}")
    for name, value in report["scores"].items():
        print(f"{name} {value}")


def _open_model(args: argparse.Namespace):
    """The language model that the arguments name."""
    if args.lm is not None:
        import lionjax
        from lionjax.pipelines.loaded_model import LoadedModel

        return LoadedModel(lionjax.load(args.lm), args.lm.name, args.seed)
    return _open_endpoint(args, args.model)


def _open_endpoint(args: argparse.Namespace, name: str):
    from lionjax.pipelines.chat_endpoint import ChatEndpoint, EndpointConfig

    config = EndpointConfig(name, args.endpoint, args.api, args.at_once, budget=args.budget)
    return ChatEndpoint(config, args.workdir / "llm" / "answers.jsonl")


def _print_plan(args: argparse.Namespace, answering, rows, examples, orders, config) -> None:
    """Print what a run would ask: requests, those that the journal answers, tokens at most, the first prompt."""
    from lionjax.pipelines.chat_endpoint import max_tokens_of

    recorder = answering.RequestRecorder()
    answering.answer_rows(recorder, rows, examples, orders, config)
    pending, requests = recorder.requests, recorder.requests
    if args.model:
        pending = _open_endpoint(args, args.model).pending(requests)
    tokens = sum(map(max_tokens_of, pending))
    print(f"{len(requests)} requests, {len(requests) - len(pending)} of them answered already; about {tokens:,} tokens")
    if requests:
        print(f"the first prompt:\n{requests[0].prompt}")
