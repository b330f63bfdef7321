# SPDX-License-Identifier: Apache-2.0
"""LISA on synthetic scenes: masks by reasoning, and how many reasoning samples that takes.

python -m benchmarks.lisa [--steps 430 430] [--seeds 3] [--samples 0 30 300] [--limit 200] [--out FILE]

First configs/tiny_lisa.py, whose first stage has no reasoning samples: cIoU of masks on held-out scenes, each of which
has a combination of color and shape that no training scene has, for objects that must be inferred and for referring
expressions; beside it a blank image, and the question with the noun alone ("Segment the star." for "Segment the star
whose color occurs twice."). Then the paper's claim (arXiv 2308.00692, section 4) that few reasoning samples suffice:
after the first stage, `few_steps` more on as many samples as each of `samples`, mixed with the rest; mean over seeds
of samples and batches with minimum and maximum.

Finished runs are reused; delete --workdir to start over.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import jax
import numpy as np
import tyro

from lionjax import convert
from lionjax.core import config
from lionjax.core.experiment import Experiment, Weights
from lionjax.core.types import Params
from lionjax.data import pipeline
from lionjax.data.scenes import reasoning, world
from lionjax.evaluation import runner
from lionjax.evaluation.metrics import regions
from lionjax.inference.loading import from_params
from lionjax.inference.model import Model
from lionjax.training import loop

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("reason", "res")


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of both stages and of each run on few samples, seeds, numbers of samples; `limit`: questions of a task.

    `few_limit`: of the runs on few samples.
    """

    steps: tuple[int, int] = (430, 430)
    few_steps: int = 60
    seeds: int = 3
    samples: tuple[int, ...] = (0, 30, 300)
    limit: int = 200
    few_limit: int = 100
    workdir: Path = Path("runs/lisa")
    out: Path | None = None


def stage_of(run: Run, number: int, steps: int, **fields) -> Experiment:
    """tiny_lisa with one of its stages alone; the second starts from the folder of the first."""
    base = config.load(ROOT / "configs" / "tiny_lisa.py")
    stage = dataclasses.replace(base.stages[number], steps=steps)
    settings = dataclasses.replace(base.run, evaluate_limit=0, feature_cache_dir=str(run.workdir / "features"))
    if number:
        fields = {"weights": (Weights("", str(run.workdir / "referring" / "ours" / "params.safetensors")),)} | fields
    return dataclasses.replace(base, stages=(stage,), run=settings, **fields)


def trained(run: Run, name: str, exp: Experiment, limit: int) -> dict[str, float]:
    """The figures at the end of a run, which resumes if its folder exists."""
    folder = run.workdir / name
    if not (folder / "figures.json").is_file():
        params, _ = loop.train(exp, folder, pipeline.batches)
        if not (folder / "ours").is_dir():
            convert.save(exp, params, folder / "ours")
        (folder / "figures.json").write_text(json.dumps(figures(exp, params, limit)))
    return json.loads((folder / "figures.json").read_text())


def figures(exp: Experiment, params: Params, limit: int) -> dict[str, float]:
    """cIoU of each task, of a blank image, and of the question with the noun alone."""
    model, found = from_params(exp, params), {}
    data = dataclasses.replace(exp.data, sources=exp.data.sources[:1])
    for task in TASKS:
        entry = runner.evaluate(model.engine, data, exp.generation, task, limit=limit)
        found |= {task: entry["metrics"][f"{task}_ciou"], f"{task}, blind": entry["blind"][f"{task}_ciou"]}
    return found | noun_alone(model, limit)


def noun_alone(model: Model, limit: int) -> dict[str, float]:
    """cIoU of "Segment the star whose color occurs twice." by kind, and of "Segment the star." for the same objects."""
    masks: dict[str, list] = {}
    for index in range(limit):
        scene = world.sample_scene("heldout", index)
        inference = reasoning.sample_inference(scene, np.random.default_rng([7, index]))
        if inference is None:
            continue
        image, truth = scene.render(), scene.masks()[inference.target]
        prompts = [f"Segment {words}." for words in (inference.description, inference.noun)]
        answers = model.answer([image, image], prompts)
        for name, answer in zip((f"reason, {inference.kind}", "reason, noun alone"), answers):
            mask = answer.masks[0] if len(answer.masks) == 1 else np.zeros_like(truth)
            masks.setdefault(name, []).append((mask, truth))
    overlaps = {name: regions.mask_overlaps(*zip(*pairs)) for name, pairs in masks.items()}
    return {name: regions.ciou(overlaps_B2) for name, overlaps_B2 in sorted(overlaps.items())}


def few_samples(run: Run, seed: int, count: int) -> Experiment:
    """The second stage on `count` reasoning samples; without the task of reasoning if that is 0."""
    exp = stage_of(run, 1, run.few_steps, seed=1 + seed)
    (scenes,), (stage,) = exp.data.sources, exp.stages
    few = dataclasses.replace(scenes, name="few", sizes=(max(count, 1), 1, 1), seed=100 + seed)
    mixture = tuple(
        dataclasses.replace(mix, source="few" if mix.task == "reason" else scenes.name)
        for mix in stage.mixture
        if count or mix.task != "reason"
    )
    stage = dataclasses.replace(stage, mixture=mixture)
    return dataclasses.replace(exp, stages=(stage,), data=dataclasses.replace(exp.data, sources=(scenes, few)))


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The rows in Markdown: mean (minimum to maximum)."""
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, by_seed in rows.items():
        cells = []
        for column in columns:
            values = [row[column] for row in by_seed if column in row]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(run: Run) -> None:
    """Train, evaluate and print the two tables."""
    first, second = run.steps
    rows = {
        f"referring, {first} steps": [trained(run, "referring", stage_of(run, 0, first), run.limit)],
        f"then reasoning, {second} steps": [trained(run, "reasoning", stage_of(run, 1, second), run.limit)],
    }
    text = f"cIoU, {run.limit} held-out questions of each task.\n\n{table(rows)}\n"
    print(text, flush=True)
    few: dict[str, list] = {}
    for count in run.samples:
        for seed in range(run.seeds):
            row = trained(run, f"few_{count}_{seed}", few_samples(run, seed, count), run.few_limit)
            few.setdefault(f"{count} reasoning samples", []).append(row)
    if few:
        title = f"{run.seeds} seeds, {run.few_steps} steps after the first stage, {run.few_limit} questions."
        text += f"\n{title}\n\n{table(few)}\n"
    text += f"\nDevice: {jax.devices()[0].device_kind}, jax {jax.__version__}.\n"
    print(text, flush=True)
    if run.out is not None:
        part = run.out.with_suffix(".part")
        part.write_text(text)
        part.replace(run.out)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
