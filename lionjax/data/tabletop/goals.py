# SPDX-License-Identifier: Apache-2.0
"""Goals and sub-goals in words, and the planner that knows the way."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from lionjax.core.errors import UserError
from lionjax.data.tabletop import world
from lionjax.data.tabletop.world import AREA_CENTERS, AREAS, MAX_MOVE, Action, Body, Table, area_of

GOALS = ("push", "pick", "place", "stack")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HORIZON = 8  # sub-goals of an episode at most


class Goal(NamedTuple):
    """What is wanted: `kind` of `GOALS`, of object `target`; `other`: an area, or the object to stack it on."""

    kind: str
    target: int
    other: int = -1

    def text(self, table: Table) -> str:
        """The goal in words."""
        name = table.bodies[self.target].name
        if self.kind == "pick":
            return f"hold {name}"
        if self.kind == "stack":
            return f"stack {name} on {table.bodies[self.other].name}"
        return (
            f"{'push' if self.kind == 'push' else 'put'} {name} {'to' if self.kind == 'push' else 'at'} the "
            + (AREAS[self.other])
        )

    def is_reached(self, table: Table) -> bool:
        """Whether the table is as the goal wants it."""
        body = table.bodies[self.target]
        if self.kind == "pick":
            return body.support == world.IN_HAND
        if self.kind == "stack":
            return body.support == self.other
        return body.support == world.ON_TABLE and area_of(body.x, body.y) == self.other


class Subgoal(NamedTuple):
    """One step of a plan: "pick", "put_on" and "push" an object, "put_at" an area, "put_down", or "done"."""

    verb: str
    index: int = -1  # of the object or area
    direction: str = ""

    def text(self, table: Table) -> str:
        """The sub-goal in words."""
        name = table.bodies[self.index].name if self.verb in ("pick", "put_on", "push") else ""
        return {
            "pick": f"pick up {name}",
            "put_on": f"put it on {name}",
            "push": f"push {name} {self.direction}",
            "put_at": f"put it at the {AREAS[self.index]}",
            "put_down": "put it down",
            "done": "done",
        }[self.verb]

    def is_achieved(self, table: Table) -> bool:
        """Whether the table looks as after this step; a push leaves no trace that tells."""
        held = table.held
        return {
            "pick": held == self.index,
            "put_on": held < 0 and table.on_top(self.index) >= 0,
            "put_at": held < 0
            and any(b.support == world.ON_TABLE and area_of(b.x, b.y) == self.index for b in table.bodies),
            "put_down": held < 0,
        }.get(self.verb, True)


DONE, PUT_DOWN = Subgoal("done"), Subgoal("put_down")


def possible_subgoals(table: Table) -> list[Subgoal]:
    """All sub-goals that can be named on a table."""
    objects = range(len(table.bodies))
    return [
        DONE,
        PUT_DOWN,
        *(Subgoal("put_at", area) for area in range(len(AREAS))),
        *(Subgoal(verb, k) for verb in ("pick", "put_on") for k in objects),
        *(Subgoal("push", k, direction) for k in objects for direction in DIRECTIONS),
    ]


def parse_subgoal(text: str, table: Table) -> Subgoal:
    """The sub-goal of a text. Raises UserError for a text that names none on this table."""
    words = " ".join(text.lower().strip(" .").split())
    for subgoal in possible_subgoals(table):
        if subgoal.text(table) == words:
            return subgoal
    raise UserError(f"{text!r} is no sub-goal on this table; an example is {Subgoal('pick', 0).text(table)!r}")


def next_subgoal(table: Table, goal: Goal) -> Subgoal:
    """The next step on the way to a goal."""
    if goal.is_reached(table):
        return DONE
    target, held = goal.target, table.held
    if held >= 0 and (held != target or goal.kind == "push"):
        return PUT_DOWN
    if held == target:
        if goal.kind == "place":
            return Subgoal("put_at", goal.other)
        covered = table.on_top(goal.other) >= 0
        return PUT_DOWN if covered else Subgoal("put_on", goal.other)
    for index in (target, goal.other) if goal.kind == "stack" else (target,):
        # A stack that has the goal's object in the middle, or one that covers the place for it.
        if (table.on_top(index)) >= 0:
            return Subgoal("pick", table.topmost(index))
    if goal.kind == "push" and table.bodies[target].support == world.ON_TABLE:
        return _push(table, goal)
    if goal.kind == "push":
        return Subgoal("pick", target)  # from the stack that it lies on
    return Subgoal("pick", target)


def push_action(body: Body, direction: str) -> Action:
    """The push that moves an object to the middle of the next area in a direction."""
    dx, dy = DIRECTIONS[direction]
    goal_x, goal_y = AREA_CENTERS[area_of(body.x, body.y)]
    # From the middle of an area to the next one it is 1/3 along x and 0.27 along y.
    change = np.multiply((goal_x - body.x + dx / 3, goal_y - body.y + 0.27 * dy), (abs(dx), abs(dy)))
    return Action("push", *np.clip(change, -MAX_MOVE, MAX_MOVE).tolist())


def _push(table: Table, goal: Goal) -> Subgoal:
    """The next step for an object that lies on the table, alone, with an empty hand.

    A push along the columns, then along the rows, if it leads to the next area; else what is in the way is picked up.
    """
    body = table.bodies[goal.target]
    here = area_of(body.x, body.y)
    (row, column), (wanted_row, wanted_column) = divmod(here, 3), divmod(goal.other, 3)
    sideways = {1: "right", -1: "left"}.get(int(np.sign(wanted_column - column)))
    upright = {1: "down", -1: "up"}.get(int(np.sign(wanted_row - row)))
    directions = [direction for direction in (sideways, upright) if direction]
    above = dataclasses.replace(table, gripper=(body.x, body.y))
    for direction in directions:
        pushed = world.step(above, push_action(body, direction)).bodies[goal.target]
        if area_of(pushed.x, pushed.y) != here:
            return Subgoal("push", goal.target, direction)
    ahead = {k: _distance_ahead(body, other, directions[0]) for k, other in enumerate(table.bodies) if k != goal.target}
    ahead = {k: distance for k, distance in ahead.items() if table.bodies[k].support == world.ON_TABLE}
    return Subgoal("pick", table.topmost(min(ahead, key=ahead.__getitem__)))


def _distance_ahead(body: Body, other: Body, direction: str) -> float:
    """How far an object can be pushed in a direction until it touches another; infinite if it never does."""
    dx, dy = DIRECTIONS[direction]
    along = (other.x - body.x) * dx + (other.y - body.y) * dy
    beside = abs((other.x - body.x) * dy) + abs((other.y - body.y) * dx)
    return along if along > 0 and beside < 2 * world.RADIUS else math.inf
