# SPDX-License-Identifier: Apache-2.0
"""`lionjax judge`: open answers judged by a language model, or by people on a rating sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

from lionjax.cli.errors import positive_int
from lionjax.cli.language_model import add_language_model_arguments, open_language_model, print_plan

BENCHMARKS = ("llava_bench", "owleval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax judge`."""
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="llava_bench or owleval")
    parser.add_argument("questions", metavar="QUESTIONS", type=Path, help="the benchmark's questions, JSON Lines")
    parser.add_argument("--answers", metavar="FILE", type=Path, required=True, help="the answers to judge, with ids")
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="reviews, report, journal; sheet")
    parser.add_argument("--references", metavar="FILE", type=Path, help="llava_bench: the reference answers, with ids")
    context_help = "llava_bench: what is in the images, captions and, for COCO, boxes"
    parser.add_argument("--context", metavar="FILE", type=Path, help=context_help)
    parser.add_argument("--images", metavar="DIR", type=Path, help="owleval: images to show on the sheet")
    reading_help = "llava: unreadable replies count as -1, as in LLaVA's code (default: readable, they are left out)"
    parser.add_argument("--reading", choices=("readable", "llava"), default="readable", help=reading_help)
    orders_help = "ask with the reference first and second, and take the mean of the scores"
    parser.add_argument("--both-orders", action="store_true", help=orders_help)
    parser.add_argument("--limit", metavar="N", type=positive_int, help="maximum number of questions")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of samples with --lm (default: 0)")
    add_language_model_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the number of requests and the first prompt")


def judge(args: argparse.Namespace) -> None:
    """Run `lionjax judge`. Raises UserError for files and settings that do not fit."""
    from lionjax.core.errors import UserError

    if args.benchmark == "owleval":
        _write_sheet(args)
        return
    from lionjax.pipelines import judge as judging

    missing = [name for name in ("references", "context") if getattr(args, name) is None]
    if missing:
        raise UserError(f"the judge needs --{missing[0]} FILE")
    config = judging.JudgeConfig(args.reading, args.both_orders)
    rows = judging.read_questions(args.questions, args.context, args.references, args.answers)[: args.limit]
    if args.dry_run:
        orders = (False, True) if args.both_orders else (False,)
        print_plan(args, [judging.build_request(row, config, swapped) for row in rows for swapped in orders], "judge")
        return
    model = open_language_model(args, "judge")
    report = judging.write_reviews(args.workdir, rows, judging.judge_answers(model, rows, config), model, config)
    print(f"judge: {report['judge']['model']}, reading: {args.reading}")
    for line, row in zip(report["printed"], report["table"]):
        interval = "" if row["interval"] is None else " [{:.1f}, {:.1f}]".format(*row["interval"])
        print(f"{line}{interval} of {row['count']}")
    print(f"{report['num_unreadable']} of {len(rows)} unreadable, {report['num_not_asked']} not asked")


def _write_sheet(args: argparse.Namespace) -> None:
    from lionjax.pipelines import rating_sheet

    path = args.workdir / "sheet.html"
    count = rating_sheet.write_sheet(path, args.questions, args.answers, args.images, args.limit)
    print(f"{path} has {count} answers to rate; then: lionjax evaluate --benchmark owleval --source {args.questions} "
          "--predictions ratings.jsonl")  # fmt: skip
