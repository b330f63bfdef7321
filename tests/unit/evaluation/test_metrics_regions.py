# SPDX-License-Identifier: Apache-2.0
"""Boxes, masks, tags, ranks and intervals: known values and properties."""

import gzip
import json

import numpy as np
import pytest
import shared_data
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from lionjax.evaluation.metrics.regions import (
    average_precision,
    bootstrap_interval,
    ciou,
    iou,
    iou_matrix,
    mask_overlaps,
    mean_average_precision,
    parse_box,
    phrase_hits,
    rec_scores,
    reciprocal_ranks,
    res_scores,
    tag_scores,
)

DATA = shared_data.ROOT

numbers = st.floats(-2, 2, allow_nan=False)
boxes = st.tuples(numbers, numbers, numbers, numbers)
unit = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


# ------------------------------------------------------------------------------------------ boxes


@given(boxes, boxes)
def test_iou_is_symmetric_within_0_and_1_and_the_same_in_pairs(left, right):
    value = iou([left], [right])[0]
    assert 0 <= value <= 1
    assert value == iou([right], [left])[0] == iou_matrix([left], [right])[0, 0]


@given(boxes)
def test_iou_of_a_box_with_itself_is_one_and_zero_without_area(box):
    x0, y0, x1, y1 = box
    has_area = x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) > 0  # tiny sides underflow
    assert iou([box], [box])[0] == (1 if has_area else 0)


@given(boxes, boxes, st.sampled_from([0.5, 2.0, 1024.0]))
def test_iou_is_invariant_to_scale(left, right, scale):
    scaled = iou(np.array([left]) * scale, np.array([right]) * scale)
    assert scaled == pytest.approx(iou([left], [right]), abs=1e-9)


def test_iou_of_known_boxes():
    left = [(0, 0, 2, 2), (0, 0, 2, 2), (0, 0, 1, 1), (0, 0, 4, 4)]
    right = [(1, 1, 3, 3), (0, 0, 2, 1), (1, 0, 2, 1), (1, 1, 2, 2)]
    assert iou(left, right) == pytest.approx([1 / 7, 1 / 2, 0, 1 / 16])
    assert iou_matrix(left, right).shape == (4, 4)
    assert np.diag(iou_matrix(left, right)) == pytest.approx(iou(left, right))
    assert iou_matrix([], right).shape == (0, 4)


def test_iou_of_a_box_that_is_not_a_number_is_zero():
    assert iou([(0, 0, np.nan, 1)], [(0, 0, 1, 1)])[0] == 0


def test_iou_is_that_of_pycocotools():
    random = np.random.default_rng(0)
    corners = random.uniform(0, 100, (20, 2))
    sides = random.uniform(1, 100, (20, 2))
    ours = np.concatenate([corners, corners + sides], axis=1)
    theirs = np.concatenate([corners, sides], axis=1)
    expected = coco.iou(theirs, theirs, [0] * 20)
    np.testing.assert_allclose(iou_matrix(ours, ours), expected, rtol=1e-6)


def test_boxes_of_another_shape_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"boxes have shape \(4,\)"):
        iou((0, 0, 1, 1), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="2 boxes against 1"):
        iou([(0, 0, 1, 1)] * 2, [(0, 0, 1, 1)])


@given(unit, unit, unit, unit)
def test_a_written_box_is_read_back_within_its_three_decimals(x0, y0, x1, y1):
    text = f"Answer: [{x0:.3f},{y0:.3f},{x1:.3f},{y1:.3f}]"
    ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    assert parse_box(text) == ordered
    in_order = x0 < x1 and y0 < y1
    assert parse_box(text, strict=True) == (ordered if in_order else None)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("it is at (0.1 0.2 .3 0.4).", (0.1, 0.2, 0.3, 0.4)),
        ("0.1;0.2;0.3;0.4.", (0.1, 0.2, 0.3, 0.4)),
        ("1. the box [0.1,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.3,0.4,0.1,0.2]", (0.1, 0.2, 0.3, 0.4)),
        ("[-0.1,0.2,1.01,0.4]", (0.0, 0.2, 1.0, 0.4)),
        ("[12,20,300,240]", None),
        ("[0.1,0.2,0.3]", None),
        ("[0.1,0.2,,0.4]", None),
        ("no box", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_loosely_formatted_box_is_parsed_only_without_strict(text, box):
    assert parse_box(text) == box
    if text != "1. the box [0.1,0.2,0.3,0.4]":
        assert parse_box(text, strict=True) is None


def test_strict_parsing_refuses_two_boxes_and_requires_the_box_inside_the_image():
    two = "[0.440,0.060,0.650,0.367] and [0,0,1,1]"
    assert parse_box(two, strict=True) is None and parse_box(two) == (0.44, 0.06, 0.65, 0.367)
    assert parse_box("[0.1,0.2,1.5,0.4]", strict=True) is None
    assert parse_box("[0.1,0.2,1.000,0.4]", strict=True) == (0.1, 0.2, 1.0, 0.4)


def test_rec_counts_unparsed_answers_and_an_iou_of_exactly_one_half_as_misses():
    truth = np.array([(0, 0, 1, 1)] * 4)
    scores = rec_scores([(0, 0, 1, 1), (0, 0, 1, 0.75), (0, 0, 1, 0.5), None], truth)
    expected = {"accuracy_50": 2 / 4, "mean_iou": 2.25 / 4, "unparsable": 1 / 4}
    assert scores == pytest.approx(expected)


@shared_data.needs("refcoco")
def test_in_real_refcoco_the_true_box_always_scores_and_the_whole_image_rarely():
    with gzip.open(DATA / "refcoco" / "refcoco_val.json.gz") as file:
        rows = json.load(file)
    truth = np.array([(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)])
    whole = [(0, 0, row["width"], row["height"]) for row in rows]
    assert rec_scores([tuple(box) for box in truth], truth)["accuracy_50"] == 1
    assert rec_scores(whole, truth)["accuracy_50"] == pytest.approx(0.0623, abs=1e-4)


def test_a_phrase_with_two_regions_is_scored_by_any_or_by_the_merged_box():
    regions = np.array([(0, 0, 1, 1), (3, 0, 4, 1)], dtype=float)
    found = [(0, 0, 1, 1), (0, 0, 4, 1), (0, 0, 1, 0.5), None]
    assert phrase_hits(found, [regions] * 4).tolist() == [True, False, True, False]
    assert phrase_hits(found, [regions] * 4, merged=True).tolist() == [False, True, False, False]
    assert phrase_hits([(0, 0, 1, 1)], [np.zeros((0, 4))], merged=True).tolist() == [False]


# ------------------------------------------------------------------------------------------ masks


def square(size: int, side: int) -> np.ndarray:
    mask_HW = np.zeros((size, size), dtype=bool)
    mask_HW[:side, :side] = True
    return mask_HW


def test_ciou_weights_by_area_and_giou_averages_over_masks():
    masks, truth = [square(10, 10), square(10, 1)], [square(10, 5), square(10, 1)]
    assert mask_overlaps(masks, truth).tolist() == [[25, 100], [1, 1]]
    assert res_scores(masks, truth) == pytest.approx({"ciou": 26 / 101, "giou": (0.25 + 1) / 2})


def test_two_empty_masks_have_iou_one_and_a_missing_mask_is_empty():
    empty, full = square(4, 0), square(4, 4)
    assert res_scores([empty, None], [empty, empty]) == {"ciou": 1, "giou": 1}
    assert res_scores([None, full], [full, empty]) == {"ciou": 0, "giou": 0}


def test_masks_as_run_lengths_score_as_masks_as_arrays():
    random = np.random.default_rng(0)
    masks, truth = random.random((2, 3, 7, 5)) < 0.5
    as_rle = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    assert res_scores(as_rle, truth) == res_scores(masks, truth)
    plain = {"size": [2, 2], "counts": [1, 2, 1]}  # column by column, zeros first
    assert mask_overlaps([plain], [np.array([[0, 1], [1, 0]], dtype=bool)]).tolist() == [[2, 2]]


def test_masks_of_another_size_or_kind_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"mask 0 is \(4, 4\) but its truth is \(5, 5\)"):
        mask_overlaps([square(4, 1)], [square(5, 1)])
    with pytest.raises(ValueError, match="give a bool array"):
        mask_overlaps([square(4, 1).astype(float)], [square(4, 1)])
    with pytest.raises(ValueError, match="1 masks for 2 expressions"):
        mask_overlaps([square(4, 1)], [square(4, 1)] * 2)


# ----------------------------------------------------------------------------- tags and rankings


def test_tag_f1_over_all_tags_and_over_each():
    scores = tag_scores([["dog", "dog", "cat"], {"dog"}], [["dog"], ["dog", "bus", "bus"]])
    expected = {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "macro_f1": 1 / 3}
    assert scores == pytest.approx(expected)  # dog 1, cat 0, bus 0


def test_tag_scores_of_empty_predictions_are_defined():
    assert tag_scores([[]], [["dog"]]) == dict(precision=0, recall=0, f1=0, macro_f1=0)
    assert tag_scores([["dog"]], [[]]) == dict(precision=0, recall=0, f1=0, macro_f1=0)
    assert tag_scores([[]], [[]])["f1"] == 1


def test_average_precision_of_a_known_ranking_and_of_ties():
    assert average_precision([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    for truth in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert average_precision([0.5] * 4, truth) == 1 / 4
    assert np.isnan(average_precision([0.5], [0]))


def test_mean_average_precision_leaves_out_tags_that_are_nowhere_true():
    scores = np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]])
    assert mean_average_precision(scores, [[1, 1, 0], [0, 0, 0]]) == pytest.approx((1 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="no image has a true tag"):
        mean_average_precision(scores, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"scores are \(2, 3\), truth \(2, 2\)"):
        mean_average_precision(scores, np.zeros((2, 2)))


def test_reciprocal_rank_counts_ties_against_a_constant_scorer():
    scores = [[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [0.1, np.nan, 0.2]]
    assert reciprocal_ranks(scores, [1, 0, 1, 1]) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


# --------------------------------------------------------------------------------------- interval


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(random.random(100) < 0.3, seed, num_resamples=200)
        held += low <= 0.3 <= high
    assert 0.93 <= held / 200 <= 0.98  # of 95 in 100


def test_an_interval_of_a_mean_is_about_1_96_standard_errors_to_each_side():
    values = np.arange(400.0)
    low, high = bootstrap_interval(values, 0, num_resamples=4000)
    side = 1.96 * values.std() / 20
    assert (values.mean() - low, high - values.mean()) == pytest.approx((side, side), rel=0.03)


def test_an_interval_is_fixed_by_its_seed_and_narrows_with_more_samples():
    values = np.arange(50) / 49
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)
    low, high = bootstrap_interval(values, 1)
    more_low, more_high = bootstrap_interval(np.tile(values, 16), 1)
    assert (more_high - more_low) == pytest.approx((high - low) / 4, rel=0.05)
    assert bootstrap_interval(np.ones(5), 0) == (1, 1)


def test_an_interval_of_ciou_resamples_whole_masks():
    overlaps_B2 = np.array([[25, 100], [1, 1]])
    low, high = bootstrap_interval(overlaps_B2, 0, ciou)
    assert (low, high) == (pytest.approx(0.25), 1)


def test_an_interval_of_nothing_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_interval(np.array([]), 0)
