# SPDX-License-Identifier: Apache-2.0
"""Resize images as Pillow does, in memory bounded by the image and the output, at any aspect ratio.

Pillow resizes in two passes, horizontal before vertical, and keeps the whole image between them: (output width x image
height). A square that pads a long image, or the full result of which a center crop keeps a part, would be larger still.
Here only the pixels that the output shows are computed, in tiles, with the same weights and the same rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from lionjax.core.types import UserError

Color = tuple[int, int, int]
Window = tuple[int, int, int, int]  # (top, left, height, width) in pixels of the resized image
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "hamming": 5}  # Pillow's numbers
SUPPORT = {"lanczos": 3.0, "bilinear": 1.0, "bicubic": 2.0, "hamming": 1.0}  # radius of a filter
MAX_TILE_PIXELS = 4 * 2**20  # pixels that one call of Pillow may hold beside image and output
PRECISION_BITS = 22  # of Pillow's integer weights


@dataclass(frozen=True)
class Axis:
    """One axis of a resize: `length` pixels of an image that begin at `start` of a line of `total` pixels, which is
    resized to `out` pixels; of these, the `count` from `first` on are wanted.
    """

    length: int
    start: int
    total: int
    out: int
    first: int
    count: int

    @property
    def scale(self) -> float:
        """Input pixels per output pixel."""
        return self.total / self.out

    def radius(self, resample: str) -> float:
        """How far from its center an output pixel reads, in input pixels."""
        return SUPPORT[resample] * max(self.scale, 1.0)

    def visible_range(self, resample: str) -> tuple[int, int]:
        """(first, end) of the wanted output pixels that may read a pixel of the image; the others are padding."""
        reach = self.radius(resample) + 1
        first = math.floor((self.start - reach) / self.scale - 0.5)
        end = math.ceil((self.start + self.length + reach) / self.scale - 0.5) + 1
        stop = self.first + self.count
        return min(max(first, self.first), stop), max(min(end, stop), self.first)


def resize(
    image: Image.Image,
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
    resample: str = "bicubic",
    window: Window | None = None,
) -> np.ndarray:
    """The RGB image, or its part `box` (x0, y0, x1, y1), resized; of the result the `window`, as uint8 (h, w, 3).

    Equals `image.resize((width, height), box=box)` of Pillow.
    """
    top, left, rows, columns = window or (0, 0, height, width)
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    x_scale, y_scale = (x1 - x0) / width, (y1 - y0) / height
    if resample == "nearest":
        y_H, x_W = _nearest_index(y0, y_scale, top, rows), _nearest_index(x0, x_scale, left, columns)
        return _gather_pixels(image, np.minimum(y_H, image.height - 1), np.minimum(x_W, image.width - 1))
    margin = 2 * SUPPORT[resample] * max(y_scale, 1.0) + 2  # input rows that an output row reads beside its own
    tile_columns = min(columns, max(1, int(MAX_TILE_PIXELS / (y_scale + margin))))
    tile_rows = min(rows, max(1, int((MAX_TILE_PIXELS / tile_columns - margin) / y_scale)))
    pixels = np.empty((rows, columns, 3), np.uint8)
    for row in range(0, rows, tile_rows):
        for column in range(0, columns, tile_columns):
            high, wide = min(tile_rows, rows - row), min(tile_columns, columns - column)
            left_edge, top_edge = x0 + (left + column) * x_scale, y0 + (top + row) * y_scale
            right_edge, bottom_edge = min(left_edge + wide * x_scale, x1), min(top_edge + high * y_scale, y1)
            edges = (left_edge, top_edge, right_edge, bottom_edge)
            tile = image.resize((wide, high), Resampling(RESAMPLING[resample]), box=edges)
            pixels[row : row + high, column : column + wide] = np.asarray(tile)
    return pixels


def resize_padded(
    image: Image.Image,
    offset: tuple[int, int],
    side: int,
    height: int,
    width: int,
    color: Color,
    resample: str = "bicubic",
    window: Window | None = None,
) -> np.ndarray:
    """A square of `side` pixels in `color` with the RGB image at `offset` (left, top), resized; of it the `window`.

    uint8 (h, w, 3), equal to pasting into that square and resizing it. `side` is the longer edge of the image.
    """
    top, left, rows, columns = window or (0, 0, height, width)
    x_axis = Axis(image.width, offset[0], side, width, left, columns)
    y_axis = Axis(image.height, offset[1], side, height, top, rows)
    if image.width == image.height:
        return resize(image, height, width, None, resample, window)
    pixels = np.empty((rows, columns, 3), np.uint8)
    pixels[:] = color
    if resample == "nearest":
        y_H, x_W = (_nearest_index(0, a.scale, a.first, a.count) - a.start for a in (y_axis, x_axis))
        inside_H, inside_W = (y_H >= 0) & (y_H < image.height), (x_W >= 0) & (x_W < image.width)
        pixels[np.ix_(inside_H, inside_W)] = _gather_pixels(image, y_H[inside_H], x_W[inside_W])
        return pixels
    first, end = (y_axis if image.width > image.height else x_axis).visible_range(resample)
    if first == end:  # the window shows padding only
        return pixels
    if image.width > image.height:
        across = resize(image, image.height, width, None, resample, (0, left, image.height, columns))
        shown = _resize_padded_rows(Image.fromarray(across), y_axis, first, end, color, resample)
        pixels[first - top : end - top] = shown
    else:
        across = _resize_padded_columns(image, x_axis, first, end, color, resample)
        shown = resize(Image.fromarray(across), height, end - first, None, resample, (top, 0, rows, end - first))
        pixels[:, first - left : end - left] = shown
    return pixels


def resample_name(number: object) -> str:
    """The name of a Pillow filter by its number. Raises UserError for other numbers and for Pillow's box filter."""
    names = {value: name for name, value in RESAMPLING.items()}
    if isinstance(number, bool) or number not in names:
        allowed = ", ".join(f"{value} ({name})" for value, name in names.items())
        raise UserError(f"resample is {number!r}; it can be {allowed}")
    return names[number]


def _nearest_index(origin: float, scale: float, first: int, count: int) -> np.ndarray:
    """The input pixel of each of `count` output pixels from `first` on, with Pillow's repeated addition."""
    steps = np.full(first + count, scale)
    steps[0] = origin + scale * 0.5
    return np.floor(np.add.accumulate(steps))[first:].astype(np.int64)


def _gather_pixels(image: Image.Image, y_H: np.ndarray, x_W: np.ndarray) -> np.ndarray:
    return np.asarray(image)[y_H[:, None], x_W[None, :]]


def _resize_padded_rows(
    image: Image.Image, axis: Axis, first: int, end: int, color: Color, resample: str
) -> np.ndarray:
    """Vertical pass: rows `first` to `end` of a padded image, uint8 (end - first, image width, 3)."""
    low, high = _canvas(axis, first, end, resample)
    if not _is_small(axis, low, high):
        return _weighted_sums(np.asarray(image), axis, first, end, color, resample)
    canvas = Image.new("RGB", (image.width, high - low), color)
    canvas.paste(image, (0, axis.start - low))
    edges = (0, first * axis.scale - low, image.width, end * axis.scale - low)
    return np.asarray(_resize_canvas(canvas, (image.width, end - first), edges, resample))


def _resize_padded_columns(
    image: Image.Image, axis: Axis, first: int, end: int, color: Color, resample: str
) -> np.ndarray:
    """Horizontal pass: columns `first` to `end` of a padded image, uint8 (image height, end - first, 3)."""
    low, high = _canvas(axis, first, end, resample)
    is_small = _is_small(axis, low, high)
    strip_rows = max(1, MAX_TILE_PIXELS // (high - low if is_small else 16 * image.width))
    pixels = np.empty((image.height, end - first, 3), np.uint8)
    for row in range(0, image.height, strip_rows):
        strip = image.crop((0, row, image.width, min(row + strip_rows, image.height)))
        if is_small:
            canvas = Image.new("RGB", (high - low, strip.height), color)
            canvas.paste(strip, (axis.start - low, 0))
            edges = (first * axis.scale - low, 0, end * axis.scale - low, strip.height)
            found = np.asarray(_resize_canvas(canvas, (end - first, strip.height), edges, resample))
        else:
            columns = np.asarray(strip).swapaxes(0, 1)
            found = _weighted_sums(columns, axis, first, end, color, resample).swapaxes(0, 1)
        pixels[row : row + strip_rows] = found
    return pixels


def _canvas(axis: Axis, first: int, end: int, resample: str) -> tuple[int, int]:
    """(low, high): the pixels of the padded line that output pixels `first` to `end` read, image included."""
    reach = axis.radius(resample) + 2
    low = max(0, min(axis.start, math.floor(first * axis.scale - reach)))
    high = min(axis.total, max(axis.start + axis.length, math.ceil(end * axis.scale + reach)))
    return low, high


def _is_small(axis: Axis, low: int, high: int) -> bool:
    """Whether padding the image is cheap: to at most 4 times its length."""
    return high - low <= max(4 * axis.length, 4096)


def _resize_canvas(canvas: Image.Image, size: tuple[int, int], edges, resample: str) -> Image.Image:
    limits = (0, 0, *canvas.size)
    low, high = (tuple(max(edge, 0) for edge in edges[:2]), tuple(map(min, edges[2:], limits[2:])))
    return canvas.resize(size, Resampling(RESAMPLING[resample]), box=(*low, *high))


def _weighted_sums(pixels_NWC: np.ndarray, axis: Axis, first: int, end: int, color: Color, resample: str) -> np.ndarray:
    """Output pixels `first` to `end` along axis 0 of an image in a line of padding, with Pillow's integer weights."""
    # The padding is so long that each of the few outputs reads most of the image: one dense matrix of weights.
    weights_MN, padding_M = np.zeros((end - first, axis.length)), np.zeros(end - first)
    for row, place in enumerate(range(first, end)):
        begin, weights = _integer_weights(axis, place, resample)
        low = min(max(axis.start, begin), begin + len(weights))
        high = max(min(axis.start + axis.length, begin + len(weights)), low)
        inside = weights[low - begin : high - begin]
        weights_MN[row, low - axis.start : high - axis.start] = inside
        padding_M[row] = weights.sum() - inside.sum()
    length, others = len(pixels_NWC), pixels_NWC.shape[1:]
    total = weights_MN @ pixels_NWC.reshape(length, -1).astype(np.float64)
    total = total.reshape(-1, *others) + padding_M[:, None, None] * np.array(color, np.float64)
    rounded = np.floor((total + 2 ** (PRECISION_BITS - 1)) / 2**PRECISION_BITS)
    return np.clip(rounded, 0, 255).astype(np.uint8)


def _integer_weights(axis: Axis, place: int, resample: str) -> tuple[int, np.ndarray]:
    """(first input pixel, weights) of an output pixel, as `precompute_coeffs` of Pillow's Resample.c; whole numbers."""
    center, radius = (place + 0.5) * axis.scale, axis.radius(resample)
    begin = max(0, int(center - radius + 0.5))
    end = min(axis.total, int(center + radius + 0.5))
    x = np.abs((np.arange(begin, end) - center + 0.5) / max(axis.scale, 1.0))
    weights = _filter(x, resample)
    scaled = weights / weights.sum() * 2**PRECISION_BITS
    return begin, np.trunc(scaled + np.copysign(0.5, scaled))


def _filter(x: np.ndarray, resample: str) -> np.ndarray:
    """Pillow's filters at distances `x` >= 0."""
    if resample == "bilinear":
        return np.maximum(1 - x, 0)
    if resample == "bicubic":  # a = -0.5
        inner, outer = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        return np.where(x < 1, inner, np.where(x < 2, outer, 0))
    if resample == "lanczos":
        return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return np.where(x < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0)
