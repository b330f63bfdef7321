# SPDX-License-Identifier: Apache-2.0
"""Square padding: pictures, boxes and masks lie where they should, at every shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lionjax.data import letterbox
from lionjax.data.letterbox import Square

sizes = st.integers(1, 3000)
edges = st.floats(0, 1)


@given(sizes, sizes, st.tuples(edges, edges, edges, edges))
def test_a_box_comes_back_from_the_square_as_it_went_in(width, height, box):
    square = Square(width, height)
    inside = square.into(box)
    assert all(-1e-9 <= edge <= 1 + 1e-9 for edge in inside)
    assert square.back(inside) == pytest.approx(box, abs=1e-6)


def test_a_box_on_the_padding_is_cut_to_the_picture():
    assert Square(100, 50).back((-0.2, 0.0, 0.5, 1.1)) == (0.0, 0.0, 0.5, 1.0)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 30), (1, 64), (64, 1), (1, 3000), (7, 7)])
def test_a_painted_box_is_found_where_its_coordinates_say(size):
    wide, high = size
    box = (0.25, 0.5, 0.75, 1.0)
    pixels = np.zeros((high, wide, 3), np.uint8)
    edges = [int(round(edge * length)) for edge, length in zip(box, (wide, high, wide, high))]
    x0, y0, x1, y1 = edges[0], edges[1], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)
    pixels[y0:y1, x0:x1] = (255, 0, 0)
    seen = letterbox.padded(Image.fromarray(pixels), 336)
    red = (seen[..., 0] > 200) & (seen[..., 1] < 60)
    where = Square(wide, high).into((x0 / wide, y0 / high, x1 / wide, y1 / high))
    if red.any():  # a line of one pixel in 3000 is thinner than a pixel here
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 336
        blur = 2 * max(1, 336 / max(size)) / 336
        np.testing.assert_allclose(found, where, atol=blur)
    else:
        assert max(size) > 336


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (1, 3000), (9, 9)])
def test_sam_sees_the_picture_in_the_middle_of_zeros_and_its_mask_in_the_same_place(size):
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    seen = letterbox.sam_image(Image.fromarray(pixels), 64)
    mask = letterbox.sam_mask(np.ones((size[1], size[0]), bool), 64)
    top, left, high, wide = Square(*size).inside(64)
    assert (seen.any(-1) == mask).all() and mask.sum() == high * wide >= 64
    assert abs(2 * top + high - 64) <= 1 and abs(2 * left + wide - 64) <= 1
    np.testing.assert_allclose(seen[mask][0], (200 - np.array(letterbox.SAM_MEAN)) / letterbox.SAM_STD, rtol=1e-5)
