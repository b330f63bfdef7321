# SPDX-License-Identifier: Apache-2.0
"""Evaluation during training: drawn answers to a few held-out questions, and benchmarks after each stage.

The benchmarks' figures go to `stage_metrics` of report.json, {stage: {metric: value}}, so that the report can show what
each stage changed. The last stage's are the run's own `metrics`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from PIL import Image

from lionjax.core.experiment import Experiment
from lionjax.core.files import take_record, write_json
from lionjax.core.types import Params, UserError
from lionjax.data import images
from lionjax.data.scenes.tasks import MASK_TASKS
from lionjax.evaluation import runner
from lionjax.evaluation.asking import Inquiry, Predictions, answer_questions
from lionjax.evaluation.report import plots
from lionjax.evaluation.report.plots import Overlay
from lionjax.inference import loading
from lionjax.inference.engine import InferenceEngine

log = logging.getLogger(__name__)

Drawn = tuple[str, Image.Image, str]  # name such as "rec_0", image, caption
LOCALIZING_TASKS = (*MASK_TASKS, "rec", "grounded", "detect", "region_level", "box_vqa", "reg")  # are drawn first


def make_evaluator(experiment: Experiment, workdir: Path) -> Callable[..., list[Drawn]] | None:
    """The `evaluator` of `training.loop.train` that the run's settings ask for; None if they ask for nothing."""
    run = experiment.run
    if not run.evaluate_pictures and not (run.evaluate_stages and run.evaluate_limit):
        return None

    def evaluate(current: Experiment, params: Params, stage: str, is_end: bool) -> list[Drawn]:
        benchmarks_due = is_end and run.evaluate_stages and run.evaluate_limit and stage != experiment.stages[-1].name
        if not (benchmarks_due or run.evaluate_pictures):
            return []
        engine = loading.for_answering(current, params).engine
        if benchmarks_due:
            evaluate_stage(engine, current, workdir, stage)
        try:
            return draw_answers(engine, current, run.evaluate_pictures)
        except UserError as error:
            log.warning("no answers are drawn: %s", error)
            return []

    return evaluate


def draw_answers(engine: InferenceEngine, experiment: Experiment, count: int) -> list[Drawn]:
    """Answers to the first `count` held-out questions, shared among the benchmarks of the experiment's tasks.

    Benchmarks of boxes and masks come first. Prediction and truth are drawn as in the report.
    """
    names = runner.trained_benchmarks(experiment)
    names.sort(key=lambda name: runner.benchmark_task(name) not in LOCALIZING_TASKS)
    limit = -(-count // max(1, len(names))) if count else 0
    drawn = itertools.chain.from_iterable(_draw_benchmark(engine, experiment, name, limit) for name in names)
    return list(itertools.islice(drawn, count))


def _draw_benchmark(engine: InferenceEngine, experiment: Experiment, benchmark: str, limit: int) -> Iterator[Drawn]:
    inquiry = Inquiry(experiment.data, benchmark, limit=limit, with_blind=False, on_skip=lambda *_: None)
    answered = answer_questions(engine, experiment.generation, inquiry)
    for sample, predictions in sorted(answered, key=lambda pair: pair[0].position):
        name = f"{runner.benchmark_label(benchmark)}_{sample.position}"
        yield name, _draw(sample, predictions, benchmark), _caption(sample, predictions)


def _draw(sample, predictions: Predictions, benchmark: str) -> Image.Image:
    answer, colors = predictions["answers"], (plots.QUERY_COLOR, plots.TRUTH_COLOR, plots.PREDICTION_COLOR)
    boxes = (sample.example.question_boxes, sample.example.boxes, answer.boxes)
    overlays = [
        Overlay(box, color=color, dashed=color == plots.TRUTH_COLOR)
        for some, color in zip(boxes, colors)
        for box in some
    ]
    if runner.benchmark_task(benchmark) in MASK_TASKS:
        truth = sample.masks().any(axis=0)
        overlays.append(Overlay(color=plots.TRUTH_COLOR, dashed=True, mask=truth))
        masks = () if answer.masks is None else answer.masks
        overlays += [Overlay(color=plots.PREDICTION_COLOR, mask=mask) for mask in masks]
    return plots.draw_overlays(images.to_pil_image(sample.image), overlays)


def _caption(sample, predictions: Predictions) -> str:
    truth = " · ".join(sample.example.answers[:2])
    return f"{sample.example.question} → {predictions['answers'].text}" + (f" (truth: {truth})" if truth else "")


def evaluate_stage(engine: InferenceEngine, experiment: Experiment, folder: Path, stage: str) -> None:
    """Run the benchmarks of the experiment's tasks, and write their metrics to `stage_metrics` of report.json."""
    metrics = {}
    for name in runner.trained_benchmarks(experiment):
        try:
            arguments = (experiment.data, experiment.generation, name, None, experiment.run.evaluate_limit)
            metrics |= runner.evaluate(engine, *arguments, with_blind=False)["metrics"]
        except UserError as error:
            log.warning("benchmark %s is skipped: %s", name, error)
    if jax.process_index() == 0:
        report = take_record(folder / "report.json")
        report.setdefault("stage_metrics", {})[stage] = metrics
        write_json(folder / "report.json", report)
