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


def test_scatter_writes_the_kth_embedding_to_the_kth_marked_position():
    x = np.arange(15.0).reshape(3, 5, 1)
    pieces = np.array([[[100.0], [101]], [[200], [201]], [[300], [301]]])
    made = np.asarray(region.scatter_embeddings(x, HERE, pieces))[..., 0]
    np.testing.assert_array_equal(made[0], [0, 100, 2, 101, 4])
    np.testing.assert_array_equal(made[1], x[1, :, 0])
    np.testing.assert_array_equal(made[2, :2], [300, 301])


def test_first_k_positions_are_in_order():
    place, real = region.first_k_positions(HERE, 2)
    np.testing.assert_array_equal(real, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(np.asarray(place)[[0, 2]], [[1, 3], [0, 1]])
    x = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(region.take_positions(x, place)[0], [1, 3])
    np.testing.assert_array_equal(region.take_positions(x[..., None], place)[2, :, 0], [10, 11])
    assert region.first_k_positions(HERE, 9)[0].shape == (3, 5)


BOX = [0.1, 0.2, 0.6, 0.5]


@pytest.mark.parametrize(
    "boxes, tokens, message",
    [
        ([BOX], 2, "row 1 has 2 box tokens and 1 boxes; give one box per token"),
        ([BOX, BOX], 1, "row 1 has 1 box tokens and 2 boxes"),
        ([BOX], 3, "row 1 has 3 box tokens; at most 2 are allowed"),
        ([[0.6, 0.2, 0.1, 0.5]], 1, r"the box \[0.6, 0.2, 0.1, 0.5\] is invalid"),
        ([[0.1, 0.2, 1.6, 0.5]], 1, "in 0..1 with"),
        ([[-0.1, 0.2, 0.6, 0.5]], 1, "in 0..1 with"),
        ([[0.1, float("nan"), 0.6, 0.5]], 1, "in 0..1 with"),
        ([BOX, BOX], 0, None),  # said in digits
        ([BOX, BOX], 2, None),
        ([], 0, None),
    ],
)
def test_boxes_that_do_not_fit_the_box_tokens_of_the_text_are_refused(boxes, tokens, message):
    ids, nothing = np.array([[5, 9, 9, 7], [5, *[9] * tokens, *[7] * (3 - tokens)]]), np.zeros((2, 1), np.int32)
    given, real = np.zeros((2, 2, 4)), np.array([[1, 1], [0, 0]])
    given[0], given[1, : len(boxes)], real[1, : len(boxes)] = BOX, np.reshape(boxes, (-1, 4)), 1
    batch = Batch(
        None, ids, np.ones_like(ids), None, None, nothing, nothing, nothing, nothing[:, 0], nothing[:, 0], given, real
    )
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_boxes(SimpleNamespace(info=SimpleNamespace(box_token=9)), batch)
    check_boxes(SimpleNamespace(info=SimpleNamespace(box_token=None)), batch)  # a model without box tokens


TRIGGER, LOCATION = 8, 9
SYSTEM = SimpleNamespace(trigger_token_id=TRIGGER, box_token_id=LOCATION, focal_weight=20.0, loss_variant="paper")


def answered(target, learned, masks_known=None) -> Batch:
    """One row without a prompt that says these words, with two boxes and the masks of both."""
    target_BM, learned_BM = np.array([target]), np.array([learned])
    nothing, row = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    masks_BKHW = np.zeros((1, 2, 4, 4), bool)
    masks_BKHW[0, :, :2] = True
    return Batch(
        None,
        nothing,
        nothing,
        nothing,
        nothing,
        target_BM,
        np.ones_like(target_BM),
        learned_BM,
        row,
        row,
        np.array([[BOX, BOX]], np.float32),
        np.ones((1, 2), np.int32),
        masks_BKHW=masks_BKHW,
        masks_mask_BK=None if masks_known is None else np.array([masks_known]),
    )


@pytest.mark.parametrize(
    ("learned", "places", "boxes"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 3], [0, 1]),
        ([0, 0, 0, 1, 1, 1], [3], [1]),  # the first was said by the other side
        ([1, 1, 1, 0, 0, 0], [0], [0]),
        ([0, 0, 0, 0, 0, 0], [], []),
    ],
)
def test_only_triggers_in_the_loss_mask_are_gathered(learned, places, boxes):
    batch = answered([TRIGGER, LOCATION, 5, TRIGGER, LOCATION, 6], learned)
    states_BMD = np.arange(6.0).reshape(1, 6, 1)
    state_BKD, which_BK, real_BK = map(np.asarray, region.gather_region_queries(SYSTEM, batch, states_BMD))
    assert state_BKD[0, real_BK[0], 0].tolist() == places
    assert which_BK[0, real_BK[0]].tolist() == boxes


@pytest.mark.slow
def test_an_unknown_true_mask_is_not_learned_and_not_counted():
    """Of two boxes one has no true mask: what is drawn there changes nothing."""
    words = [TRIGGER, LOCATION, TRIGGER, LOCATION]
    rng = np.random.default_rng(0)
    logits_BKhw = rng.standard_normal((1, 2, 4, 4)).astype(np.float32)
    other_BKhw = logits_BKhw.copy()
    other_BKhw[0, 1] += 3
    iou_BK = np.array([[0.3, 0.6]], np.float32)

    def loss(logits, masks_known, real=(1, 1)):
        batch = answered(words, [1] * 4, masks_known)
        found = np.zeros((1, 2, 1)), np.array([[0, 1]]), np.array([real], bool)
        value, metrics = region.mask_loss(SYSTEM, batch, found, logits, iou_BK, lambda x: x)
        return float(value), float(metrics["weight"])

    first_alone = loss(logits_BKhw, (1, 1), real=(1, 0))
    assert loss(logits_BKhw, (1, 0)) == loss(other_BKhw, (1, 0)) == first_alone
    assert first_alone[1] == 1
    assert loss(logits_BKhw, (1, 1)) == loss(logits_BKhw, None) != first_alone
    assert loss(logits_BKhw, (1, 1)) != loss(other_BKhw, (1, 1))
