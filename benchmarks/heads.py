# SPDX-License-Identifier: Apache-2.0
"""What box heads and mask decoding add to a train step of the tiny flagship (goal: under 15 %).

python -m benchmarks.heads [--batch 32] [--repeats 15] [--pictures]

One batch of the last stage but one with `res` among its tasks; the step of configs/tiny_lionjax.py with both streams:
words alone; words and boxes (G, F and their four losses); words, boxes and the masks of the same states (the objective
"all"). The frozen features are kept, as in the demo; with --pictures they are computed in every step.
The masks stage as it is stands beside it: there the language model has no backward pass.
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
from lionjax.training import step as stages
from lionjax.training.init import init_params, make_param_specs
from lionjax.training.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.15


@dataclasses.dataclass(frozen=True)
class Run:
    """How many rows, how often, and whether the frozen towers run in every step."""

    batch: int = 32
    repeats: int = 15
    pictures: bool = False


def prepared(run: Run) -> tuple[Experiment, Batch]:
    """The flagship's experiment and a batch with boxes and masks."""
    what = config.load(ROOT / "configs" / "tiny_lionjax.py")
    both = next(stage for stage in what.stages if stage.name == "both_levels")
    mixture = (*both.mixture, ("res", 3.0))
    stage = dataclasses.replace(both, mixture=mixture, batch_size=run.batch)
    stream = pipeline.batches(what.data, stage, 0, run.batch, 0, 1)
    batch = next(stream)
    stream.close()
    return what, batch


def step_of(what: Experiment, system, trainable: tuple[str, ...], batch: Batch, params, mesh):
    """A function that does one update with these parts learning."""
    stage = dataclasses.replace(what.stages[-2], trainable=trainable, lr_multipliers=())
    learned, frozen = trees.split(params, stage.trainable)
    rule = make_optimizer(stage, learned)
    held = [stages.init_train_state(rule, jax.tree.map(lambda x: x.copy(), learned), mesh)]
    update = stages.make_train_step(system, stage, rule, jax.random.key(0), held[0], mesh, [])

    def step() -> None:
        held[0], metrics = update(held[0], frozen, batch)
        jax.block_until_ready((held[0], metrics))

    return step


def main() -> None:
    run = tyro.cli(Run, description=__doc__)
    what, batch = prepared(run)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = trees.merge(*init_params(what, batch, make_param_specs(what, batch, mesh)))
    words = what.model
    plain = dataclasses.replace(words, places=None, sam=None)
    learned, mask_parts = what.stages[-2].trainable, what.stages[-1].trainable
    bare = tuple(part for part in learned if part != "locations")
    if not run.pictures:
        seen = jax.jit(words.features)(params, batch)
        batch = dataclasses.replace(batch, features=seen, image_BHWC=None, sam_image_BHWC=None)
    batch = sharding.shard_batch(batch, mesh)
    only, both = (dataclasses.replace(words, objective=objective) for objective in ("masks", "all"))
    steps = {
        "words": step_of(what, plain, bare, without_masks(batch), params, mesh),
        "words and boxes": step_of(what, words, learned, without_masks(batch), params, mesh),
        "words, boxes and masks": step_of(what, both, (*learned, *mask_parts), batch, params, mesh),
        "the masks stage": step_of(what, only, mask_parts, batch, params, mesh),
    }
    tell("from pictures" if run.pictures else "features kept", measured(steps, run.repeats))


def without_masks(batch: Batch) -> Batch:
    """As the stages before masks have it; of what is kept, the map stays unused."""
    return dataclasses.replace(batch, masks_BKHW=None, masks_mask_BK=None, sam_image_BHWC=None)


def measured(steps: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in turns, each turn in an order of its own."""
    taken = {name: [] for name in steps}
    order = random.Random(0)
    for turn in range(repeats + 2):
        for name, step in order.sample(list(steps.items()), len(steps)):
            begun = time.perf_counter()
            step()
            if turn > 1:
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def tell(name: str, seconds: dict[str, float]) -> None:
    first = seconds["words"]
    print(f"\n| {name} | ms | against words |\n|---|---|---|")
    for step, taken in seconds.items():
        print(f"| {step} | {1e3 * taken:.0f} | {taken / first:.3f}x |")
    added = seconds["words, boxes and masks"] / first - 1
    print(f"\nbox heads and mask decoding add {added:.1%} (goal: under {GOAL:.0%})", flush=True)


if __name__ == "__main__":
    main()
