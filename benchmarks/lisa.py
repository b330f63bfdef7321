# SPDX-License-Identifier: Apache-2.0
"""LISA on synthetic scenes: masks by reasoning, and how many reasoning samples that takes.

python -m benchmarks.lisa [--steps 1000] [--seeds 3] [--samples 0 30 300] [--limit 200] [--out FILE]

First configs/tiny_lisa.py: cIoU of masks on held-out scenes, whose combinations of color and shape no training scene
has, for objects that must be inferred and for referring expressions; beside it a blank image, and the question with the
noun alone ("Segment the star." for "Segment the star whose color occurs twice."). Then the paper's claim (arXiv
2308.00692, section 4) that few reasoning samples suffice: the same model without any, and then `few_steps` more on as
many as each of `samples`, mixed with the rest; mean over seeds with minimum and maximum.

Finished runs are reused; delete --workdir to start over.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import jax
import numpy as np
import tyro

from lionjax import convert
from lionjax.core import config
from lionjax.core.experiment import Experiment, Mix
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
FEW_WEIGHT = 2.0  # of the reasoning samples in the mixture, whatever their number


@dataclasses.dataclass(frozen=True)
class Run:
    """Lengths, seeds, and numbers of reasoning samples; `limit`: questions of each task."""

    steps: int = 1000
    few_steps: int = 150
    seeds: int = 3
    samples: tuple[int, ...] = (0, 30, 300)
    limit: int = 200
    workdir: Path = Path("runs/lisa")
    out: Path | None = None


def experiment(run: Run, seed: int, mixture: tuple[Mix, ...], steps: int, **fields) -> Experiment:
    """tiny_lisa with another mixture and length."""
    base = config.load(ROOT / "configs" / "tiny_lisa.py")
    stage = dataclasses.replace(base.stages[0], steps=steps, mixture=mixture)
    settings = dataclasses.replace(base.run, save_every=0, evaluate_limit=0)
    return dataclasses.replace(base, seed=seed, stages=(stage,), run=settings, **fields)


def without_reasoning() -> tuple[Mix, ...]:
    """The config's mixture without the task of reasoning."""
    (stage,) = config.load(ROOT / "configs" / "tiny_lisa.py").stages
    return tuple(mix for mix in stage.mixture if mix.task != "reason")


def trained(run: Run, name: str, exp: Experiment) -> Params:
    """The parameters at the end of a run, which resumes if its folder exists."""
    return loop.train(exp, run.workdir / name, pipeline.batches)[0]


def figures(run: Run, exp: Experiment, params: Params) -> dict[str, float]:
    """cIoU of each task, of a blank image, and of the question with the noun alone."""
    model, found = from_params(exp, params), {}
    for task in TASKS:
        entry = runner.evaluate(model.engine, exp.data, exp.generation, task, limit=run.limit)
        found |= {task: entry["metrics"][f"{task}_ciou"], f"{task}, blind": entry["blind"][f"{task}_ciou"]}
    return found | noun_alone(model, run.limit)


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


def few_samples(run: Run, seed: int) -> dict[int, dict[str, float]]:
    """Figures by number of reasoning samples, after one training without any."""
    base = experiment(run, seed, without_reasoning(), run.steps)
    params = trained(run, f"without_{seed}", base)
    folder = run.workdir / f"without_{seed}" / "ours"
    if not folder.is_dir():
        convert.save(base, params, folder)
    found = {}
    for count in run.samples:
        scenes = base.data.sources[0]
        few = dataclasses.replace(scenes, name="few", sizes=(max(count, 1), 1, 1), seed=100 + seed)
        mixture = without_reasoning() + ((Mix("reason", FEW_WEIGHT, source="few"),) if count else ())
        mixture = tuple(mix if mix.source else dataclasses.replace(mix, source=scenes.name) for mix in mixture)
        data = dataclasses.replace(base.data, sources=(scenes, few))
        weights = (("", str(folder / "params.safetensors")),)
        exp = experiment(run, seed, mixture, run.few_steps, data=data, weights=weights)
        params = trained(run, f"few_{count}_{seed}", exp)
        found[count] = figures(run, dataclasses.replace(exp, data=base.data), params)
    return found


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
    whole = config.load(ROOT / "configs" / "tiny_lisa.py").stages[0].mixture
    exp = experiment(run, 0, whole, run.steps)
    rows = {"tiny_lisa": [figures(run, exp, trained(run, "tiny_lisa", exp))]}
    text = f"cIoU, {run.limit} held-out questions of each task, {run.steps} steps.\n\n{table(rows)}\n"
    print(text, flush=True)
    few: dict[str, list] = {}
    for seed in range(run.seeds):
        for count, row in few_samples(run, seed).items():
            few.setdefault(f"{count} reasoning samples", []).append(row)
    if few:
        text += f"\n{run.seeds} seeds, then {run.few_steps} steps with reasoning samples.\n\n{table(few)}\n"
    text += f"\nDevice: {jax.devices()[0].device_kind}, jax {jax.__version__}.\n"
    print(text, flush=True)
    if run.out is not None:
        part = run.out.with_suffix(".part")
        part.write_text(text)
        part.replace(run.out)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
