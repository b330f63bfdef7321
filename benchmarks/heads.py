# SPDX-License-Identifier: Apache-2.0
"""Overhead of the region head and mask decoding in a train step of configs/tiny_lionjax.py (goal: under 15 %).

python -m benchmarks.heads [--batch 32] [--repeats 15] [--pictures]

Times one batch of the second-to-last stage with `res` added to its tasks: text only; text and boxes (box encoder,
decoder and their four losses); text, boxes and masks (objective "all"). Frozen features are cached, as in training;
with --pictures they are computed in every step. The masks stage is timed for comparison: its language model has no
backward pass.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from pathlib import Path

import jax
import tyro

from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch
from lionjax.data import pipeline
from lionjax.training.init import init_params, make_param_specs
from lionjax.training.optimizer import make_optimizer
from lionjax.training.step import init_train_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.15


@dataclasses.dataclass(frozen=True)
class Run:
    """Batch size, number of timed steps, and whether the frozen towers run in every step (`pictures`)."""

    batch: int = 32
    repeats: int = 15
    pictures: bool = False


def prepared(run: Run) -> tuple[Experiment, Batch]:
    """The tiny_lionjax experiment and a batch with boxes and masks."""
    experiment = config.load(ROOT / "configs" / "tiny_lionjax.py")
    base_stage = next(stage for stage in experiment.stages if stage.name == "both_levels")
    mixture = (*base_stage.mixture, ("res", 3.0))
    stage = dataclasses.replace(base_stage, mixture=mixture, batch_size=run.batch)
    stream = pipeline.batches(experiment.data, stage, 0, run.batch, 0, 1)
    batch = next(stream)
    stream.close()
    return experiment, batch


def step_of(experiment: Experiment, system, trainable: tuple[str, ...], batch: Batch, params, mesh):
    """A function that runs one update with `trainable` parameters."""
    stage = dataclasses.replace(experiment.stages[-2], trainable=trainable, lr_multipliers=())
    learned, frozen = trees.split(params, stage.trainable)
    optimizer = make_optimizer(stage, learned)
    state = [init_train_state(optimizer, jax.tree.map(lambda x: x.copy(), learned), mesh)]
    update = make_train_step(system, stage, optimizer, jax.random.key(0), state[0], mesh, [])

    def step() -> None:
        state[0], metrics = update(state[0], frozen, batch)
        jax.block_until_ready((state[0], metrics))

    return step


def main() -> None:
    """Time the steps and print the table."""
    run = tyro.cli(Run, description=__doc__)
    experiment, batch = prepared(run)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = trees.merge(*init_params(experiment, batch, make_param_specs(experiment, batch, mesh)))
    model = experiment.model
    text_only = dataclasses.replace(model, region_head=None, sam=None)
    trainable, mask_parts = experiment.stages[-2].trainable, experiment.stages[-1].trainable
    language_parts = tuple(part for part in trainable if part != "locations")
    if not run.pictures:
        features = jax.jit(model.extract_features)(params, batch)
        batch = dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)
    batch = sharding.shard_batch(batch, mesh)
    masks_only, text_and_masks = (dataclasses.replace(model, objective=objective) for objective in ("masks", "all"))
    steps = {
        "text": step_of(experiment, text_only, language_parts, without_masks(batch), params, mesh),
        "text and boxes": step_of(experiment, model, trainable, without_masks(batch), params, mesh),
        "text, boxes and masks": step_of(experiment, text_and_masks, (*trainable, *mask_parts), batch, params, mesh),
        "masks stage": step_of(experiment, masks_only, mask_parts, batch, params, mesh),
    }
    tell("from images" if run.pictures else "cached features", measured(steps, run.repeats))


def without_masks(batch: Batch) -> Batch:
    """The batch without masks, as in the stages before masks; the cached SAM features stay unused."""
    return dataclasses.replace(batch, masks_BKHW=None, masks_mask_BK=None, sam_image_BHWC=None)


def measured(steps: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each step function, run in a random order in each repeat."""
    seconds_by_name = {name: [] for name in steps}
    order = random.Random(0)
    for repeat in range(repeats + 2):
        for name, step in order.sample(list(steps.items()), len(steps)):
            start_time = time.perf_counter()
            step()
            if repeat > 1:
                seconds_by_name[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(values) for name, values in seconds_by_name.items()}


def tell(name: str, seconds: dict[str, float]) -> None:
    """Print the table and the overhead."""
    first = seconds["text"]
    print(f"\n| {name} | ms | vs. text |\n|---|---|---|")
    for step, taken in seconds.items():
        print(f"| {step} | {1e3 * taken:.0f} | {taken / first:.3f}x |")
    added = seconds["text, boxes and masks"] / first - 1
    print(f"\nregion head and mask decoding add {added:.1%} (goal: under {GOAL:.0%})", flush=True)


if __name__ == "__main__":
    main()
