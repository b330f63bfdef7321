# SPDX-License-Identifier: Apache-2.0
"""Places among words: putting boxes in, finding triggers, and boxes that do not fit the text."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from lionjax.core.types import Batch, UserError
from lionjax.models.heads import region
from lionjax.training.validate import check_boxes

HERE = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)


def test_the_kth_piece_of_a_row_stands_at_its_kth_marked_place_and_all_else_stays():
    x = np.arange(15.0).reshape(3, 5, 1)
    pieces = np.array([[[100.0], [101]], [[200], [201]], [[300], [301]]])
    made = np.asarray(region.put(x, HERE, pieces))[..., 0]
    np.testing.assert_array_equal(made[0], [0, 100, 2, 101, 4])
    np.testing.assert_array_equal(made[1], x[1, :, 0])
    np.testing.assert_array_equal(made[2, :2], [300, 301])


def test_marked_places_are_found_in_their_order():
    place, real = region.places(HERE, 2)
    np.testing.assert_array_equal(real, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(np.asarray(place)[[0, 2]], [[1, 3], [0, 1]])
    x = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(region.pick(x, place)[0], [1, 3])
    np.testing.assert_array_equal(region.pick(x[..., None], place)[2, :, 0], [10, 11])
    assert region.places(HERE, 9)[0].shape == (3, 5)


BOX = [0.1, 0.2, 0.6, 0.5]


@pytest.mark.parametrize(
    "boxes, tokens, message",
    [
        ([BOX], 2, "row 1 names 2 regions but has 1 boxes; give one each"),
        ([BOX, BOX], 1, "row 1 names 1 regions but has 2 boxes"),
        ([BOX], 3, "row 1 names 3 regions; at most 2 are allowed"),
        ([[0.6, 0.2, 0.1, 0.5]], 1, r"the box \[0.6, 0.2, 0.1, 0.5\] is none"),
        ([[0.1, 0.2, 1.6, 0.5]], 1, "between 0 and 1"),
        ([[-0.1, 0.2, 0.6, 0.5]], 1, "between 0 and 1"),
        ([[0.1, float("nan"), 0.6, 0.5]], 1, "between 0 and 1"),
        ([BOX, BOX], 0, None),  # said in digits
        ([BOX, BOX], 2, None),
        ([], 0, None),
    ],
)
def test_a_loader_whose_boxes_do_not_fit_its_texts_is_refused(boxes, tokens, message):
    ids, nothing = np.array([[5, 9, 9, 7], [5, *[9] * tokens, *[7] * (3 - tokens)]]), np.zeros((2, 1), np.int32)
    given, real = np.zeros((2, 2, 4)), np.array([[1, 1], [0, 0]])
    given[0], given[1, : len(boxes)], real[1, : len(boxes)] = BOX, np.reshape(boxes, (-1, 4)), 1
    batch = Batch(
        None, ids, np.ones_like(ids), None, None, nothing, nothing, nothing, nothing[:, 0], nothing[:, 0], given, real
    )
    for system in (SimpleNamespace(location_token=9), SimpleNamespace(places=SimpleNamespace(location_token=9))):
        with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
            check_boxes(system, batch)
    check_boxes(SimpleNamespace(places=None), batch)  # says no places
