# SPDX-License-Identifier: Apache-2.0
"""The low-level policy: a sub-goal becomes actions of the simulator, which may fail as the gripper slips.

The policy knows where everything is, and nothing about goals. It returns to `HOME` after each sub-goal.
"""

from __future__ import annotations

import numpy as np

from lionjax.data.tabletop import world
from lionjax.data.tabletop.goals import DONE, Goal, Subgoal, next_subgoal, push_action
from lionjax.data.tabletop.world import AREA_CENTERS, AREAS, HOME, MAX_MOVE, Action, Table, area_of

MISS = (0.0, 0.11)  # by how much a slipping gripper misses an object
GRID = 7  # places a side that are tried in an area


def execute(table: Table, subgoal: Subgoal, slips: bool = False, rng: np.random.Generator | None = None) -> Table:
    """The table after a sub-goal was tried; what cannot be done changes nothing.

    `slips`: it fails. A pick closes beside the object, what is put falls down in another area, which `rng` draws, and a
    push or a "put it down" does nothing.
    """
    return run(table, actions(table, subgoal, slips, rng))[0]


def run(table: Table, plan: list[Action]) -> tuple[Table, int]:
    """(the table after some actions, and after the way back to `HOME`; the number of all of them)."""
    for action in plan:
        table = world.step(table, action)
    back = approach(table, *HOME)
    for action in back:
        table = world.step(table, action)
    return table, len(plan) + len(back)


def approach(table: Table, x: float, y: float) -> list[Action]:
    """Moves to a place."""
    dx, dy = x - table.gripper[0], y - table.gripper[1]
    count = max(1, int(np.ceil(max(abs(dx), abs(dy)) / MAX_MOVE)))
    return [Action("move", dx / count, dy / count)] * count


def actions(table: Table, subgoal: Subgoal, slips: bool = False, rng: np.random.Generator | None = None):
    """The actions of a sub-goal, without the way back; none for what cannot be done, or is done already."""
    verb, index, direction = subgoal
    if verb == "done" or (table.held >= 0) != verb.startswith("put"):
        return []
    if verb == "put_on":
        return _put_on(table, index, slips, rng)
    if verb in ("put_at", "put_down"):
        return _put_at(table, index if verb == "put_at" else -1, slips, rng)
    body = table.bodies[index]
    if verb == "pick":
        miss = MISS if slips else (0.0, 0.0)
        return [*approach(table, body.x + miss[0], body.y + miss[1]), Action("pick")]
    return [] if slips else [*approach(table, body.x, body.y), push_action(body, direction)]


def _put_on(table: Table, index: int, slips: bool, rng) -> list[Action]:
    if slips:
        return _put_at(table, -1, False, rng)
    if index == table.held:
        return []
    body = table.bodies[index]
    return [*approach(table, body.x, body.y), Action("stack")]


def _put_at(table: Table, area: int, slips: bool, rng) -> list[Action]:
    """Put what is held into an area, or (-1) into the free one that is nearest, or that `rng` draws."""
    if slips and area < 0:
        return []
    order = list(range(len(AREAS)))
    if rng is not None:
        order = rng.permutation(order).tolist()
    wanted = [k for k in order if k != area] if slips or area < 0 else [area]
    for k in wanted:
        if (place := free_place(table, k)) is not None:
            return [*approach(table, *place), Action("place")]
    return []


def free_place(table: Table, area: int) -> tuple[float, float] | None:
    """A place in an area where an object can be put: its middle, or the nearest to it of a grid."""
    x, y = AREA_CENTERS[area]
    steps = np.linspace(-0.16, 0.16, GRID)
    shifts = sorted(((dx, dy) for dx in steps for dy in steps), key=lambda shift: np.hypot(*shift))
    for dx, dy in shifts:
        place = (float(x + dx), float(y + dy))
        if area_of(*place) == area and table.is_free(*place):
            return place
    return None


def solve(table: Table, goal: Goal, max_steps: int) -> list[Subgoal] | None:
    """The plan without failures; None if it takes more than `max_steps` sub-goals."""
    plan: list[Subgoal] = []
    while (subgoal := next_subgoal(table, goal)) != DONE:
        if len(plan) == max_steps:
            return None
        plan.append(subgoal)
        table = execute(table, subgoal)
    return plan
