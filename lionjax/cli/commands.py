# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lionjax.cli import convert as weights_command
from lionjax.cli import plan as plan_command
from lionjax.cli.errors import UsageError, describe_error


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Train all stages of a config, or what is left of them: a folder goes on where it stands."""
    began = time.time()
    from lionjax.core import config

    experiment = config.load(args.config, overrides)  # before what takes seconds to import

    from lionjax.data import pipeline
    from lionjax.evaluation.report.html import write_router_ratios
    from lionjax.training import distributed, loop, run_folder, run_log

    with distributed.distributed_session(describe_error):
        params, _ = loop.train(experiment, args.workdir, pipeline.batches, began)
        write_router_ratios(args.workdir, params)
        if experiment.run.evaluate_limit:
            from lionjax.evaluation import runner
            from lionjax.inference import loading

            asked, made = time.time(), run_folder.updates_before(experiment, len(experiment.stages))
            answerer = loading.from_params(experiment, params).engine
            entries = runner.evaluate_run(answerer, experiment, args.workdir, made)
            run_log.add_evaluation_seconds(args.workdir, time.time() - asked)
        if distributed.is_main_process():
            if experiment.run.evaluate_limit:
                _print_metrics(entries, to_stderr=True)
            done = f"{args.workdir} holds the result; `lionjax report {args.workdir}` draws it"
            print(done, file=sys.stderr)


def evaluate(args: argparse.Namespace, fields: list[str]) -> None:
    """Ask a model the questions of a benchmark; figures beside what it would reach without looking."""
    import lionjax
    from lionjax.core import config
    from lionjax.data.datasets import detect
    from lionjax.evaluation import runner

    source, everything = None, args.benchmark == "all"
    if not everything:
        runner.benchmark_task(args.benchmark)  # a wrong name is said before the model is read
    if args.source is not None:
        source = detect.detect_source(args.source, args.images, args.answers)
        source = config.apply_overrides(source, fields)
    elif fields:
        raise UsageError(f"unknown argument {fields[0]!r}; see `lionjax evaluate --help`")
    model = lionjax.load(args.dir)
    names = runner.model_benchmarks(model, args.split, source) if everything else [args.benchmark]
    entries = [runner.evaluate_model(model, name, args.dir, args.limit, args.split, source) for name in names]
    if args.json:
        print(json.dumps(entries, indent=1))
    else:
        _print_metrics(entries)


def generate(args: argparse.Namespace, _) -> None:
    """Answer a prompt about a picture; boxes and masks are printed and can be drawn."""
    import lionjax
    from lionjax.data import images
    from lionjax.evaluation.report import plots

    picture = images.open_image(args.image)
    box = None if args.box is None else _parse_box(args.box)
    tags = None
    if args.tagger is not None:
        from lionjax.inference import tagger

        tags = [found.tags for found in tagger.load(args.tagger).tag([picture])]
    model = lionjax.load(args.dir, prompt_length=args.prompt_length)
    boxes = None if box is None else [[box]]
    (answer,) = model.answer([picture], [args.prompt], boxes=boxes, tags=tags)
    if args.json:
        seen = {} if tags is None else {"tags": list(tags[0])}
        print(json.dumps(_answer_to_json(answer) | seen))
    else:
        print(answer.text)
        for found in answer.boxes:
            print("box " + " ".join(f"{edge:.3f}" for edge in found))
    if args.out is not None:
        marks = [] if box is None else [plots.Overlay(box, color=plots.QUERY_COLOR)]
        marks += [plots.Overlay(found, color=plots.PREDICTION_COLOR) for found in answer.boxes]
        marks += [plots.Overlay(mask=mask, color=plots.PREDICTION_COLOR) for mask in answer.masks]
        plots.save_png(plots.draw_overlays(picture, marks), args.out)


def demo(args: argparse.Namespace, _) -> None:
    """Serve a web page to talk to a model: chat, point at things, see boxes and masks."""
    from lionjax.serving import web_demo as demo

    demo.serve(args.dir, args.host, args.port, args.tagger, args.prompt_length)


def tag(args: argparse.Namespace, _) -> None:
    """Name what is on pictures with RAM, as generate --tagger tells it to a LION."""
    from lionjax.data import images
    from lionjax.inference import tagger

    seen = [images.open_image(file) for file in args.image]
    found = tagger.load(args.dir).tag(seen)
    if args.json:
        entries = zip(args.image, map(dataclasses.asdict, found))
        print(json.dumps([{"image": file} | entry for file, entry in entries], ensure_ascii=False))
    else:
        for one in found:
            print(one)


def show(args: argparse.Namespace, overrides: list[str]) -> None:
    """Print the resolved config, typed; with --weights the table of its torch names."""
    from lionjax.core import config

    path = Path(args.config)
    if args.weights and path.exists() and weights_command.is_weights_path(path):
        if overrides:
            raise UsageError(f"unknown argument {overrides[0]!r}; weights have no fields to set")
        weights_command.print_weight_map(path)
        return
    experiment = _load_experiment(path, overrides)
    if args.weights:
        weights_command.print_weight_mappings(experiment.model.weight_map())
    else:
        print(config.format_config(experiment))


def data(args: argparse.Namespace, fields: list[str]) -> None:
    """Look at the records of a source (inspect), or write them as ArrayRecord files (build)."""
    from lionjax.core import config
    from lionjax.core.types import UserError
    from lionjax.data.datasets import detect

    source = detect.detect_source(args.source, args.images, args.answers)
    source = config.apply_overrides(source, fields)
    if args.action == "build":
        if args.out is None:
            raise UserError("build wants --out FOLDER, where the files go")
        from lionjax.data.prepare import array_record_writer

        tag = None
        if args.tagger is not None:
            from lionjax.inference import tagger

            tag = tagger.tagger_factory(args.tagger)
        flags = None if args.beam is None else args.beam.split()
        print(array_record_writer.build(source, args.out, make_tagger=tag, beam_flags=flags))
        return
    detect.inspect(source, args.split, args.limit)
    if args.out is not None:
        _draw_examples(source, args.split, args.limit, args.out)


def convert(args: argparse.Namespace, _) -> None:
    """Write a run or a folder of weights under the original's names (torch), or under ours (jax)."""
    weights_command.convert(args)


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a config for a TPU pod on this machine: does it fit, what does it cost."""
    plan_command.plan(args, overrides)


def report(args: argparse.Namespace, _) -> None:
    """Draw the curves, tables and answers of a run into DIR/report.html."""
    from lionjax.evaluation.report.html import write_report

    print(write_report(args.dir))


def benchmark(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure one of the README's numbers on this machine; needs a clone of the project."""
    from lionjax.core.types import UserError

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    files = {path.stem: path for path in folder.glob("*.py") if "__main__" in path.read_text()}
    if args.name not in files:
        known = ", ".join(sorted(files)) or "none here: they come with a clone of the project"
        raise UserError(f"there is no benchmark {args.name!r}; there are {known}")
    sys.argv = [str(files[args.name]), *argv]
    sys.path.insert(0, str(folder))  # as if run by its path, so that it finds its neighbours
    runpy.run_path(str(files[args.name]), run_name="__main__")


def _parse_box(text: str) -> tuple[float, float, float, float]:
    from lionjax.data import images

    return images.normalize_box(text.split(","), name="--box")


def _draw_examples(source, split: str, limit: int, path: Path) -> None:
    """A picture of the examples that `data inspect` lists, with what they ask about and answer."""
    from lionjax.data import images, mixture
    from lionjax.data.config import DataConfig
    from lionjax.data.datasets import source as sources
    from lionjax.evaluation.report import plots

    data = DataConfig(sources=(source,), on_bad_record="replace")
    cells = []
    for task in sources.open_split(source, split, data.processor.max_pixels).task_sizes:
        for sample in mixture.examples(data, task, split, limit):
            example = sample.example
            masks = sample.masks() if task == "res" else ()
            marks = [plots.Overlay(box, color=plots.QUERY_COLOR) for box in example.question_boxes]
            marks += [plots.Overlay(box, color=plots.TRUTH_COLOR) for box in example.boxes]
            marks += [plots.Overlay(mask=mask, color=plots.TRUTH_COLOR) for mask in masks]
            ink = plots.LIGHT_THEME["ink"]
            lines = [(task, plots.LIGHT_THEME["faint"]), (example.question, ink), (example.answer, "#00785a")]
            cells.append((plots.draw_overlays(images.to_pil_image(sample.image), marks), lines))
    plots.save_png(plots.image_grid(cells), path)


def _print_metrics(entries, to_stderr: bool = False) -> None:
    from rich.console import Console

    from lionjax.evaluation import runner

    console = Console(stderr=to_stderr)
    for entry in entries:
        console.print(runner.metrics_table(entry))


def _answer_to_json(answer) -> dict:
    """An answer for JSON: masks as COCO's compressed run lengths."""
    import numpy as np

    from lionjax.data.rle import encode_rle

    return {
        "text": answer.text,
        "boxes": np.asarray(answer.boxes, float).reshape(-1, 4).tolist(),
        "masks": [encode_rle(mask) for mask in answer.masks],
    }


def _load_experiment(path: Path, overrides: Sequence[str]):
    from lionjax.core import config
    from lionjax.core.types import UserError

    if not path.is_dir():
        return config.load(path, overrides)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} holds no config.json; give a config file or the folder of a run")
    return config.apply_overrides(config.from_json(file.read_text()), overrides)
