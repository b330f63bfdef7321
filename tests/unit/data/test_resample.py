# SPDX-License-Identifier: Apache-2.0
"""Resizing in tiles: equal to Pillow's resize of the whole, in memory bounded by image and output."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import resample
from lionjax.data.letterbox import Letterbox

LEVEL = 1  # of 255: rounding between the passes
MEASURE = """
import json, resource, sys
import numpy as np
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.models.vision.sam_decoder import postprocess_masks
from lionjax.data.letterbox import Letterbox

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

settings = dict(image_size=336, use_tags=False)
stretch = Processor(ProcessorConfig(**settings))
square = Processor(ProcessorConfig(**settings, pad_to_square=True, sam_image_size=1024))
stretch.load_pixels(np.zeros((500, 500, 3), np.uint8)), square.load_pixels(np.zeros((500, 400, 3), np.uint8))
for width, height in json.loads(sys.argv[1]):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = 255
    before = peak()
    found = [stretch.load_pixels(image), square.load_pixels(image), square.load_sam_pixels(image)["sam"]]
    inside = Letterbox(width, height).pixel_rect(1024)
    masks = postprocess_masks(np.ones((1, 256, 256)), 1024, inside, (height, width)) > 0
    sums = [int(array.sum()) for array in found]
    print(json.dumps([width, height, peak() - before, sums, int(masks.sum()), image.nbytes // 2**20]))
"""


def pictures(count):
    """`count` random pictures with random settings; some are one pixel wide, some black and white."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(2 ** rng.uniform(0, 8)) for _ in range(2))
        if number % 3 == 0:
            width, height = int(rng.integers(1, 4)), int(2 ** rng.uniform(6, 11))
        if number % 6 == 0:
            width, height = height, width
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        pixels = pixels if number % 2 else np.where(pixels > 127, 255, 0).astype(np.uint8)
        rows, columns = (int(rng.integers(1, 50)) for _ in range(2))
        top, left = int(rng.integers(0, rows)), int(rng.integers(0, columns))
        window = (top, left, int(rng.integers(1, rows - top + 1)), int(rng.integers(1, columns - left + 1)))
        kind = list(resample.SUPPORT | {"nearest": 0})[number % 5]
        yield Image.fromarray(pixels), rows, columns, window, kind, tuple(rng.integers(0, 256, 3).tolist())


def cut(array, window):
    top, left, height, width = window
    return array[top : top + height, left : left + width].astype(int)


@pytest.mark.parametrize("tile", [resample.MAX_TILE_PIXELS, 2000])
def test_any_window_of_a_resize_equals_pillows_full_resize(tile, monkeypatch):
    monkeypatch.setattr(resample, "MAX_TILE_PIXELS", tile)
    for image, rows, columns, window, kind, _ in pictures(200):
        whole = np.asarray(image.resize((columns, rows), resample.RESAMPLING[kind]))
        found = resample.resize(image, rows, columns, None, kind, window)
        assert np.abs(cut(whole, window) - found).max() <= LEVEL, (image.size, rows, columns, window, kind)
        np.testing.assert_array_equal(resample.resize(image, rows, columns, None, kind), whole) if tile > 1e6 else None


@pytest.mark.parametrize("way", ["canvas", "weights"])
def test_any_window_of_a_padded_square_equals_pillows_full_resize(way, monkeypatch):
    """Both ways: a canvas around the image, and Pillow's integer weights where that canvas would be long."""
    monkeypatch.setattr(resample, "_is_small", lambda axis, low, high: way == "canvas")
    for image, rows, columns, window, kind, color in pictures(200):
        square = Letterbox(*image.size)
        padded = Image.new("RGB", (square.side, square.side), color)
        padded.paste(image, square.offset)
        whole = np.asarray(padded.resize((columns, rows), resample.RESAMPLING[kind]))
        found = resample.resize_padded(image, square.offset, square.side, rows, columns, color, kind, window)
        assert np.abs(cut(whole, window) - found).max() <= LEVEL, (image.size, rows, columns, window, kind)


@pytest.mark.slow
def test_resizing_a_long_image_needs_memory_of_its_output_only():
    """The square of the long side would be 1.2 GB and 3 TB; Pillow's middle pass of the stretch 1.3 GB."""
    sizes = [(1080, 20000), (20000, 1080), (1_000_000, 10), (10, 1_000_000)]
    command = [sys.executable, "-c", MEASURE, json.dumps(sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(line[:2]) for line in lines] == sizes
    for width, height, grown, sums, masks, image_mib in lines:
        # Pillow holds 4 bytes for each pixel, twice; masks are float32, with two temporary arrays.
        assert grown < 6 * image_mib + 120, (width, height, grown)
        assert masks == width * height
        white = 336 * 336 * 3 * 255
        assert sums[0] == pytest.approx(white / 2, rel=0.02)  # the left half is white
        short = min(width, height) / max(width, height)
        assert sums[1] == pytest.approx(white * (1 - short / 2), rel=0.02)  # and so is the padding
        assert 0 < sums[2] <= 1024 * 1024 * 3 * 255 * max(short, 2 / 1024)


@pytest.mark.parametrize("number", [4, 6, -1, True, "bicubic", None])
def test_a_filter_that_is_not_supported_is_refused_by_name(number):
    with pytest.raises(UserError, match=f"resample is {number!r}"):
        resample.resample_name(number)
