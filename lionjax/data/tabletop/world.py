# SPDX-License-Identifier: Apache-2.0
"""The tabletop: objects of the synthetic scenes, a gripper, and an exact simulator of its five actions.

Lengths are fractions of the image side, y points down. The table lies below `HOME`, the gripper's place between two
sub-goals. Objects on the table are discs of `RADIUS` that never overlap; an object may lie on another, at its place, up
to `MAX_LEVEL` above the table. The simulator is in closed form: the same actions give the same table everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from lionjax.core.errors import UserError
from lionjax.data.scenes.world import COLORS, SHAPES, Background, Scene, Thing

ACTIONS = ("move", "push", "pick", "place", "stack")
LEFT, TOP, RIGHT, BOTTOM = 0.08, 0.25, 0.92, 0.92  # where the middle of an object can be on the table
HOME = (0.5, 0.09)
RADIUS, REACH, MAX_MOVE = 0.08, 0.05, 0.35
ON_TABLE, IN_HAND = -1, -2
MAX_LEVEL, LEVEL_SHIFT = 2, 0.075  # levels above the table, and by how much each is drawn higher up
MAX_OBJECTS = 6
EXTENT = 0.165
AREAS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
AREA_CENTERS = tuple((x, y) for y in (0.33, 0.6, 0.87) for x in (1 / 6, 0.5, 5 / 6))
EDGES_X, EDGES_Y = (1 / 3, 2 / 3), (0.465, 0.735)
BACKGROUND = Background("plain", (196, 190, 182), (196, 190, 182), 0.0, 6, 0)
GAP = 1e-9  # two discs that touch do not overlap
STATE_FIELDS = 1 + len(COLORS) + len(SHAPES) + 2 + 3 + 3 + 2  # numbers of one object in `object_state`
STATE_WIDTH = MAX_OBJECTS * (STATE_FIELDS + MAX_OBJECTS)


class Body(NamedTuple):
    """One object; `support`: the index of the object that it lies on, `ON_TABLE` or `IN_HAND`."""

    color: str
    shape: str
    x: float
    y: float
    support: int = ON_TABLE

    @property
    def name(self) -> str:
        return f"the {self.color} {self.shape}"


class Action(NamedTuple):
    """One of `ACTIONS`, by (dx, dy) for "move" and "push", each at most `MAX_MOVE`."""

    name: str
    dx: float = 0.0
    dy: float = 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The state of the world. Names (color and shape) of its objects are unique."""

    bodies: tuple[Body, ...]
    gripper: tuple[float, float] = HOME

    @property
    def held(self) -> int:
        """Index of the object in the hand, or -1."""
        return next((k for k, body in enumerate(self.bodies) if body.support == IN_HAND), -1)

    def on_top(self, index: int) -> int:
        """Index of the object that lies on object `index`, or -1."""
        return next((k for k, body in enumerate(self.bodies) if body.support == index), -1)

    def topmost(self, index: int) -> int:
        """The highest object of the stack that object `index` is in."""
        while (upper := self.on_top(index)) >= 0:
            index = upper
        return index

    def level(self, index: int) -> int:
        """How many objects are below object `index`; 0 in the hand."""
        support, level = self.bodies[index].support, 0
        while support >= 0:
            support, level = self.bodies[support].support, level + 1
        return level

    def base_at(self, x: float, y: float, reach: float = REACH) -> int:
        """Index of the object on the table nearest to a place, at most `reach` away, or -1."""
        near = [
            (math.hypot(body.x - x, body.y - y), k)
            for k, body in enumerate(self.bodies)
            if body.support == ON_TABLE and abs(body.x - x) <= reach and abs(body.y - y) <= reach
        ]
        distance, index = min(near, default=(math.inf, -1))
        return index if distance <= reach else -1

    def is_free(self, x: float, y: float) -> bool:
        """Whether an object can be put on the table at a place."""
        inside = LEFT <= x <= RIGHT and TOP <= y <= BOTTOM
        return inside and self.base_at(x, y, 2 * RADIUS - GAP) < 0

    def moved(self, changes: dict[int, dict], gripper: tuple[float, float] | None = None) -> Table:
        """The table with changed fields of some objects."""
        bodies = tuple(body._replace(**changes[k]) if k in changes else body for k, body in enumerate(self.bodies))
        return Table(bodies, gripper or self.gripper)


def area_of(x: float, y: float) -> int:
    """Index in `AREAS` of a place."""
    return 3 * sum(y > edge for edge in EDGES_Y) + sum(x > edge for edge in EDGES_X)


def step(table: Table, action: Action) -> Table:
    """The table after an action; an action that cannot be done leaves it as it is. Raises UserError for another name.

    - move: the gripper moves, with what it holds.
    - pick: the gripper takes the highest object below it.
    - place: it puts what it holds onto the table, where there is room.
    - stack: it puts what it holds onto the highest object below it.
    - push: it pushes the stack below it, until that touches another object or the edge of the table.
    """
    name, dx, dy = action
    if name not in ACTIONS:
        raise UserError(f"the simulator has no action {name!r}; choose one of {', '.join(ACTIONS)}")
    if not (abs(dx) <= MAX_MOVE and abs(dy) <= MAX_MOVE):
        raise UserError(f"the action {name!r} moves by ({dx}, {dy}); give at most {MAX_MOVE} along each axis")
    (x, y), held = table.gripper, table.held
    if name == "move":
        place = (min(max(x + dx, 0.0), 1.0), min(max(y + dy, 0.0), 1.0))
        return table.moved({} if held < 0 else {held: {"x": place[0], "y": place[1]}}, place)
    if name == "place":
        can_place = held >= 0 and table.is_free(x, y)
        return table.moved({held: {"support": ON_TABLE}}) if can_place else table
    base = table.base_at(x, y)
    if base < 0 or (held >= 0) != (name == "stack"):
        return table
    if name == "push":
        return _push(table, base, dx, dy)
    top = table.topmost(base)
    if name == "pick":
        return table.moved({top: {"support": IN_HAND, "x": x, "y": y}})
    if table.level(top) == MAX_LEVEL:
        return table
    return table.moved({held: {"support": top, "x": table.bodies[top].x, "y": table.bodies[top].y}})


def _push(table: Table, base: int, dx: float, dy: float) -> Table:
    """The stack on object `base` moved along (dx, dy) until the first contact."""
    x, y = table.bodies[base].x, table.bodies[base].y
    share = 1.0
    for position, change, low, high in ((x, dx, LEFT, RIGHT), (y, dy, TOP, BOTTOM)):
        if change:
            share = min(share, ((high if change > 0 else low) - position) / change)
    length = dx * dx + dy * dy
    for k, body in enumerate(table.bodies):
        if k == base or body.support != ON_TABLE or not length:
            continue
        # |(x, y) + t (dx, dy) - (body.x, body.y)| = 2 RADIUS for the smallest t >= 0.
        rx, ry = x - body.x, y - body.y
        half, rest = rx * dx + ry * dy, rx * rx + ry * ry - (2 * RADIUS) ** 2
        discriminant = half * half - length * rest
        if half < 0 and discriminant > 0:
            share = min(share, (-half - math.sqrt(discriminant)) / length)
    share = max(share, 0.0)
    place = (x + share * dx, y + share * dy)
    stack, index = {}, base
    while index >= 0:
        stack[index] = {"x": place[0], "y": place[1]}
        index = table.on_top(index)
    return table.moved(stack, place)


# What is seen of the table


def scene_of(table: Table) -> tuple[Scene, tuple[int, ...]]:
    """The table as a scene, and the index among its things of each object. Higher objects are in front."""
    order = sorted(range(len(table.bodies)), key=lambda k: (table.level(k), table.bodies[k].y))
    things = []
    for k in order:
        body = table.bodies[k]
        y = body.y - LEVEL_SHIFT * table.level(k)
        things.append(Thing(body.shape, body.color, "small", "plain", body.x, y, EXTENT, 0.0, 1.0))
    return Scene("train", 0, 0, BACKGROUND, tuple(things)), tuple(map(order.index, range(len(order))))


def render(table: Table, image_size: int) -> np.ndarray:
    """The camera's image, uint8 (image_size, image_size, 3). The hand is not drawn, only what it holds."""
    return scene_of(table)[0].render(image_size)


def object_masks(table: Table, image_size: int) -> np.ndarray:
    """bool (K, image_size, image_size): the visible mask of each object, in the order of `bodies`."""
    scene, places = scene_of(table)
    return scene.masks(image_size)[list(places)]


def object_state(table: Table, index: int) -> list[float]:
    """`STATE_FIELDS` numbers: 1, color, shape, x, y, column and row as one-hot, in the hand, something on it.

    In the hand, column and row are zero. x and y are -1..1.
    """
    body = table.bodies[index]
    in_hand = body.support == IN_HAND
    row, column = divmod(area_of(body.x, body.y), 3)
    one_hot = [
        *(float(color == body.color) for color in COLORS),
        *(float(shape == body.shape) for shape in SHAPES),
        2 * body.x - 1,
        2 * body.y - 1,
        *(float(k == column and not in_hand) for k in range(3)),
        *(float(k == row and not in_hand) for k in range(3)),
    ]
    return [1.0, *one_hot, float(in_hand), float(table.on_top(index) >= 0)]


def state_vector(table: Table) -> list[float]:
    """`STATE_WIDTH` numbers: of each object its state and which object it lies on; zeros for absent objects."""
    numbers: list[float] = []
    for k, body in enumerate(table.bodies):
        numbers += [*object_state(table, k), *(float(body.support == j) for j in range(MAX_OBJECTS))]
    return numbers + [0.0] * (STATE_WIDTH - len(numbers))
