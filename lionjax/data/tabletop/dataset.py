# SPDX-License-Identifier: Apache-2.0
"""The tabletop as a data source: moments of episodes, some of them after a failure or a wrong step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lionjax.core.errors import check_choices, check_ranges
from lionjax.data.datasets.source import SPLITS
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes.tasks import Example
from lionjax.data.tabletop import episodes, goals, policy, tasks, world
from lionjax.data.tabletop.tasks import Moment

CACHED_MOMENTS = 20_000  # of a few hundred bytes each


@dataclass(frozen=True)
class Tabletop:
    """Moments on the tabletop. `sizes`: number of train, validation and heldout episodes, of each of which one moment.

    `sentence`: how the table is sensed, "objects", "state" or "image". `failure_rate`: of the steps before a moment;
    `wander_rate`: share of these steps that are any possible sub-goal instead of the planner's. Raises ValueError or
    UserError for values out of range.
    """

    sizes: tuple[int, int, int] = (3000, 300, 400)
    image_size: int = 112
    sentence: str = "objects"
    failure_rate: float = 0.25
    wander_rate: float = 0.1
    seed: int = 0
    name: str = "tabletop"

    def __post_init__(self):
        check_choices(self, sentence=tasks.SENTENCES)
        where = f"source {self.name!r}: "
        check_ranges(self, where, sizes=">= 0", image_size=">= 16", seed=f">= 0 and < {2**32}")
        check_ranges(self, where, failure_rate=">= 0 and <= 1", wander_rate=">= 0 and <= 1")

    def open(self, split: str, max_pixels: int) -> OpenTabletop:
        return OpenTabletop(self, split)


def sample_moment(source: Tabletop, split: str, index: int) -> Moment:
    """The moment of episode `index`: a drawn number of steps on the way, up to the goal itself."""
    return _sample_moment(source.seed, source.failure_rate, source.wander_rate, split, index)


@functools.lru_cache(CACHED_MOMENTS)  # sources that differ in the sentence alone have the same moments
def _sample_moment(seed: int, failure_rate: float, wander_rate: float, split: str, index: int) -> Moment:
    episode = episodes.sample_episode(split, index, seed)
    rng = np.random.default_rng([seed, 8, SPLITS.index(split), index])
    table, goal = episode.table, episode.goal
    plan = policy.solve(table, goal, episodes.MAX_PLAN) or []
    last, failed = None, False
    for _ in range(int(rng.integers(len(plan) + 1))):
        subgoal = goals.next_subgoal(table, goal)
        if rng.random() < wander_rate:
            possible = goals.possible_subgoals(table)
            subgoal = possible[rng.integers(len(possible))]
        if subgoal == goals.DONE:
            break
        failed = bool(rng.random() < failure_rate)
        last, table = subgoal, policy.execute(table, subgoal, failed, rng)
    return Moment(table, goal, last, failed)


class OpenTabletop:
    """One split of the tabletop; every moment has one example of each task, which is drawn anew on every access."""

    has_splits = True

    def __init__(self, config: Tabletop, split: str):
        self.config, self.split = config, split
        self.num_moments = config.sizes[SPLITS.index(split)]
        self.task_sizes = dict.fromkeys(tasks.TASKS, self.num_moments)
        self._packed_masks = functools.lru_cache(CACHED_MOMENTS)(self._pack_masks)

    def __len__(self) -> int:
        return self.num_moments

    def row_problems(self) -> Iterator[str]:
        return iter(())

    def record_index(self, task: str, index: int) -> int:
        return index

    def record_name(self, record_index: int) -> str:
        return f"{self.split}-{self.config.seed}-{record_index:06d}"

    def moment(self, record_index: int) -> Moment:
        """The moment of a record."""
        return sample_moment(self.config, self.split, record_index)

    def load_record(self, record_index: int) -> tuple[np.ndarray, Moment]:
        moment = self.moment(record_index)
        return world.render(moment.table, self.config.image_size), moment

    def make_example(self, task: str, index: int, truth: Moment, rng, tag_noise: float) -> Example:
        if task != "dialog" or self.split == "heldout":  # there the goal is a part of what is held out
            return tasks.make_example(task, truth, self.config.sentence, rng)
        new_goal = functools.partial(episodes.draw_goal, truth.table, rng)
        return tasks.make_example(task, truth, self.config.sentence, rng, new_goal)

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        side = self.config.image_size
        bits = np.unpackbits(self._packed_masks(record_index)[list(regions)], axis=1, count=side * side)
        return bits.reshape(-1, side, side).astype(bool)

    def _pack_masks(self, record_index: int) -> np.ndarray:
        """The masks of all objects, eight pixels a byte."""
        masks = world.object_masks(self.moment(record_index).table, self.config.image_size)
        return np.packbits(masks.reshape(len(masks), -1), axis=1)

    def load_regions(self, record_index: int) -> ImageRegions | None:
        return None
