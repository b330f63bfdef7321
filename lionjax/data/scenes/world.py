# SPDX-License-Identifier: Apache-2.0
"""A small made-up world of colored shapes: scenes drawn by lot, with exact truth about everything in them.

`sample(split, index)` is a pure function of its arguments. `Scene.render` gives the picture, `Scene.masks` what is
seen of each thing. Some (color, shape) pairs never occur in the splits `train` and `validation`, and every `heldout`
scene has at least one of them, so that remembering combinations does not pass for seeing them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.scenes import render as drawing

COLORS = tuple(drawing.RGB)
SHAPES = tuple(drawing.SIGNED_DISTANCE)
TEXTURES = ("plain", "striped", "dotted")
EXTENTS = {"small": (0.15, 0.18), "medium": (0.22, 0.27), "large": (0.32, 0.40)}
SIZES = tuple(EXTENTS)
BACKGROUNDS = ("plain", "shaded", "speckled", "checkered")
SPLITS = ("train", "validation", "heldout")

# The first three colors and shapes are drawn more often, so that "popular" means something in the existence task.
COLOR_PROBS = np.array([2, 2, 2, 1, 1, 1, 1, 1]) / 11
SHAPE_PROBS = np.array([2, 2, 2, 1, 1, 1, 1, 1]) / 11
COLOR_SHAPE_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT_PAIRS = frozenset((c, s) for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if (i + j) % 6 == 4)
TRUTH_IMAGE_SIZE = 256
MIN_OCCLUSION = 0.06
MAX_TRIES = 100


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are fractions of the picture.

    `box` is xyxy around what is seen of it, `visible` the share that is seen, `covers` the indices of
    the things of which it hides enough to notice.
    """

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    extent: float
    angle: float
    shade: float
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    visible: float = 1.0
    covers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Background:
    """What lies behind the things: its kind, two muted colors, and the numbers its pattern needs."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    cells: int
    grain: int


@dataclass(frozen=True)
class WorldConfig:
    """What scenes may be like; changing a number here gives another world, not the same one again."""

    min_things: int = 3
    max_things: int = 8
    min_visible_fraction: float = 0.55
    min_box_side: float = 0.10
    min_center_distance: float = 0.11

    def __post_init__(self):
        if not 3 <= self.min_things <= self.max_things <= 10:
            raise UserError(
                f"a world has 3 to 10 things a scene, but fewest={self.min_things} and most={self.max_things}"
            )


@dataclass(frozen=True)
class Scene:
    """A background and things from back to front."""

    split: str
    seed: int
    index: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def id(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:06d}"

    def render(self, image_size: int = 192) -> np.ndarray:
        """The picture, uint8 RGB (pixels, pixels, 3)."""
        return drawing.render_scene(self, image_size)

    def masks(self, image_size: int = 192) -> np.ndarray:
        """(K, pixels, pixels) bool: what is seen of each thing, in the order of `things`."""
        return drawing.instance_id_map(self.things, image_size) == np.arange(len(self.things))[:, None, None]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Scene:
        raw = json.loads(text)
        things = tuple(
            Thing(**{**thing, "box": tuple(thing["box"]), "covers": tuple(thing["covers"])}) for thing in raw["things"]
        )
        ground = {**raw["background"]}
        ground["first"], ground["second"] = tuple(ground["first"]), tuple(ground["second"])
        return Scene(raw["split"], raw["seed"], raw["index"], Background(**ground), things)


def allowed_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (color, shape) pairs that may be shown, or spoken of, in a split."""
    return (
        COLOR_SHAPE_PAIRS
        if split == "heldout"
        else tuple(pair for pair in COLOR_SHAPE_PAIRS if pair not in HELD_OUT_PAIRS)
    )


def unknown_split_message(split: str) -> str:
    return f"there is no split {split!r} of scenes; choose one of {', '.join(SPLITS)}"


def pair_weight(color: str, shape: str) -> float:
    """How often the world shows a pair, up to a factor."""
    return float(COLOR_PROBS[COLORS.index(color)] * SHAPE_PROBS[SHAPES.index(shape)])


def sample_scene(split: str, index: int, seed: int = 0, world: WorldConfig = WorldConfig()) -> Scene:
    """The scene number `index` of a split. Equal arguments give equal scenes, on any machine and in any order."""
    if split not in SPLITS:
        raise UserError(unknown_split_message(split))
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    ground = _sample_background(rng)
    for _ in range(MAX_TRIES):
        things = _sample_things(split, world, rng)
        if len(things) >= world.min_things:
            return Scene(split, seed, index, ground, _with_visibility(things))
    raise UserError(
        f"no scene with {world.min_things} things came out of {MAX_TRIES} tries; "
        f"ask for fewer, or for a smaller min_visible than {world.min_visible_fraction}"
    )


def _sample_background(rng) -> Background:
    kind = str(rng.choice(BACKGROUNDS))
    light = rng.uniform(125, 225)
    # Two tones far enough apart to be told from a plain ground, and no more colorful than paper.
    step = {"plain": 0, "shaded": 75, "speckled": 60, "checkered": 32}[kind] * rng.choice([-1, 1])
    other = light + step if 60 < light + step < 245 else light - step
    tint = rng.uniform(-12, 12, 3)
    first, second = (tuple(int(c) for c in np.clip(tone + tint, 0, 255)) for tone in (light, other))
    return Background(
        kind=kind,
        first=first,
        second=second,
        angle=round(float(rng.uniform(0, 360)), 1),
        cells=int(rng.integers(6, 11)),
        grain=int(rng.integers(2**31)),
    )


def _sample_things(split: str, world: WorldConfig, rng) -> list[Thing]:
    """Things with words and places but without truth; fewer than wanted where the picture is too full."""
    wanted = int(rng.integers(world.min_things, world.max_things + 1))
    allowed = set(allowed_pairs(split))
    forced = sorted(HELD_OUT_PAIRS)[rng.integers(len(HELD_OUT_PAIRS))] if split == "heldout" else None
    # Few colors and shapes a scene, so that things share them and must be told apart by more than one word.
    colors = rng.choice(COLORS, rng.integers(3, 6), replace=False, p=COLOR_PROBS).tolist()
    shapes = rng.choice(SHAPES, rng.integers(3, 6), replace=False, p=SHAPE_PROBS).tolist()
    choices = [(c, s) for c in colors for s in shapes if (c, s) in allowed]
    if not choices:
        return []
    first = int(rng.integers(wanted))
    size_odds = (0.35, 0.40, 0.25) if wanted <= 5 else (0.50, 0.38, 0.12)
    things: list[Thing] = []
    owner = np.full((TRUTH_IMAGE_SIZE, TRUTH_IMAGE_SIZE), -1, np.int8)
    areas: list[int] = []
    for k in range(wanted):
        pair = choices[rng.integers(len(choices))]
        color, shape = forced if forced and k == first else pair
        size = str(rng.choice(SIZES, p=size_odds))
        texture = str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
        placed = _try_place_thing(things, owner, areas, (shape, color, size, texture), world, rng)
        if not placed and forced and k == first:
            return []
    return things


def _try_place_thing(things, instance_ids, areas, attributes, world: WorldConfig, rng) -> bool:
    """Try places for one more thing; append it and paint it over `owner` where everything stays visible enough."""
    shape, color, size, texture = attributes
    low, high = EXTENTS[size]
    for attempt in range(30):
        extent = rng.uniform(low, high)
        x, y = rng.uniform(0.54 * extent, 1 - 0.54 * extent, 2)
        angle, shade = rng.uniform(-14, 14), rng.uniform(0.92, 1.0)
        reach = [0.54 * (t.extent + extent) for t in things]
        near = [t for t, r in zip(things, reach) if max(abs(t.x - x), abs(t.y - y)) < r]
        # Like colors never overlap, and the first tries look for free ground: hiding should be the exception.
        if any(t.color == color or np.hypot(t.x - x, t.y - y) < world.min_center_distance for t in near):
            continue
        if near and attempt < 6:
            continue
        numbers = (round(float(n), 4) for n in (x, y, extent, angle, shade))
        thing = Thing(shape, color, size, texture, *numbers)
        place, inside = drawing.amodal_mask(thing, TRUTH_IMAGE_SIZE)
        trial = instance_ids.copy()
        trial[place][inside] = len(things)
        if not near or _all_visible(trial, [*areas, int(inside.sum())], world):
            instance_ids[:] = trial
            areas.append(int(inside.sum()))
            things.append(thing)
            return True
    return False


def _all_visible(instance_ids, areas, world: WorldConfig) -> bool:
    seen = np.bincount(instance_ids.ravel() + 1, minlength=len(areas) + 1)[1:]
    if (seen < world.min_visible_fraction * np.array(areas)).any():
        return False
    hidden = np.flatnonzero(seen < areas)
    boxes = [drawing.mask_to_box(instance_ids == k) for k in hidden]
    return all(min(x1 - x0, y1 - y0) >= world.min_box_side for x0, y0, x1, y1 in boxes)


def _with_visibility(things) -> tuple[Thing, ...]:
    """The same things knowing their visible box and share, and which things they clearly hide a part of."""
    owner = drawing.instance_id_map(things, TRUTH_IMAGE_SIZE)
    wholes = [drawing.amodal_mask(thing, TRUTH_IMAGE_SIZE) for thing in things]
    hides = np.zeros((len(things), len(things)))
    for j, (place, inside) in enumerate(wholes):
        seen = owner[place][inside]
        hides[:, j] = np.bincount(seen, minlength=len(things)) / len(seen)
    return tuple(
        dataclasses.replace(
            thing,
            box=drawing.mask_to_box(owner == k),
            visible=round(float(hides[k, k]), 3),
            covers=tuple(j for j in range(len(things)) if j != k and hides[k, j] > MIN_OCCLUSION),
        )
        for k, thing in enumerate(things)
    )
