# SPDX-License-Identifier: Apache-2.0
"""The functions behind the command line's verbs. Heavy imports are inside the functions, to keep --help fast."""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lionjax.cli import answer as answer_command
from lionjax.cli import convert as weights_command
from lionjax.cli import generate as generate_command
from lionjax.cli import judge as judge_command
from lionjax.cli import plan as plan_command
from lionjax.cli import reproduce as reproduce_command
from lionjax.cli import score as score_command
from lionjax.cli import serve as serve_command
from lionjax.cli import synthesize as synthesize_command
from lionjax.cli import tools as tools_command
from lionjax.cli.errors import UsageError, describe_error


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Train all stages of a config; resumes if --workdir holds a run."""
    start_time = time.time()
    from lionjax.core import config

    experiment = config.load(args.config, overrides)  # before the imports below, which take seconds
    if args.shrink is not None:  # what the command line sets is not shrunk
        from lionjax.tiny.shrink import shrink

        experiment = config.apply_overrides(shrink(config.load(args.config), args.shrink), overrides)

    from lionjax.data import pipeline
    from lionjax.evaluation import progress
    from lionjax.evaluation.report.html import write_router_ratios
    from lionjax.training import bucket_folder, distributed, loop, run_folder, run_log

    with distributed.distributed_session(describe_error), bucket_folder.opened(args.workdir) as workdir:
        evaluator = progress.make_evaluator(experiment, workdir)
        params, _ = loop.train(experiment, workdir, pipeline.batches, start_time, evaluator)
        write_router_ratios(workdir, params)
        if experiment.run.evaluate_limit:
            from lionjax.evaluation import runner
            from lionjax.inference import loading

            evaluation_start = time.time()
            engine = loading.for_answering(experiment, params).engine
            updates = run_folder.updates_before(experiment, len(experiment.stages))
            entries = runner.evaluate_run(engine, experiment, workdir, updates)
            run_log.add_evaluation_seconds(workdir, time.time() - evaluation_start)
        if distributed.is_main_process():
            if experiment.run.evaluate_limit:
                _print_metrics(entries, to_stderr=True)
            name = bucket_folder.display_name(workdir)
            print(f"{name} holds the trained model; `lionjax report {name}` writes an HTML report", file=sys.stderr)


def evaluate(args: argparse.Namespace, fields: list[str]) -> None:
    """Run a benchmark, beside baselines with the most frequent answers. Or score answers to a published one."""
    if score_command.is_published(args):
        score_command.evaluate(args, fields)
        return
    if args.dir is None:
        raise UsageError(
            "the following arguments are required: DIR, or --predictions FILE; see `lionjax evaluate --help`"
        )
    import lionjax
    from lionjax.core import config
    from lionjax.data.datasets import detect
    from lionjax.evaluation import runner

    source, run_all = None, args.benchmark == "all"
    if not run_all:
        runner.benchmark_task(args.benchmark)  # fail on a wrong name before loading the model
    if args.source is not None:
        source = detect.detect_source(args.source, args.images, args.answers)
        source = config.apply_overrides(source, fields)
    elif fields:
        raise UsageError(f"unknown argument {fields[0]!r}; see `lionjax evaluate --help`")
    model = lionjax.load(args.dir, int8=args.int8)
    names = runner.model_benchmarks(model, args.split, source) if run_all else [args.benchmark]
    options = (args.limit, args.split, source, bool(args.blind), args.workers)
    entries = [runner.evaluate_model(model, name, args.dir, *options) for name in names]
    if args.json:
        print(json.dumps(entries, indent=1))
    else:
        _print_metrics(entries)


def generate(args: argparse.Namespace, _) -> None:
    """Answer a prompt about an image; prints text, boxes, masks and what a refiner found, and can draw them."""
    generate_command.generate(args)


def answer(args: argparse.Namespace, _) -> None:
    """Answer questions about captions with a language model that stays as it is (PICa, PromptCap)."""
    answer_command.answer(args)


def tools(args: argparse.Namespace, _) -> None:
    """List what loaded models offer as tools, or serve them to clients of the Model Context Protocol."""
    tools_command.tools(args)


def agent(args: argparse.Namespace, _) -> None:
    """Answer questions about images with a language model that uses loaded models as tools."""
    tools_command.agent(args)


def judge(args: argparse.Namespace, _) -> None:
    """Let a language model judge answers to LLaVA-Bench, or write OwlEval's rating sheet for people."""
    judge_command.judge(args)


def synthesize(args: argparse.Namespace, _) -> None:
    """Make instruction data with a language model, or grounded captions with a detector, in LLaVA's form."""
    synthesize_command.synthesize(args)


def serve(args: argparse.Namespace, _) -> None:
    """Serve a model over HTTP: OpenAI's chat API with images, streaming, boxes and masks, and a web page."""
    serve_command.serve(args)


def demo(args: argparse.Namespace, _) -> None:
    """Serve the web page of a model: chat about an image, mark regions, view predicted boxes and masks."""
    serve_command.serve(args)


def tag(args: argparse.Namespace, _) -> None:
    """Tag images with RAM (the tags LION takes as input)."""
    from lionjax.data import images
    from lionjax.inference import tagger

    image_list = [images.open_image(file) for file in args.image]
    results = tagger.load(args.dir).tag(image_list)
    if args.json:
        entries = zip(args.image, map(dataclasses.asdict, results))
        print(json.dumps([{"image": file} | entry for file, entry in entries], ensure_ascii=False))
    else:
        for result in results:
            print(result)


def rank(args: argparse.Namespace, _) -> None:
    """Rank texts by how well they fit images, with CLIP or SigLIP."""
    from lionjax.data import images
    from lionjax.inference import dual_encoder

    image_list = [images.open_image(file) for file in args.image]
    rankings = dual_encoder.load(args.dir).rank(image_list, args.texts)
    entries = []
    for file, ranking in zip(args.image, rankings):
        columns = zip(ranking.texts, ranking.probabilities, ranking.cosines)
        rows = [dict(zip(("text", "probability", "cosine"), row)) for row in columns]
        entries.append({"image": file, "texts": rows})
    if args.json:
        print(json.dumps(entries, ensure_ascii=False))
        return
    for entry in entries:
        for row in entry["texts"]:
            print(f"{entry['image']}  {row['probability']:.3f}  {row['cosine']:.3f}  {row['text']}")


def detect(args: argparse.Namespace, _) -> None:
    """Detect what a prompt names with Grounding DINO: boxes, scores and phrases, as text, JSON or drawn."""
    from lionjax.data import images
    from lionjax.evaluation.report import plots
    from lionjax.inference import detector

    options = {"box_threshold": args.box_threshold, "text_threshold": args.text_threshold, "nms_iou": args.nms}
    image_list = [images.open_image(file) for file in args.image]
    dino = detector.load(args.dir).padded_to(args.pad_to_multiple)
    results = dino.detect(image_list, args.prompt, **options, remove_combined=args.remove_combined)
    if args.json:
        print(json.dumps([{"image": file} | _detections_to_json(result) for file, result in zip(args.image, results)]))
    else:
        for file, result in zip(args.image, results):
            for score, phrase, box in zip(result.scores, result.phrases, result.boxes_K4):
                print(f"{file}  {score:.3f}  {' '.join(f'{edge:.3f}' for edge in box)}  {phrase}")
    if args.out is not None:
        drawn = [
            plots.draw_overlays(image, list(map(plots.Overlay, result.boxes_K4, result.phrases)))
            for image, result in zip(image_list, results)
        ]
        cells = [(image, [(file, plots.LIGHT_THEME["ink"])]) for file, image in zip(args.image, drawn)]
        plots.save_png(drawn[0] if len(drawn) == 1 else plots.image_grid(cells), args.out)


def show(args: argparse.Namespace, overrides: list[str]) -> None:
    """Print the resolved config with types; with --weights, the table of torch weight names."""
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
    """Print examples of a data source (inspect), write it as ArrayRecord (build), or check a config's data (check)."""
    from lionjax.core import config
    from lionjax.core.types import UserError
    from lionjax.data.datasets import detect

    if args.action == "check":
        _check_data(_load_experiment(Path(args.source), fields))
        return
    source = detect.detect_source(args.source, args.images, args.answers)
    source = config.apply_overrides(source, fields)
    if args.action == "build":
        if args.out is None:
            raise UserError("build needs --out FOLDER, the output folder")
        from lionjax.data.prepare import array_record_writer

        makers = _record_makers(args)
        beam_flags = None if args.beam is None else args.beam.split()
        print(array_record_writer.build(source, args.out, beam_flags=beam_flags, **makers))
        return
    detect.inspect(source, args.split, args.limit)
    if args.out is not None:
        _draw_examples(source, args.split, args.limit, args.out)


def convert(args: argparse.Namespace, _) -> None:
    """Convert a run or a folder of weights to torch (the original's weight names), lionjax or Orbax format."""
    weights_command.convert(args)


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a config for a TPU pod on this machine; reports memory use and predicted step time."""
    plan_command.plan(args, overrides)


def reproduce(args: argparse.Namespace, _) -> None:
    """Check released weights, compare them with transformers, and print their figures beside the paper's."""
    reproduce_command.reproduce(args)


def report(args: argparse.Namespace, _) -> None:
    """Write the loss curves, metrics and example answers of a run to DIR/report.html."""
    from lionjax.evaluation.report.html import write_report

    print(write_report(args.dir))


def benchmark(args: argparse.Namespace, argv: list[str]) -> None:
    """Run a script of benchmarks/ (the README's measurements); needs a clone of the repository."""
    from lionjax.core.types import UserError

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    files = {path.stem: path for path in folder.glob("*.py") if "__main__" in path.read_text()}
    if args.name not in files:
        names = ", ".join(sorted(files)) or "none; benchmarks are only in a clone of the repository"
        raise UserError(f"there is no benchmark {args.name!r}; available: {names}")
    sys.argv = [str(files[args.name]), *argv]
    sys.path.insert(0, str(folder))  # as for `python FILE`, so that it can import its neighbors
    runpy.run_path(str(files[args.name]), run_name="__main__")


def _check_data(experiment) -> None:
    """Print what each stage reads and what is missing. Raises UserError with one sentence if anything is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lionjax.core.types import UserError
    from lionjax.data import check

    findings = check.check_experiment(experiment)
    table, before = Table("stage", "entry", "source", "file", "state", title=experiment.name), ("", "", "")
    for finding in findings:
        place = (finding.stage, finding.entry, finding.source)
        cells = ["" if place[: k + 1] == before[: k + 1] else cell for k, cell in enumerate(place)]
        table.add_row(*map(escape, (*cells, finding.what, finding.state)))
        before = place
    Console().print(table)
    if sentence := check.summarize(findings):
        raise UserError(sentence)


def _record_makers(args: argparse.Namespace) -> dict:
    """The arguments of `array_record_writer.build` for --tagger or --refiner. Raises UserError for both."""
    from lionjax.core.files import folder_digest
    from lionjax.core.types import UserError

    if args.refiner is None:
        if args.tagger is None:
            return {}
        from lionjax.inference import tagger

        return {"make_tagger": tagger.tagger_factory(args.tagger), "tagger_digest": folder_digest(args.tagger)}
    if args.tagger is not None:
        raise UserError("a refiner brings its own tagger; build with --tagger or with --refiner")
    from lionjax.pipelines import refiner

    factory = refiner.refiner_factory(args.refiner, args.regions)
    return {"make_refiner": factory, "tagger_digest": f"{folder_digest(args.refiner)} {args.regions}"}


def _draw_examples(source, split: str, limit: int, path: Path) -> None:
    """Write a PNG grid of the examples that `data inspect` lists, with their boxes and masks."""
    from lionjax.data import images, samples
    from lionjax.data.config import DataConfig
    from lionjax.data.datasets.source import open_split
    from lionjax.data.scenes.tasks import MASK_TASKS
    from lionjax.evaluation.report import plots

    data = DataConfig(sources=(source,), on_bad_record="replace")
    cells = []
    for task in open_split(source, split, data.processor.max_pixels).task_sizes:
        for sample in samples.examples(data, task, split, limit):
            example = sample.example
            masks = sample.masks() if task in MASK_TASKS else ()
            overlays = [plots.Overlay(box, color=plots.QUERY_COLOR) for box in example.question_boxes]
            overlays += [plots.Overlay(box, color=plots.TRUTH_COLOR) for box in example.boxes]
            overlays += [plots.Overlay(mask=mask, color=plots.TRUTH_COLOR) for mask in masks]
            text_color = plots.LIGHT_THEME["ink"]
            lines = [(task, plots.LIGHT_THEME["faint"]), (example.question, text_color), (example.answer, "#00785a")]
            cells.append((plots.draw_overlays(images.to_pil_image(sample.image), overlays), lines))
    plots.save_png(plots.image_grid(cells), path)


def _print_metrics(entries, to_stderr: bool = False) -> None:
    """Print a table for each benchmark."""
    from rich.console import Console

    from lionjax.evaluation import summary

    console = Console(stderr=to_stderr)
    for entry in entries:
        console.print(summary.metrics_table(entry))


def _detections_to_json(result) -> dict:
    """Detections for JSON: boxes as fractions of the image and in its pixels."""
    return {
        "boxes": result.boxes_K4.tolist(),
        "pixel_boxes": result.pixel_boxes_K4.tolist(),
        "scores": list(result.scores),
        "phrases": list(result.phrases),
    }


def _load_experiment(path: Path, overrides: Sequence[str]):
    """The experiment of a config file or a run folder, with overrides applied. Raises UserError if there is none."""
    from lionjax.core import config
    from lionjax.core.types import UserError

    if not path.is_dir():
        return config.load(path, overrides)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} holds no config.json; give a config file or a run folder")
    return config.apply_overrides(config.from_json(file.read_text()), overrides)
