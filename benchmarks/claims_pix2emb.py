# SPDX-License-Identifier: Apache-2.0
"""Ablations of NExT-Chat's box embeddings (pix2emb, arXiv 2311.04498) on synthetic scenes, at small scale.

python -m benchmarks.claims_pix2emb [--claims boxes cycles masks] [--seeds 3] [--steps 250] [--limit 150] [--out FILE]

boxes: box embeddings with detection losses (L1 and GIoU) against boxes as text, in Shikra's digits and in Kosmos-2's
location tokens, with the same model, data and steps. REC is scored on generated answers in all rows, and with teacher
forcing for embeddings, as in the paper. The shipped language model is pretrained on digits, so that row has a large
head start; for embeddings it knows the token that triggers one; the 256 location tokens are new.
cycles: with and without the two cycle losses, on tasks with a box in the question, at several training steps.
masks: after training on boxes, masks trained on 100 %, 10 % and 1 % of the training images, and not at all.

Each row is the mean over seeds (of data, initialization and order) with minimum and maximum. The model is that of
configs/tiny_lionjax.py with the aggregator stream only and without tags: like the paper's, its frozen language model is
pretrained. configs/tiny_nextchat.py trains its decoder from scratch and predicts the same box for all images for much
longer than this.

Finished runs are reused; delete --workdir to start over.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from safetensors.numpy import load_file, save_file

from lionjax import convert
from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.types import Params
from lionjax.data import pipeline
from lionjax.evaluation import runner
from lionjax.inference.loading import dummy_batch, from_params
from lionjax.training import checkpoint, loop
from lionjax.training.init import make_param_specs, resolve_weights_file

ROOT = Path(__file__).resolve().parent.parent
SEEING = ("aggregator", "aggregator_norm", "aggregator_projector", ".*/adapters")
NEW = {  # parameters that only this box format has; 4x learning rate, as in the stages of tiny_lionjax
    "embeddings": ("locations",),
    "digits": (),
    "bins": ("language/embedding", "language/head"),
}
WEIGHTS = {"l1_weight": 2.0, "giou_weight": 0.2, "cycle_weight": 1.0}  # of the released code
WORDS, BINS = 1024, 16  # vocabulary size of the shipped language model; location bins per side
ASKED_WITH_A_BOX = (("reg", 2.0), ("box_vqa", 2.0), ("rec", 1.0))
SHARES = (1.0, 0.1, 0.01)
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """Which ablations to run, seeds and lengths. `points`: number of evaluations during the training of `cycles`."""

    claims: tuple[str, ...] = ("boxes", "cycles", "masks")
    seeds: int = 3
    steps: int = 250
    mask_steps: int = 60
    points: int = 2
    limit: int = 150
    batch: int = 32
    scenes: int = 2400
    workdir: Path = Path("runs/claims_pix2emb")
    out: Path | None = None


def experiment(run: Run, seed: int, stage: Stage, box_format: str = "embeddings", **region_fields) -> Experiment:
    """tiny_lionjax with one stage and one box format; `region_fields` replace fields of its RegionHeadConfig."""
    base = config.load(ROOT / "configs" / "tiny_lionjax.py")
    model, data = base.model, base.data
    model = dataclasses.replace(
        model,
        visual_input="AGGREGATOR",
        soft_prompt_token_id=None,
        region_head=dataclasses.replace(model.region_head, **WEIGHTS | region_fields),
    )
    lengths = {
        "max_prompt_tokens": 20,
        "max_question_tokens": 1,
        "max_target_tokens": 20 if box_format == "digits" else 8,
    }
    box_fields = {"use_tags": False, "box_format": box_format, "max_boxes": 6 if box_format == "embeddings" else 0}
    weights = tuple((part, file) for part, file in base.weights if part != "locations")  # region head from scratch
    if box_format == "bins":
        vocab_size = WORDS + BINS**2
        model = dataclasses.replace(model, language=dataclasses.replace(model.language, vocab_size=vocab_size))
        weights = tuple((part, with_bins(run) if part == "language" else w) for part, w in weights)
        box_fields["location_bins_per_side"] = BINS
    sources = (dataclasses.replace(data.sources[0], sizes=(run.scenes, 300, 400), image_size=112, seed=seed),)
    processor = dataclasses.replace(data.processor, **lengths, **box_fields)
    data = dataclasses.replace(data, sources=sources, processor=processor, mask_fraction=1.0)
    return dataclasses.replace(
        base,
        seed=seed,
        model=model,
        data=data,
        stages=(stage,),
        weights=weights,
        run=dataclasses.replace(base.run, save_every=0, evaluate_limit=0),
    )


def with_bins(run: Run) -> str:
    """The path of the shipped language model's weights with BINS ** 2 randomly initialized tokens added."""
    file = run.workdir / "tiny_t5_with_bins.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        weights, rng = (load_file(resolve_weights_file("shipped:tiny_t5.safetensors")), np.random.default_rng(0))
        for name, axis in (("language/embedding/table", 0), ("language/head/kernel", 1)):
            old = weights[name]
            shape = (BINS**2, old.shape[1]) if axis == 0 else (old.shape[0], BINS**2)
            new_rows = rng.standard_normal(shape).astype(old.dtype) * old.std()
            weights[name] = np.concatenate([old, new_rows], axis)
        save_file(weights, file)
    return str(file)


def stage(run: Run, mixture, box_format: str = "embeddings") -> Stage:
    """The training stage of one box format."""
    return Stage(
        "words_and_boxes",
        run.steps,
        (*SEEING, *NEW[box_format]),
        tuple(mixture),
        run.batch,
        learning_rate=1e-3,
        warmup_steps=20,
        weight_decay=0.01,
        clip_norm=1.0,
        lr_multipliers=tuple((part, 4.0) for part in NEW[box_format]),
    )


def trained(run: Run, name: str, exp: Experiment) -> Params:
    """The parameters at the end of a run, which resumes if its folder exists."""
    return loop.train(exp, run.workdir / name, pipeline.batches)[0]


def figures(run: Run, exp: Experiment, params: Params, names: tuple[str, ...]) -> Figures:
    """Metrics of benchmarks on held-out scenes, including those with teacher forcing."""
    engine, metrics = from_params(exp, params).engine, {}
    for name in names:
        entry = runner.evaluate(engine, exp.data, exp.generation, name, limit=run.limit)
        metrics |= entry["metrics"] | {f"{name}_{key}": value for key, value in entry["details"].items()}
        for key, value in entry.get("teacher_forced", {}).items():
            metrics[f"{key}_teacher_forced"] = value
    return metrics


def boxes(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """Metrics of embeddings, digits and location tokens after the same number of steps."""
    for box_format in NEW:
        exp = experiment(run, seed, stage(run, [("rec", 1.0)], box_format), box_format)
        params = trained(run, f"boxes_{box_format}_{seed}", exp)
        yield box_format, figures(run, exp, params, ("rec",))


def cycles(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """Metrics with and without the cycle losses, at several steps."""
    every = run.steps // run.points
    for name, weight in (("with cycles", 1.0), ("without", 0.0)):
        exp = experiment(run, seed, stage(run, ASKED_WITH_A_BOX), cycle_weight=weight)
        saves = dataclasses.replace(exp.run, save_every=every, max_to_keep=run.points)
        exp, folder = dataclasses.replace(exp, run=saves), f"cycles_{weight:g}_{seed}"
        last_params = trained(run, folder, exp)
        for step in range(every, run.steps + 1, every):
            params = last_params if step == run.steps else at(run.workdir / folder, exp, last_params, step)
            yield f"{name}, {step} steps", figures(run, exp, params, ("reg", "box_vqa"))


def at(folder: Path, exp: Experiment, last_params: Params, step: int) -> Params:
    """The parameters at a saved step; frozen parameters are taken from the end of the run."""
    mesh = sharding.make_mesh(exp.mesh)
    batch = dummy_batch(from_params(exp, last_params, mesh=mesh).processor)
    abstract = {"trainable": make_param_specs(exp, batch, mesh).trainable}
    items, _ = checkpoint.restore_tree(folder / "checkpoints" / str(step), abstract)
    _, frozen = trees.split(last_params, exp.stages[0].trainable)
    return trees.merge(items["trainable"], frozen)


def masks(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """Metrics with masks trained on a fraction of the images, after one training on boxes."""
    exp = experiment(run, seed, stage(run, [("rec", 1.0)]))
    params = trained(run, f"boxes_embeddings_{seed}", exp)
    yield "no masks", figures(run, exp, params, ("res",))
    weights_folder = run.workdir / f"boxes_embeddings_{seed}" / "ours"
    if not weights_folder.is_dir():
        convert.save(exp, params, weights_folder)
    mask_stage = dataclasses.replace(
        stage(run, [("res", 1.0)]),
        name="masks",
        steps=run.mask_steps,
        trainable=("mask_prompts", "sam/decoder"),
        lr_multipliers=(),
        model_overrides=(("objective", "masks"),),
    )
    for fraction in SHARES:
        data = dataclasses.replace(exp.data, mask_fraction=fraction)
        weights = (("", str(weights_folder / "params.safetensors")),)
        mask_exp = dataclasses.replace(exp, data=data, stages=(mask_stage,), weights=weights)
        params = trained(run, f"masks_{fraction:g}_{seed}", mask_exp)
        yield f"{fraction:.0%} of the masks", figures(run, mask_exp, params, ("res",))


CLAIMS = {"boxes": boxes, "cycles": cycles, "masks": masks}
SHOWN = {
    "boxes": ("rec_accuracy_50", "rec_mean_iou", "rec_accuracy_50_teacher_forced"),
    "cycles": ("reg_cider", "reg_exact", "box_vqa_accuracy"),
    "masks": ("res_ciou", "res_giou"),
}


def table(claim: str, rows: dict[str, list[Figures]]) -> str:
    """The rows of one ablation in Markdown: mean (minimum to maximum)."""
    columns = [
        key
        for key in SHOWN[claim]
        if any(key in metrics for metrics_by_seed in rows.values() for metrics in metrics_by_seed)
    ]
    lines = [f"| {claim} | {' | '.join(key.replace('_', ' ') for key in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, metrics_by_seed in rows.items():
        cells = []
        for key in columns:
            values = [metrics[key] for metrics in metrics_by_seed if key in metrics]
            spread = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            cells.append(spread)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(run: Run) -> None:
    """Run the ablations and print their tables."""
    results: dict[str, dict[str, list[Figures]]] = {claim: {} for claim in run.claims}
    for claim in run.claims:
        for seed in range(run.seeds):
            for name, row in CLAIMS[claim](run, seed):
                results[claim].setdefault(name, []).append(row)
                rounded = {key: round(row[key], 3) for key in SHOWN[claim] if key in row}
                print(f"{claim}, seed {seed}, {name}: {rounded}", flush=True)
        print(f"\n{table(claim, results[claim])}\n", flush=True)
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{run.seeds} seeds, {run.steps} steps, {run.limit} questions each; {device}")
    if run.out is not None:
        part = run.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(run.out)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
