# SPDX-License-Identifier: Apache-2.0
"""`lionjax answer`: questions about captions, for a language model that stays as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from lionjax.cli.errors import positive_int
from lionjax.cli.language_model import add_language_model_arguments, open_language_model, print_plan


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
    parser.add_argument("--limit", metavar="N", type=positive_int, help="maximum number of questions")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (default: 0)")
    add_language_model_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the number of requests and the first prompt")


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
        recorder = answering.RequestRecorder()
        answering.answer_rows(recorder, rows, examples, orders, config)
        print_plan(args, recorder.requests, "answers")
        return
    model = open_language_model(args, "answers")
    report = answering.write_answers(
        args.workdir, rows, answering.answer_rows(model, rows, examples, orders, config), model, config
    )
    print(f"{report['num_answered']} of {report['num_questions']} questions are answered in {args.workdir}")
    for name, value in report["scores"].items():
        print(f"{name} {value}")
