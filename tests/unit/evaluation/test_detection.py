# SPDX-License-Identifier: Apache-2.0
"""Scores of detections by name: found, missed, silent, held-out pairs; boxes as text and back."""

import dataclasses

import numpy as np
import pytest

from lionjax.data.scenes import tasks, world
from lionjax.evaluation import detection
from lionjax.evaluation.tasks import SCORERS, constant_answers
from lionjax.inference.detector import Detections


def example(kind: str = "pairs", index: int = 3, split: str = "heldout"):
    return tasks.detect(world.sample_scene(split, index), np.random.default_rng(index), kind)


@pytest.mark.parametrize("kind", ["pairs", "words", "tags"])
def test_true_boxes_as_text_find_everything_and_name_nothing_absent(kind):
    examples = [example(kind, index) for index in range(20)]
    scores = SCORERS["detect"](examples, [e.answer for e in examples])
    assert scores.metrics == {"detect_found": 1.0, "detect_silent": 1.0} and set(scores.sample_scores) == {1.0}
    nothing = SCORERS["detect"](examples, constant_answers("detect", examples, examples))
    assert nothing.metrics == {"detect_found": 0.0, "detect_silent": 1.0}
    assert all(low <= high for low, high in nothing.bootstrap_intervals().values())


def test_a_box_counts_for_the_names_whose_words_its_phrase_has():
    scene_example = dataclasses.replace(
        example(), question="red star. red ring. blue star.", boxes=((0.1, 0.1, 0.5, 0.5),), box_names=(("red star",),)
    )
    rows = detection.score_names(
        scene_example, "red star [0.100,0.100,0.500,0.450], red ring [0.600,0.600,0.900,0.900]"
    )
    assert rows == [("red star", 1, 1, 1), ("red ring", 0, 0, 1), ("blue star", 0, 0, 0)]
    assert detection.detection_rates(rows) == {"found": 1.0, "silent": 0.5}
    far = detection.score_names(scene_example, "red [0.100,0.100,0.500,0.500], star red [0.6,0.6,0.9,0.9]")
    assert far[0] == ("red star", 1, 0, 1)


def test_held_out_pairs_have_a_rate_of_their_own():
    held_out, seen = sorted(detection.HELD_OUT_NAMES)[0], "red circle"
    rates = detection.detection_rates([(held_out, 2, 1, 1), (seen, 1, 1, 1)])
    assert rates["found_held_out"] == 0.5 and rates["found"] == pytest.approx(2 / 3)


def test_detections_become_text_that_is_read_back():
    box_K4 = np.float32([[-0.1, 0.2, 0.5, 0.75], [0.5, 0.5, 1.2, 1.0]])
    found = Detections(box_K4, (0.9, 0.8), ("red star", "ring"), np.zeros((2, 4)), (10, 10))
    answer = detection._to_answer(found)
    assert answer.text == "red star [0.000,0.200,0.500,0.750], ring [0.500,0.500,1.000,1.000]"
    parsed = detection.parse_detections(answer.text)
    assert [set(words) for words, _ in parsed] == [{"red", "star"}, {"ring"}]
    np.testing.assert_allclose([box for _, box in parsed], answer.boxes)
    empty = Detections(np.zeros((0, 4), np.float32), (), (), np.zeros((0, 4)), (10, 10))
    assert detection._to_answer(empty).text == "nothing" and detection.parse_detections("nothing") == []
