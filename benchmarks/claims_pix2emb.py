# SPDX-License-Identifier: Apache-2.0
"""What NExT-Chat's paper claims of places as embeddings (pix2emb), tested small, on held-out drawn scenes.

python -m benchmarks.claims_pix2emb [--claims boxes cycles masks] [--seeds 3] [--steps 250] [--limit 150] [--out FILE]

boxes: the detection losses (L1 and GIoU) on embeddings against boxes written as text, in Shikra's digits and in
Kosmos-2's location tokens: the same model, data and steps. REC by real generation in all rows; read behind the true
words (teacher-forced) where there are embeddings, as the paper does. The shipped language model knows digits from its
own training, so that row begins far ahead; of embeddings it knows the word that announces one, of location tokens (256
new words) nothing.
cycles: with and without the two cycle losses, on tasks that are asked with a box, at several points of the training.
masks: after training on boxes, masks learned from 100 %, 10 % and 1 % of the training pictures; and none at all.

Each row is the mean over seeds (data, first weights and order all follow the seed) with the least and the most.
The model is the flagship of configs/tiny_lionjax.py with the aggregator's stream alone and without tags: its small
frozen language model can read, as the paper's can. configs/tiny_nextchat.py, whose decoder begins with nothing, points
at the same place everywhere for much longer than this.

Finished runs are not made again: delete --workdir to start over.
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
NEW = {  # what only this way to say boxes has; it learns four times as fast, as in the flagship's stages
    "embeddings": ("locations",),
    "digits": (),
    "bins": ("language/embedding", "language/head"),
}
WEIGHTS = {"l1_weight": 2.0, "giou_weight": 0.2, "cycle_weight": 1.0}  # of the released code
WORDS, BINS = 1024, 16  # of the shipped language model; a side of the location tokens
ASKED_WITH_A_BOX = (("reg", 2.0), ("box_vqa", 2.0), ("rec", 1.0))
SHARES = (1.0, 0.1, 0.01)
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """Which claims, how often, and how long. `points`: how often the training of `cycles` is looked at."""

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


def experiment(run: Run, seed: int, stage: Stage, how: str = "embeddings", **places) -> Experiment:
    """The small flagship with one stage, which says boxes in one way; `places` replace fields of its config's."""
    whole = config.load(ROOT / "configs" / "tiny_lionjax.py")
    system, data = whole.model, whole.data
    system = dataclasses.replace(
        system,
        visual_input="AGGREGATOR",
        soft_prompt_token_id=None,
        places=dataclasses.replace(system.places, **WEIGHTS | places),
    )
    lengths = {"prompt_length": 20, "question_length": 1, "target_length": 20 if how == "digits" else 8}
    rest = {"tags": False, "places": how, "boxes": 6 if how == "embeddings" else 0}
    weights = tuple(pair for pair in whole.weights if pair[0] != "locations")  # nothing known
    if how == "bins":
        words = WORDS + BINS**2
        system = dataclasses.replace(system, language=dataclasses.replace(system.language, vocab=words))
        weights = tuple((part, with_bins(run) if part == "language" else w) for part, w in weights)
        rest["bins"] = BINS
    sources = (dataclasses.replace(data.sources[0], sizes=(run.scenes, 300, 400), pixels=112, seed=seed),)
    processor = dataclasses.replace(data.processor, **lengths, **rest)
    data = dataclasses.replace(data, sources=sources, processor=processor, mask_fraction=1.0)
    return dataclasses.replace(
        whole,
        seed=seed,
        system=system,
        data=data,
        stages=(stage,),
        weights=weights,
        run=dataclasses.replace(whole.run, save_every=0, evaluate_limit=0),
    )


def with_bins(run: Run) -> str:
    """A file of the shipped language model with as many more words, which mean nothing yet."""
    file = run.workdir / "tiny_t5_with_bins.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        weights, rng = (load_file(resolve_weights_file("shipped:tiny_t5.safetensors")), np.random.default_rng(0))
        for name, axis in (("language/embedding/table", 0), ("language/head/kernel", 1)):
            old = weights[name]
            shape = (BINS**2, old.shape[1]) if axis == 0 else (old.shape[0], BINS**2)
            more = rng.standard_normal(shape).astype(old.dtype) * old.std()
            weights[name] = np.concatenate([old, more], axis)
        save_file(weights, file)
    return str(file)


def stage(run: Run, mixture, how: str = "embeddings") -> Stage:
    return Stage(
        "words_and_boxes",
        run.steps,
        (*SEEING, *NEW[how]),
        tuple(mixture),
        run.batch,
        learning_rate=1e-3,
        warmup_steps=20,
        weight_decay=0.01,
        clip_norm=1.0,
        lr_multipliers=tuple((part, 4.0) for part in NEW[how]),
    )


def trained(run: Run, name: str, what: Experiment) -> Params:
    """The parameters at the end of a run, which goes on where its folder stands."""
    return loop.train(what, run.workdir / name, pipeline.batches)[0]


def figures(run: Run, what: Experiment, params: Params, names: tuple[str, ...]) -> Figures:
    """Metrics of some benchmarks on held-out scenes, those read behind the true words among them."""
    answerer, found = from_params(what, params).engine, {}
    for name in names:
        entry = runner.evaluate(answerer, what.data, what.generation, name, limit=run.limit)
        found |= entry["metrics"] | {f"{name}_{key}": value for key, value in entry["details"].items()}
        for key, value in entry.get("teacher_forced", {}).items():
            found[f"{key}_teacher_forced"] = value
    return found


def boxes(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """Embeddings, digits and location tokens after the same steps."""
    for how in NEW:
        what = experiment(run, seed, stage(run, [("rec", 1.0)], how), how)
        params = trained(run, f"boxes_{how}_{seed}", what)
        yield how, figures(run, what, params, ("rec",))


def cycles(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """With and without the cycle losses, at several points."""
    every = run.steps // run.points
    for name, weight in (("with cycles", 1.0), ("without", 0.0)):
        what = experiment(run, seed, stage(run, ASKED_WITH_A_BOX), cycle_weight=weight)
        saves = dataclasses.replace(what.run, save_every=every, keep=run.points)
        what, folder = dataclasses.replace(what, run=saves), f"cycles_{weight:g}_{seed}"
        last = trained(run, folder, what)
        for step in range(every, run.steps + 1, every):
            params = last if step == run.steps else at(run.workdir / folder, what, last, step)
            yield f"{name}, {step} steps", figures(run, what, params, ("reg", "box_vqa"))


def at(folder: Path, what: Experiment, last: Params, step: int) -> Params:
    """The parameters at a step that was saved: what no step changes is as at the end."""
    mesh = sharding.make_mesh(what.mesh)
    first = dummy_batch(from_params(what, last, mesh=mesh).processor)
    like = {"trainable": make_param_specs(what, first, mesh).trainable}
    items, _ = checkpoint.restore_tree(folder / "checkpoints" / str(step), like)
    _, never = trees.split(last, what.stages[0].trainable)
    return trees.merge(items["trainable"], never)


def masks(run: Run, seed: int) -> Iterator[tuple[str, Figures]]:
    """Masks from few of them, on top of one training on boxes."""
    what = experiment(run, seed, stage(run, [("rec", 1.0)]))
    params = trained(run, f"boxes_embeddings_{seed}", what)
    yield "no mask seen", figures(run, what, params, ("res",))
    kept = run.workdir / f"boxes_embeddings_{seed}" / "ours"
    if not kept.is_dir():
        convert.save(what, params, kept)
    last = dataclasses.replace(
        stage(run, [("res", 1.0)]),
        name="masks",
        steps=run.mask_steps,
        trainable=("mask_prompts", "sam/decoder"),
        lr_multipliers=(),
        system=(("objective", "masks"),),
    )
    for share in SHARES:
        data = dataclasses.replace(what.data, mask_fraction=share)
        weights = (("", str(kept / "params.safetensors")),)
        more = dataclasses.replace(what, data=data, stages=(last,), weights=weights)
        params = trained(run, f"masks_{share:g}_{seed}", more)
        yield f"{share:.0%} of the masks", figures(run, more, params, ("res",))


CLAIMS = {"boxes": boxes, "cycles": cycles, "masks": masks}
SHOWN = {
    "boxes": ("rec_accuracy_50", "rec_mean_iou", "rec_accuracy_50_teacher_forced"),
    "cycles": ("reg_cider", "reg_exact", "box_vqa_accuracy"),
    "masks": ("res_ciou", "res_giou"),
}


def table(claim: str, rows: dict[str, list[Figures]]) -> str:
    """The rows of one claim in Markdown: mean (least to most)."""
    shown = [key for key in SHOWN[claim] if any(key in found for each in rows.values() for found in each)]
    lines = [f"| {claim} | {' | '.join(key.replace('_', ' ') for key in shown)} |", "|---" * (1 + len(shown)) + "|"]
    for name, each in rows.items():
        cells = []
        for key in shown:
            values = [found[key] for found in each if key in found]
            spread = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            cells.append(spread)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(run: Run) -> None:
    found: dict[str, dict[str, list[Figures]]] = {claim: {} for claim in run.claims}
    for claim in run.claims:
        for seed in range(run.seeds):
            for name, row in CLAIMS[claim](run, seed):
                found[claim].setdefault(name, []).append(row)
                shown = {key: round(row[key], 3) for key in SHOWN[claim] if key in row}
                print(f"{claim}, seed {seed}, {name}: {shown}", flush=True)
        print(f"\n{table(claim, found[claim])}\n", flush=True)
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{run.seeds} seeds, {run.steps} steps, {run.limit} questions each; {where}")
    if run.out is not None:
        part = run.out.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(run.out)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
