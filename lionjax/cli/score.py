# SPDX-License-Identifier: Apache-2.0
"""`lionjax evaluate --predictions` and `--protocol`: published benchmarks, with given answers or a model's own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lionjax.cli.errors import UsageError

MAX_SHOWN = 12  # figures of one group in the table; --json has all


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of published benchmarks to `lionjax evaluate`."""
    help_text = (
        "answers to --source that some model gave, scored without a model; a JSON list, JSON Lines or {id: answer}"
    )
    verb.add_argument("--predictions", metavar="FILE", help=help_text)
    protocol_help = "how a published benchmark is asked and scored: official, lavis, llava, shikra, lmms, ..."
    verb.add_argument("--protocol", metavar="NAME", default="", help=protocol_help)
    blind_help = "also ask with blank images (default: only for a folder of published benchmarks)"
    verb.add_argument("--blind", action=argparse.BooleanOptionalAction, help=blind_help)
    verb.add_argument("--submission", metavar="FILE", help="write the answers as the benchmark's server takes them")


def is_published(args: argparse.Namespace) -> bool:
    """Whether the command line asks for a published benchmark and no task of a source, such as vqa."""
    if args.benchmark == "all" and not args.predictions and not args.submission:
        from lionjax.evaluation.published import discovery

        is_root = discovery.is_root(args.source)
        if args.protocol and not is_root:
            raise UsageError("--protocol with --benchmark all needs --source, a folder with several benchmarks")
        return is_root
    if args.predictions or args.protocol or args.submission or args.source is None:
        return bool(args.predictions or args.protocol or args.submission)
    from lionjax.evaluation.published.scoring import ALIASES, BENCHMARKS
    from lionjax.evaluation.tasks import SCORERS

    return args.benchmark in {*ALIASES, *BENCHMARKS} - {*SCORERS}


def evaluate(args: argparse.Namespace, fields: Sequence[str]) -> None:
    """Score given answers, or a model's, on a published benchmark, and print the figures.

    `fields`: overrides of the source's fields, such as --file_name_pattern.
    """
    if args.source is None:
        raise UsageError("--predictions and --protocol need --source, the benchmark's own file or folder")
    if args.predictions is None and args.dir is None:
        raise UsageError("give --predictions, the file of answers to score, or DIR, the model that answers")
    if args.predictions is not None and args.dir is not None:
        raise UsageError("give --predictions or DIR, not both: the answers are those of the file or of the model")
    if args.predictions is not None and args.blind is not None:
        raise UsageError("--blind asks a model; leave it out with --predictions")
    if args.benchmark == "all":
        _evaluate_root(args, fields)
        return
    from lionjax.evaluation.published import scoring

    if args.predictions is None:
        entry = _ask_model(args, fields)
        print(json.dumps(entry, indent=1)) if args.json else print_entry(entry)
        return
    files = (args.source, args.predictions, args.protocol, args.images, args.answers, args.split)
    entry = scoring.score_predictions(args.benchmark, *files, fields, args.submission or "")
    print(json.dumps(entry, indent=1)) if args.json else print_entry(entry)


def _ask_model(args: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """The result of the model in DIR."""
    from lionjax.core import config
    from lionjax.data.datasets.detect import detect_source
    from lionjax.evaluation.protocols import get_protocol
    from lionjax.evaluation.published import model_answers, scoring

    name = scoring.benchmark_name(args.benchmark)
    protocol = get_protocol(name, args.protocol)  # before the model, which takes long to load
    source = detect_source(args.source, args.images, args.answers, bool(args.submission))
    source = config.apply_overrides(scoring.whole_source(name, source, args.source), list(fields))
    import lionjax

    model, submission = lionjax.load(args.dir, int8=args.int8), args.submission or ""
    settings = (args.split, args.limit, args.dir, submission)
    return model_answers.evaluate_model(model, name, source, protocol, *settings, blind=bool(args.blind))


def _evaluate_root(args: argparse.Namespace, fields: Sequence[str]) -> None:
    """Run all published benchmarks under a folder and write the page of results."""
    if fields:
        raise UsageError(f"unknown argument {fields[0]!r}; fields of one source cannot be set for a folder of several")
    if args.answers:
        raise UsageError("--answers is for one file; answers beside their questions are found by their published names")
    from pathlib import Path

    import lionjax
    from lionjax.evaluation.published import results
    from lionjax.evaluation.report import results_page

    model, root, with_blind = lionjax.load(args.dir, int8=args.int8), Path(args.source), args.blind is not False
    options = (args.protocol, args.images, args.split, args.limit, with_blind)
    entries, left_out = results.evaluate_root(model, root, args.dir, *options)
    pages = results_page.write_results_page(args.dir)
    if args.json:
        print(json.dumps({"results": entries, "left_out": left_out, "pages": list(map(str, pages))}, indent=1))
        return
    for entry in entries:
        print_entry(entry)
    for label, reason in left_out.items():
        print(f"{label} is left out: {reason}")
    print(f"the table and the answers: {pages[0]} and {pages[1]}")


def flat_figures(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path, value) of the numbers among figures, at most `MAX_SHOWN` of a group."""
    for number, (key, value) in enumerate(figures.items()):
        if number == MAX_SHOWN:
            return
        if isinstance(value, Mapping):
            yield from flat_figures(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def baseline_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    """Lines about the main figure of a model's own answers: its interval, baselines and seconds."""
    if entry.get("interval"):
        yield "95 % interval: {:.4f} to {:.4f}".format(*entry["interval"])
    if entry.get("blind"):
        yield f"image-blind: {entry['blind']['value']:.4f}"
    if entry.get("majority"):
        yield f"best constant answer: {entry['majority']['value']:.4f} ({entry['majority']['answer']!r})"
    if "seconds" in entry:
        yield f"{entry['seconds']} seconds"


def print_entry(entry: Mapping[str, Any]) -> None:
    """Print the figures of a benchmark, with its protocol and the published figures under the same one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, settings = Console(), entry["protocol_settings"]
    counts = f"{entry['answered']} of {entry['questions']} questions answered"
    if entry["answered"] != entry["questions"]:
        counts += "; the figures are over the answered ones"
    console.print(f"{entry['benchmark']}, protocol {entry['protocol']}: {counts}", markup=False)
    table = Table("figure")
    table.add_column("value", justify="right")
    for name, value in flat_figures(entry["figures"]):
        style = "bold" if name == (entry["main_figure"] or {}).get("name") else None
        table.add_row(escape(name), f"{value:.4f}" if isinstance(value, float) else str(value), style=style)
    console.print(table)
    for line in baseline_lines(entry):
        console.print(line, markup=False)
    for key in ("answer_form", "reader", "normalizer", "threshold", "aggregation", "note"):
        if settings[key]:
            console.print(f"{key.replace('_', ' ')}: {settings[key]}", markup=False)
    for name, reason in entry.get("left_out", {}).items():
        console.print(f"{name} is left out: {reason}", markup=False)
    if entry["trained_on_train_split"]:
        console.print("the model was trained on data of this benchmark's format: not zero-shot", markup=False)
    missing = entry.get("missing_pictures", {"count": 0})["count"]
    if missing:
        console.print(f"{missing} pictures are missing", markup=False)
    if too_long := entry.get("long_prompts", {"count": 0})["count"]:
        console.print(f"{too_long} prompts are too long for the model and were not asked", markup=False)
    peers = [peer for peer in entry["published"] if peer["protocol"] == entry["protocol"]]
    for peer in peers:
        trained = ", trained on its train split" if peer["trained"] else ""
        console.print(f"published: {peer['figure']} {peer['model']}{trained}", markup=False)
    if others := len(entry["published"]) - len(peers):
        console.print(f"{others} published figures were made under other protocols (--json has them)", markup=False)
