# SPDX-License-Identifier: Apache-2.0
"""Square padding: pictures, boxes and masks lie where they should, at every shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lionjax.data import letterbox
from lionjax.data.letterbox import Letterbox

sizes = st.integers(1, 3000)
edges = st.floats(0, 1)


@given(sizes, sizes, st.tuples(edges, edges, edges, edges))
def test_boxes_round_trip_through_the_padded_square(width, height, box):
    square = Letterbox(width, height)
    inside = square.to_padded(box)
    assert all(-1e-9 <= edge <= 1 + 1e-9 for edge in inside)
    assert square.from_padded(inside) == pytest.approx(box, abs=1e-6)


def test_a_box_on_the_padding_is_cut_to_the_picture():
    assert Letterbox(100, 50).from_padded((-0.2, 0.0, 0.5, 1.1)) == (0.0, 0.0, 0.5, 1.0)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 30), (1, 64), (64, 1), (1, 3000), (7, 7)])
def test_a_drawn_box_has_the_pixels_of_its_coordinates_after_padding(size):
    wide, high = size
    box = (0.25, 0.5, 0.75, 1.0)
    pixels = np.zeros((high, wide, 3), np.uint8)
    edges = [int(round(edge * length)) for edge, length in zip(box, (wide, high, wide, high))]
    x0, y0, x1, y1 = edges[0], edges[1], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)
    pixels[y0:y1, x0:x1] = (255, 0, 0)
    seen = letterbox.letterbox_image(Image.fromarray(pixels), 336)
    red = (seen[..., 0] > 200) & (seen[..., 1] < 60)
    where = Letterbox(wide, high).to_padded((x0 / wide, y0 / high, x1 / wide, y1 / high))
    if red.any():  # a line of one pixel in 3000 is thinner than a pixel here
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 336
        blur = 2 * max(1, 336 / max(size)) / 336
        np.testing.assert_allclose(found, where, atol=blur)
    else:
        assert max(size) > 336


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (1, 3000), (9, 9)])
def test_sam_input_is_zero_padded_around_the_image_and_masks_align(size):
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    seen = letterbox.preprocess_sam_image(Image.fromarray(pixels), 64)
    mask = letterbox.letterbox_mask(np.ones((size[1], size[0]), bool), 64)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert (seen.any(-1) == mask).all() and mask.sum() == len(rows) * len(columns)
    for found, length in ((rows, size[1]), (columns, size[0])):
        assert len(found) == max(1, round(64 * length / max(size)))
        assert 63 - found[-1] - found[0] in (0, 1)  # the larger border lies behind
    np.testing.assert_allclose(seen[mask][0], (200 - np.array(letterbox.SAM_MEAN)) / letterbox.SAM_STD, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "corner"), [((7, 7), (0, 0)), ((4, 2), (0, 1)), ((5, 2), (0, 1)), ((2, 5), (1, 0)), ((4, 7), (1, 0))]
)
def test_padding_offsets_are_rounded_down(size, corner):
    assert Letterbox(*size).offset == corner


@pytest.mark.parametrize(
    ("size", "box", "inside"),
    [
        ((4, 2), (0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 0.75, 0.75)),
        ((2, 4), (0.5, 0.25, 1.0, 0.75), (0.5, 0.25, 0.75, 0.75)),
        ((2, 5), (0.5, 0.2, 1.0, 0.8), (0.4, 0.2, 0.6, 0.8)),  # one column before it, two behind
        ((5, 2), (0.2, 0.0, 0.8, 0.5), (0.2, 0.2, 0.8, 0.4)),
        ((3, 3), (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_boxes_in_the_square_and_back_by_hand(size, box, inside):
    assert Letterbox(*size).to_padded(box) == pytest.approx(inside)
    assert Letterbox(*size).from_padded(inside) == pytest.approx(box)


@pytest.mark.parametrize(
    ("size", "pixels", "inside"),
    [
        ((40, 20), 64, (16, 0, 32, 64)),
        ((3, 2), 64, (10, 0, 43, 64)),  # 42.7 pixels high
        ((2, 3), 64, (0, 10, 64, 43)),
        ((20, 41), 64, (0, 16, 64, 31)),  # 31.2 wide, 16 columns before it and 17 behind
        ((4, 1), 10, (3, 0, 3, 10)),  # 2.5 becomes 3
        ((1000, 1), 64, (31, 0, 1, 64)),  # never nothing
        ((640, 480), 1024, (128, 0, 768, 1024)),
    ],
)
def test_pixel_rect_in_sams_padded_square_equals_hand_computed_values(size, pixels, inside):
    assert Letterbox(*size).pixel_rect(pixels) == inside
    top, left, high, wide = inside
    picture = Image.new("RGB", size, (200, 200, 200))
    seen = letterbox.letterbox_sam_image(picture, pixels)
    wanted = np.zeros((pixels, pixels, 3), np.uint8)
    wanted[top : top + high, left : left + wide] = 200
    np.testing.assert_array_equal(seen, wanted)
    mask = letterbox.letterbox_mask(np.ones(size[::-1], bool), pixels)
    np.testing.assert_array_equal(mask, wanted[..., 0] > 0)


@pytest.mark.parametrize(("size", "where"), [((2, 5), np.s_[:, 1:3]), ((5, 2), np.s_[1:3])])
def test_image_that_keeps_its_size_is_pasted_unchanged(size, where):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    wanted = np.full((5, 5, 3), 255, np.uint8)
    wanted[where] = pixels
    np.testing.assert_array_equal(letterbox.letterbox_image(Image.fromarray(pixels), 5), wanted)


def test_sam_input_is_enlarged_by_linear_interpolation():
    """Bilinear: a step of 200 over two pixels, at a quarter and at three quarters of the way."""
    step = np.array([[[0] * 3, [200] * 3]] * 2, np.uint8)
    seen = letterbox.letterbox_sam_image(Image.fromarray(step), 4)
    np.testing.assert_array_equal(seen[..., 0], [[0, 50, 150, 200]] * 4)
