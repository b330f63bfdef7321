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
from lionjax.cli.errors import Usage, explain


def train(given: argparse.Namespace, overrides: list[str]) -> None:
    """Train all stages of a config, or what is left of them: a folder goes on where it stands."""
    began = time.time()
    from lionjax.core import config

    experiment = config.load(given.config, overrides)  # before what takes seconds to import

    from lionjax.data import pipeline
    from lionjax.evaluation.report.html import write_routers
    from lionjax.training import distributed, loop, run_folder, run_log

    with distributed.together(explain):
        params, _ = loop.train(experiment, given.workdir, pipeline.batches, began)
        write_routers(given.workdir, params)
        if experiment.run.evaluate_limit:
            from lionjax.evaluation import runner
            from lionjax.inference import loading

            asked, made = time.time(), run_folder.updates_before(experiment, len(experiment.stages))
            answerer = loading.of_params(experiment, params).answerer
            entries = runner.evaluate_run(answerer, experiment, given.workdir, made)
            run_log.note_evaluation(given.workdir, time.time() - asked)
        if distributed.first():
            if experiment.run.evaluate_limit:
                _print_tables(entries, to_stderr=True)
            done = f"{given.workdir} holds the result; `lionjax report {given.workdir}` draws it"
            print(done, file=sys.stderr)


def evaluate(given: argparse.Namespace, fields: list[str]) -> None:
    """Ask a model the questions of a benchmark; figures beside what it would reach without looking."""
    import lionjax
    from lionjax.core import config
    from lionjax.data.datasets import detect
    from lionjax.evaluation import runner

    source, everything = None, given.benchmark == "all"
    if not everything:
        runner.task_of(given.benchmark)  # a wrong name is said before the model is read
    if given.source is not None:
        source = detect.recognise(given.source, given.images, given.answers)
        source = config.override(source, fields)
    elif fields:
        raise Usage(f"unknown argument {fields[0]!r}; see `lionjax evaluate --help`")
    model = lionjax.load(given.dir)
    names = runner.names_for(model, given.split, source) if everything else [given.benchmark]
    entries = [runner.evaluate_model(model, name, given.dir, given.limit, given.split, source) for name in names]
    if given.json:
        print(json.dumps(entries, indent=1))
    else:
        _print_tables(entries)


def generate(given: argparse.Namespace, _) -> None:
    """Answer a prompt about a picture; boxes and masks are printed and can be drawn."""
    import lionjax
    from lionjax.data import images
    from lionjax.evaluation.report import plots

    picture = images.open_picture(given.image)
    box = None if given.box is None else _box(given.box)
    tags = None
    if given.tagger is not None:
        from lionjax.inference import tagger

        tags = [found.tags for found in tagger.load(given.tagger).tag([picture])]
    model = lionjax.load(given.dir, prompt_length=given.prompt_length)
    boxes = None if box is None else [[box]]
    (answer,) = model.answer([picture], [given.prompt], boxes=boxes, tags=tags)
    if given.json:
        seen = {} if tags is None else {"tags": list(tags[0])}
        print(json.dumps(_plain(answer) | seen))
    else:
        print(answer.text)
        for found in answer.boxes:
            print("box " + " ".join(f"{edge:.3f}" for edge in found))
    if given.out is not None:
        marks = [] if box is None else [plots.Mark(box, colour=plots.ASKED)]
        marks += [plots.Mark(found, colour=plots.PREDICTED) for found in answer.boxes]
        marks += [plots.Mark(mask=mask, colour=plots.PREDICTED) for mask in answer.masks]
        plots.save(plots.draw(picture, marks), given.out)


def demo(given: argparse.Namespace, _) -> None:
    """Serve a web page to talk to a model: chat, point at things, see boxes and masks."""
    from lionjax.serving import web_demo as demo

    demo.serve(given.dir, given.host, given.port, given.tagger, given.prompt_length)


def tag(given: argparse.Namespace, _) -> None:
    """Name what is on pictures with RAM, as generate --tagger tells it to a LION."""
    from lionjax.data import images
    from lionjax.inference import tagger

    seen = [images.open_picture(file) for file in given.image]
    found = tagger.load(given.dir).tag(seen)
    if given.json:
        entries = zip(given.image, map(dataclasses.asdict, found))
        print(json.dumps([{"image": file} | entry for file, entry in entries], ensure_ascii=False))
    else:
        for one in found:
            print(one)


def show(given: argparse.Namespace, overrides: list[str]) -> None:
    """Print the resolved config, typed; with --weights the table of its torch names."""
    from lionjax.core import config

    path = Path(given.config)
    if given.weights and path.exists() and weights_command.holds_weights(path):
        if overrides:
            raise Usage(f"unknown argument {overrides[0]!r}; weights have no fields to set")
        weights_command.show(path)
        return
    experiment = _experiment(path, overrides)
    if given.weights:
        weights_command.print_rows(experiment.system.torch_rows())
    else:
        print(config.show(experiment))


def data(given: argparse.Namespace, fields: list[str]) -> None:
    """Look at the records of a source (inspect), or write them as ArrayRecord files (build)."""
    from lionjax.core import config
    from lionjax.core.types import UserError
    from lionjax.data.datasets import detect

    source = detect.recognise(given.source, given.images, given.answers)
    source = config.override(source, fields)
    if given.action == "build":
        if given.out is None:
            raise UserError("build wants --out FOLDER, where the files go")
        from lionjax.data.prepare import array_record_writer

        tag = None
        if given.tagger is not None:
            from lionjax.inference import tagger

            tag = tagger.teller(given.tagger)
        flags = None if given.beam is None else given.beam.split()
        print(array_record_writer.build(source, given.out, tag=tag, beam=flags))
        return
    detect.inspect(source, given.split, given.limit)
    if given.out is not None:
        _draw_examples(source, given.split, given.limit, given.out)


def convert(given: argparse.Namespace, _) -> None:
    """Write a run or a folder of weights under the original's names (torch), or under ours (jax)."""
    weights_command.convert(given)


def plan(given: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a config for a TPU pod on this machine: does it fit, what does it cost."""
    plan_command.plan(given, overrides)


def report(given: argparse.Namespace, _) -> None:
    """Draw the curves, tables and answers of a run into DIR/report.html."""
    from lionjax.evaluation.report.html import report

    print(report(given.dir))


def benchmark(given: argparse.Namespace, words: list[str]) -> None:
    """Measure one of the README's numbers on this machine; needs a clone of the project."""
    from lionjax.core.types import UserError

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    files = {path.stem: path for path in folder.glob("*.py") if "__main__" in path.read_text()}
    if given.name not in files:
        known = ", ".join(sorted(files)) or "none here: they come with a clone of the project"
        raise UserError(f"there is no benchmark {given.name!r}; there are {known}")
    sys.argv = [str(files[given.name]), *words]
    sys.path.insert(0, str(folder))  # as if run by its path, so that it finds its neighbours
    runpy.run_path(str(files[given.name]), run_name="__main__")


def _box(text: str) -> tuple[float, float, float, float]:
    from lionjax.data import images

    return images.unit_box(text.split(","), name="--box")


def _draw_examples(source, split: str, limit: int, path: Path) -> None:
    """A picture of the examples that `data inspect` lists, with what they ask about and answer."""
    from lionjax.data import images, mixture
    from lionjax.data.config import DataConfig
    from lionjax.data.datasets import source as sources
    from lionjax.evaluation.report import plots

    data = DataConfig(sources=(source,), on_bad_record="replace")
    cells = []
    for task in sources.open_split(source, split, data.processor.max_pixels).sizes:
        for sample in mixture.examples(data, task, split, limit):
            example = sample.example
            masks = sample.masks() if task == "res" else ()
            marks = [plots.Mark(box, colour=plots.ASKED) for box in example.question_boxes]
            marks += [plots.Mark(box, colour=plots.TRUE) for box in example.boxes]
            marks += [plots.Mark(mask=mask, colour=plots.TRUE) for mask in masks]
            ink = plots.LIGHT["ink"]
            lines = [(task, plots.LIGHT["faint"]), (example.question, ink), (example.answer, "#00785a")]
            cells.append((plots.draw(images.as_picture(sample.picture), marks), lines))
    plots.save(plots.grid(cells), path)


def _print_tables(entries, to_stderr: bool = False) -> None:
    from rich.console import Console

    from lionjax.evaluation import runner

    console = Console(stderr=to_stderr)
    for entry in entries:
        console.print(runner.table(entry))


def _plain(answer) -> dict:
    """An answer for JSON: masks as COCO's compressed run lengths."""
    import numpy as np
    from pycocotools import mask as coco

    masks = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in answer.masks]
    return {
        "text": answer.text,
        "boxes": np.asarray(answer.boxes, float).reshape(-1, 4).tolist(),
        "masks": [{"size": mask["size"], "counts": mask["counts"].decode()} for mask in masks],
    }


def _experiment(path: Path, overrides: Sequence[str]):
    from lionjax.core import config
    from lionjax.core.types import UserError

    if not path.is_dir():
        return config.load(path, overrides)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} holds no config.json; give a config file or the folder of a run")
    return config.override(config.from_json(file.read_text()), overrides)
