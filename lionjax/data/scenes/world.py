# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes of colored shapes, sampled at random with exact ground truth.

`sample_scene(split, index)` is a pure function of its arguments. `Scene.render` returns the image and `Scene.masks` the
visible mask of each object. Some (color, shape) pairs never occur in the splits `train` and `validation`, and every
`heldout` scene has at least one of them, so that memorized combinations do not help there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.scenes import render

COLORS = tuple(render.RGB)
SHAPES = tuple(render.SIGNED_DISTANCE)
TEXTURES = ("plain", "striped", "dotted")
EXTENTS = {"small": (0.15, 0.18), "medium": (0.22, 0.27), "large": (0.32, 0.40)}
SIZES = tuple(EXTENTS)
BACKGROUNDS = ("plain", "shaded", "speckled", "checkered")
SPLITS = ("train", "validation", "heldout")

# The first 3 colors and shapes are more frequent: the "popular" setting of the existence task needs them.
COLOR_PROBS = np.array([2, 2, 2, 1, 1, 1, 1, 1]) / 11
SHAPE_PROBS = np.array([2, 2, 2, 1, 1, 1, 1, 1]) / 11
COLOR_SHAPE_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT_PAIRS = frozenset((c, s) for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if (i + j) % 6 == 4)
TRUTH_IMAGE_SIZE = 256
MIN_OCCLUSION = 0.06
MAX_TRIES = 100


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are fractions of the image, `angle` is in degrees.

    `box`: (x0, y0, x1, y1) around its visible part; `visible`: visible fraction of its area; `covers`: indices of the
    objects of which it hides more than `MIN_OCCLUSION` of the area.
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
    """The background: its kind, two muted RGB colors, and the parameters of its pattern."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    cells: int
    grain: int


@dataclass(frozen=True)
class WorldConfig:
    """Limits of scene sampling; every change gives different scenes. Raises UserError for numbers out of range."""

    min_things: int = 3
    max_things: int = 8
    min_visible_fraction: float = 0.55
    min_box_side: float = 0.10
    min_center_distance: float = 0.11

    def __post_init__(self):
        if not 3 <= self.min_things <= self.max_things <= 10:
            raise UserError(
                f"a scene has 3 to 10 things, but min_things={self.min_things} and max_things={self.max_things}"
            )


@dataclass(frozen=True)
class Scene:
    """A background, and objects from back to front."""

    split: str
    seed: int
    index: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def id(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:06d}"

    def render(self, image_size: int = 192) -> np.ndarray:
        """The image, uint8 RGB (image_size, image_size, 3)."""
        return render.render_scene(self, image_size)

    def masks(self, image_size: int = 192) -> np.ndarray:
        """bool (K, image_size, image_size): the visible mask of each object, in the order of `things`."""
        return render.instance_id_map(self.things, image_size) == np.arange(len(self.things))[:, None, None]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Scene:
        raw = json.loads(text)
        things = tuple(
            Thing(**{**thing, "box": tuple(thing["box"]), "covers": tuple(thing["covers"])}) for thing in raw["things"]
        )
        background = {**raw["background"]}
        background["first"], background["second"] = tuple(background["first"]), tuple(background["second"])
        return Scene(raw["split"], raw["seed"], raw["index"], Background(**background), things)


def allowed_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The (color, shape) pairs that images and texts of a split may contain."""
    return (
        COLOR_SHAPE_PAIRS
        if split == "heldout"
        else tuple(pair for pair in COLOR_SHAPE_PAIRS if pair not in HELD_OUT_PAIRS)
    )


def unknown_split_message(split: str) -> str:
    return f"there is no split {split!r} of scenes; choose one of {', '.join(SPLITS)}"


def pair_weight(color: str, shape: str) -> float:
    """Relative frequency of a (color, shape) pair in scenes."""
    return float(COLOR_PROBS[COLORS.index(color)] * SHAPE_PROBS[SHAPES.index(shape)])


def sample_scene(split: str, index: int, seed: int = 0, world: WorldConfig = WorldConfig()) -> Scene:
    """Scene `index` of a split. Equal arguments give equal scenes on every machine, in any order.

    Raises UserError for an unknown split, and if `MAX_TRIES` tries give no scene with enough objects.
    """
    if split not in SPLITS:
        raise UserError(unknown_split_message(split))
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    background = _sample_background(rng)
    for _ in range(MAX_TRIES):
        things = _sample_things(split, world, rng)
        if len(things) >= world.min_things:
            return Scene(split, seed, index, background, _with_visibility(things))
    raise UserError(
        f"no scene with {world.min_things} things in {MAX_TRIES} tries; "
        f"set a smaller min_things, or a min_visible_fraction below {world.min_visible_fraction}"
    )


def _sample_background(rng) -> Background:
    kind = str(rng.choice(BACKGROUNDS))
    light = rng.uniform(125, 225)
    # Two tones that differ visibly, of low saturation.
    step = {"plain": 0, "shaded": 75, "speckled": 60, "checkered": 32}[kind] * rng.choice([-1, 1])
    second_tone = light + step if 60 < light + step < 245 else light - step
    tint = rng.uniform(-12, 12, 3)
    first, second = (tuple(int(c) for c in np.clip(tone + tint, 0, 255)) for tone in (light, second_tone))
    return Background(
        kind=kind,
        first=first,
        second=second,
        angle=round(float(rng.uniform(0, 360)), 1),
        cells=int(rng.integers(6, 11)),
        grain=int(rng.integers(2**31)),
    )


def _sample_things(split: str, world: WorldConfig, rng) -> list[Thing]:
    """Objects with attributes and positions, before visibility is computed; fewer than drawn if there is no room."""
    num_things = int(rng.integers(world.min_things, world.max_things + 1))
    allowed = set(allowed_pairs(split))
    forced_pair = sorted(HELD_OUT_PAIRS)[rng.integers(len(HELD_OUT_PAIRS))] if split == "heldout" else None
    # Few colors and shapes per scene, so that objects share them and expressions need several attributes.
    colors = rng.choice(COLORS, rng.integers(3, 6), replace=False, p=COLOR_PROBS).tolist()
    shapes = rng.choice(SHAPES, rng.integers(3, 6), replace=False, p=SHAPE_PROBS).tolist()
    choices = [(c, s) for c in colors for s in shapes if (c, s) in allowed]
    if not choices:
        return []
    forced_index = int(rng.integers(num_things))
    size_odds = (0.35, 0.40, 0.25) if num_things <= 5 else (0.50, 0.38, 0.12)
    things: list[Thing] = []
    instance_ids = np.full((TRUTH_IMAGE_SIZE, TRUTH_IMAGE_SIZE), -1, np.int8)
    areas: list[int] = []
    for k in range(num_things):
        pair = choices[rng.integers(len(choices))]
        color, shape = forced_pair if forced_pair and k == forced_index else pair
        size = str(rng.choice(SIZES, p=size_odds))
        texture = str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
        is_placed = _try_place_thing(things, instance_ids, areas, (shape, color, size, texture), world, rng)
        if not is_placed and forced_pair and k == forced_index:
            return []
    return things


def _try_place_thing(things, instance_ids, areas, attributes, world: WorldConfig, rng) -> bool:
    """Tries 30 positions for one more object; adds it to `things`, `instance_ids` and `areas` if all stay visible."""
    shape, color, size, texture = attributes
    low, high = EXTENTS[size]
    for attempt in range(30):
        extent = rng.uniform(low, high)
        x, y = rng.uniform(0.54 * extent, 1 - 0.54 * extent, 2)
        angle, shade = rng.uniform(-14, 14), rng.uniform(0.92, 1.0)
        min_distances = [0.54 * (t.extent + extent) for t in things]
        neighbors = [t for t, r in zip(things, min_distances) if max(abs(t.x - x), abs(t.y - y)) < r]
        # Objects of one color never overlap, and the first tries avoid all overlap, so that occlusion is rare.
        if any(t.color == color or np.hypot(t.x - x, t.y - y) < world.min_center_distance for t in neighbors):
            continue
        if neighbors and attempt < 6:
            continue
        geometry = (round(float(n), 4) for n in (x, y, extent, angle, shade))
        thing = Thing(shape, color, size, texture, *geometry)
        window, mask = render.amodal_mask(thing, TRUTH_IMAGE_SIZE)
        trial_ids = instance_ids.copy()
        trial_ids[window][mask] = len(things)
        if not neighbors or _all_visible(trial_ids, [*areas, int(mask.sum())], world):
            instance_ids[:] = trial_ids
            areas.append(int(mask.sum()))
            things.append(thing)
            return True
    return False


def _all_visible(instance_ids, areas, world: WorldConfig) -> bool:
    visible_areas = np.bincount(instance_ids.ravel() + 1, minlength=len(areas) + 1)[1:]
    if (visible_areas < world.min_visible_fraction * np.array(areas)).any():
        return False
    partly_hidden = np.flatnonzero(visible_areas < areas)
    boxes = [render.mask_to_box(instance_ids == k) for k in partly_hidden]
    return all(min(x1 - x0, y1 - y0) >= world.min_box_side for x0, y0, x1, y1 in boxes)


def _with_visibility(things) -> tuple[Thing, ...]:
    """The same objects with their visible box, visible fraction and the objects that they occlude."""
    instance_ids = render.instance_id_map(things, TRUTH_IMAGE_SIZE)
    amodal_masks = [render.amodal_mask(thing, TRUTH_IMAGE_SIZE) for thing in things]
    # area_fractions[k, j]: fraction of the area of object j where object k is visible.
    area_fractions = np.zeros((len(things), len(things)))
    for j, (window, mask) in enumerate(amodal_masks):
        visible_ids = instance_ids[window][mask]
        area_fractions[:, j] = np.bincount(visible_ids, minlength=len(things)) / len(visible_ids)
    return tuple(
        dataclasses.replace(
            thing,
            box=render.mask_to_box(instance_ids == k),
            visible=round(float(area_fractions[k, k]), 3),
            covers=tuple(j for j in range(len(things)) if j != k and area_fractions[k, j] > MIN_OCCLUSION),
        )
        for k, thing in enumerate(things)
    )
