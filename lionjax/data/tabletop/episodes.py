# SPDX-License-Identifier: Apache-2.0
"""Episodes on the tabletop: a table and a goal.

`sample_episode(split, index)` is a pure function of its arguments. The splits `validation` and `train` have neither the
(color, shape) pairs that scenes hold out nor the (color, area) pairs of `held_out_area`; the object that a goal of
`heldout` is about has both, so that neither the goal nor the combination was seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lionjax.core.errors import UserError
from lionjax.data.scenes import world as scenes
from lionjax.data.tabletop import policy, world
from lionjax.data.tabletop.goals import GOALS, Goal
from lionjax.data.tabletop.world import Body, Table, area_of

MAX_PLAN = 5  # sub-goals that a goal needs at most, without failures
MAX_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Episode:
    """A table and a goal."""

    table: Table
    goal: Goal

    @property
    def text(self) -> str:
        """The goal in words."""
        return self.goal.text(self.table)


def held_out_area(color: str, area: int) -> bool:
    """Whether no training goal moves an object of this color to this area."""
    return (scenes.COLORS.index(color) + area) % 4 == 3


def sample_episode(split: str, index: int, seed: int = 0) -> Episode:
    """Episode `index` of a split; goals of all kinds take turns. Every goal needs at least two different sub-goals."""
    if split not in scenes.SPLITS:
        raise UserError(scenes.unknown_split_message(split))
    rng = np.random.default_rng([seed, 7, scenes.SPLITS.index(split), index])
    kind = GOALS[index % len(GOALS)]
    for _ in range(MAX_TRIES):
        episode = _draw_episode(kind, split, rng)
        if episode is None:
            continue
        plan = policy.solve(episode.table, episode.goal, MAX_PLAN)
        if plan is not None and len(set(plan)) >= 2:
            return episode
    raise UserError(f"no episode {index} of {split!r} was found in {MAX_TRIES} tries; give another seed")


def draw_goal(table: Table, rng: np.random.Generator) -> Goal:
    """A goal on a table that training may ask for, reached or not, of any kind and object.

    Half of them are about an object that is covered, lies on another or is in the hand, if there is one.
    """
    bodies = table.bodies
    stacked = [k for k, body in enumerate(bodies) if body.support != world.ON_TABLE or table.on_top(k) >= 0]
    target = int(rng.choice(stacked if stacked and rng.random() < 0.5 else len(bodies)))
    kind, support = GOALS[rng.integers(len(GOALS))], bodies[target].support
    if kind == "pick":
        return Goal(kind, target)
    if kind == "stack":
        other = (
            support
            if support >= 0 and rng.random() < 0.3
            else rng.choice([*range(target), *range(target + 1, len(bodies))])
        )
    else:
        other = rng.choice([area for area in range(9) if not held_out_area(bodies[target].color, area)])
    return Goal(kind, target, int(other))


def _draw_episode(kind: str, split: str, rng: np.random.Generator) -> Episode | None:
    """An episode whose goal is not reached; None where the draws do not fit together."""
    bodies = _draw_bodies(split, rng)
    others = list(range(1, len(bodies)))
    area_of_base = {k: area_of(body.x, body.y) for k, body in enumerate(bodies)}
    spare = [int(k) for k in rng.permutation(others)]
    goal_other = -1
    if kind == "stack":
        goal_other = spare.pop()
    elif kind != "pick":
        heldout = split == "heldout"
        free = [a for a in range(9) if a not in area_of_base.values()]
        free = [a for a in free if held_out_area(bodies[0].color, a) == heldout]
        if kind == "push":  # a way with a turn
            here = divmod(area_of_base[0], 3)
            free = [a for a in free if all(x != y for x, y in zip(divmod(a, 3), here))]
        if not free:
            return None
        goal_other = int(rng.choice(free))
    table = Table(tuple(bodies))
    covers = rng.random(2) < (0.35 if kind in ("push", "stack", "place") else 0.6, 0.25)
    if covers[0] and spare:
        table = _stacked(table, spare.pop(), 0)
    if covers[1] and spare and kind == "stack":
        table = _stacked(table, spare.pop(), goal_other)
    if rng.random() < 0.3 and spare:
        index = spare.pop()
        table = table.moved({index: {"x": world.HOME[0], "y": world.HOME[1], "support": world.IN_HAND}})
    goal = Goal(kind, 0, goal_other)
    return None if goal.is_reached(table) else _renumbered(Episode(table, goal), rng)


def _stacked(table: Table, index: int, below: int) -> Table:
    """The table with object `index` on object `below`."""
    base = table.bodies[below]
    return table.moved({index: {"x": base.x, "y": base.y, "support": below}})


def _draw_bodies(split: str, rng: np.random.Generator) -> list[Body]:
    """3 to 6 objects in different areas, with different names; the first is a held-out pair in the split `heldout`."""
    count = int(rng.integers(3, world.MAX_OBJECTS + 1))
    pairs = scenes.allowed_pairs(split)
    chosen = [pairs[k] for k in rng.choice(len(pairs), count, replace=False)]
    if split == "heldout":
        first = sorted(scenes.HELD_OUT_PAIRS)[rng.integers(len(scenes.HELD_OUT_PAIRS))]
        chosen = [first, *(pair for pair in chosen if pair != first)][:count]
    areas = rng.choice(9, count, replace=False)
    jitter = rng.uniform(-0.045, 0.045, (count, 2))
    places = [np.add(world.AREA_CENTERS[a], shift) for a, shift in zip(areas, jitter)]
    places = [np.clip(place, (world.LEFT, world.TOP), (world.RIGHT, world.BOTTOM)).tolist() for place in places]
    return [Body(color, shape, *place) for (color, shape), place in zip(chosen, places)]


def _renumbered(episode: Episode, rng: np.random.Generator) -> Episode:
    """The same episode with its objects in random order."""
    order = rng.permutation(len(episode.table.bodies)).tolist()  # new index k is old object order[k]
    place = {old: new for new, old in enumerate(order)}
    bodies = [episode.table.bodies[old] for old in order]
    bodies = [body._replace(support=place.get(body.support, body.support)) for body in bodies]
    goal = episode.goal
    other = place[goal.other] if goal.kind == "stack" else goal.other
    return Episode(Table(tuple(bodies)), Goal(goal.kind, place[goal.target], other))
