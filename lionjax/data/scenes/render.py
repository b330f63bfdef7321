# SPDX-License-Identifier: Apache-2.0
"""Scene renderer: every shape is a signed distance function, which gives antialiased edges and exact masks.

Lengths are fractions of the image side, pixel centers are at (i + 0.5) / image_size, and y points down. A scene can be
rendered at any resolution. Rendering is deterministic: all random values are in the scene.
"""

from __future__ import annotations

import numpy as np

RGB = {
    "red": (214, 36, 36),
    "blue": (38, 76, 214),
    "green": (32, 150, 58),
    "yellow": (250, 216, 40),
    "purple": (128, 44, 176),
    "orange": (252, 134, 12),
    "pink": (252, 132, 190),
    "cyan": (64, 208, 226),
}
STRIPE_PERIOD, DOT_PERIOD, DOT_RADIUS, OUTLINE_WIDTH = 0.062, 0.052, 0.016, 0.007
LIGHT_INK, DARK_INK = (246, 246, 242), (40, 38, 46)
SPECKLE_CELLS = 48


def _circle(u, v):
    return np.hypot(u, v) - 1.0


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.72) - 0.28


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.86


def _diamond(u, v):
    # Narrower than tall, so that it differs from a rotated square.
    return (np.abs(u) / 0.74 + np.abs(v) - 1.0) / np.hypot(1 / 0.74, 1.0)


def _triangle(u, v):
    slope = np.hypot(1.72, 0.96)
    return np.maximum(v - 0.76, (1.72 * np.abs(u) - 0.96 * (v + 0.96)) / slope)


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.98, b - 0.33), np.maximum(b - 0.98, a - 0.33))


def _star(u, v):
    # All 5 points are folded onto one half point, whose edge is a straight line from tip to notch.
    sector, notch = np.pi / 5, 0.47
    angle = np.abs(np.mod(np.arctan2(u, -v) + sector, 2 * sector) - sector)
    radius = np.hypot(u, v)
    nx, ny = notch * np.sin(sector), 1.0 - notch * np.cos(sector)
    return ((radius * np.cos(angle) - 1.0) * nx + radius * np.sin(angle) * ny) / np.hypot(nx, ny)


def _heart(u, v):
    # A square rotated by 45 degrees, with a half disc on each upper side.
    side, a, w = 0.82, np.abs(u), v - 0.08
    discs = np.hypot(a - side / 2, w + side / 2) - side / np.sqrt(2)
    return np.minimum((a + np.abs(w) - side) / np.sqrt(2), discs)


SIGNED_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}


def bounding_slices(thing, image_size: int) -> tuple[slice, slice]:
    """The (rows, columns) of the image that can contain pixels of an object."""
    reach = 0.56 * thing.extent
    edges = [(c - reach, c + reach) for c in (thing.y, thing.x)]
    return tuple(
        slice(max(0, int(low * image_size)), min(image_size, int(high * image_size) + 2)) for low, high in edges
    )


def _local_coordinates(thing, image_size: int):
    """(window, u, v): window slices, and pixel centers in the object's rotated coordinates, in which it spans -1..1."""
    rows, columns = bounding_slices(thing, image_size)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5) / image_size - thing.y
    x = (np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5) / image_size - thing.x
    angle, half = np.deg2rad(thing.angle), thing.extent / 2
    cos, sin = np.float32(np.cos(angle) / half), np.float32(np.sin(angle) / half)
    return (rows, columns), x * cos + y * sin, y * cos - x * sin


def amodal_mask(thing, image_size: int):
    """(window slices, bool mask of the window): the pixels of the whole object, including hidden parts."""
    window, u, v = _local_coordinates(thing, image_size)
    return window, SIGNED_DISTANCE[thing.shape](u, v) < 0


def instance_id_map(things, image_size: int) -> np.ndarray:
    """int8 (image_size, image_size): index of the visible object at each pixel center, -1 for background."""
    instance_ids = np.full((image_size, image_size), -1, np.int8)
    for k, thing in enumerate(things):
        window, inside = amodal_mask(thing, image_size)
        instance_ids[window][inside] = k
    return instance_ids


def mask_to_box(mask) -> tuple[float, float, float, float]:
    """The bounding box (x0, y0, x1, y1) in 0..1 of a square mask. Raises ValueError for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("the mask is empty, so it has no box; render the scene with a larger image_size")
    pixels = len(mask)
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return tuple(float(edge) / pixels for edge in (x0, y0, x1, y1))


def _texture_coverage(thing, u, v, image_size: int):
    """Fraction of each pixel that has the second color of the texture, (..., 1); None for plain objects."""
    half = thing.extent / 2
    if thing.texture == "striped":
        phase = (u + v) * (half / np.sqrt(2) / STRIPE_PERIOD)
        distance = (np.abs(np.mod(phase, 1.0) - 0.5) - 0.21) * STRIPE_PERIOD
    elif thing.texture == "dotted":
        du, dv = (np.mod(w * (half / DOT_PERIOD) + 0.5, 1.0) - 0.5 for w in (u, v))
        distance = np.hypot(du, dv) * DOT_PERIOD - DOT_RADIUS
    else:
        return None
    return np.clip(0.5 - distance * image_size, 0.0, 1.0)[..., None]


def _draw_thing(canvas, thing):
    """Paints one object over a float canvas (image_size, image_size, 3)."""
    pixels = len(canvas)
    window, u, v = _local_coordinates(thing, pixels)
    distance = SIGNED_DISTANCE[thing.shape](u, v) * np.float32(thing.extent / 2)
    alpha = np.clip(0.5 - distance * pixels, 0.0, 1.0)[..., None]
    color = np.float32(RGB[thing.color]) * np.float32(thing.shade)
    paint = color
    ink = _texture_coverage(thing, u, v, pixels)
    if ink is not None:
        bright = float(np.dot(RGB[thing.color], (0.299, 0.587, 0.114))) > 135
        paint = color + ink * (np.float32(DARK_INK if bright else LIGHT_INK) - color)
    # A darker outline separates an object from any background.
    rim = np.clip(0.5 + (distance + OUTLINE_WIDTH) * pixels, 0.0, 1.0)[..., None]
    paint = paint + rim * (color * np.float32(0.45) - paint)
    canvas[window] += alpha * (paint - canvas[window])


def render_background(ground, image_size: int) -> np.ndarray:
    """float32 (image_size, image_size, 3): a scene's background without objects."""
    first, second = np.float32(ground.first), np.float32(ground.second)
    centers = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    if ground.kind == "plain":
        mix = np.zeros((image_size, image_size), np.float32)
    elif ground.kind == "shaded":
        angle = np.deg2rad(ground.angle)
        mix = (centers[None] - 0.5) * np.cos(angle) + (centers[:, None] - 0.5) * np.sin(angle)
        mix = np.clip(0.5 + mix / (abs(np.cos(angle)) + abs(np.sin(angle))), 0, 1)
    elif ground.kind == "speckled":
        grain = np.random.default_rng(ground.grain).random((SPECKLE_CELLS, SPECKLE_CELLS), np.float32)
        cell = (centers * SPECKLE_CELLS).astype(int)
        mix = grain[cell[:, None], cell]
    else:
        cell = (centers * ground.cells).astype(int)
        mix = ((cell[:, None] + cell) % 2).astype(np.float32)
    return first + mix[..., None].astype(np.float32) * (second - first)


def render_scene(scene, image_size: int) -> np.ndarray:
    """A scene as uint8 RGB (image_size, image_size, 3); objects are painted from back to front."""
    canvas = render_background(scene.background, image_size)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
