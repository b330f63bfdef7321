# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy, POPE and VSR: the official rules by value, and on real ten-answer annotations."""

import gzip
import itertools
import json
import types
from collections import Counter

import pytest
import shared_data

from lionjax.evaluation.metrics.vqa import (
    normalize_answer,
    parse_pope_answer,
    parse_yes_no,
    pope_scores,
    vqa_accuracy,
    vsr_accuracy,
)
from lionjax.evaluation.tasks import score_vqa

DATA = shared_data.ROOT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It's the Two dogs!", "it's 2 dogs"),
        ("None", "0"),
        ("A man and an apple.", "man and apple"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("black/white", "black white"),  # a mark between letters leaves a space
        ("black/ white", "black white"),
        ("x-ray - yes", "xray yes"),  # one that touches a space anywhere leaves none
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the table
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("10:30", "10:30"),
        ("\tyes\n", "yes"),
        ("the", ""),
    ],
)
def test_the_normalizer_follows_the_official_rules(text, answer):
    assert normalize_answer(text) == answer


@pytest.mark.parametrize(("matches", "accuracy"), list(enumerate([0, 0.3, 0.6, 0.9] + [1] * 7)))
def test_vqa_accuracy_with_ten_references_has_the_official_steps(matches, accuracy):
    references = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("Red.", references) == pytest.approx(accuracy)


def test_vqa_accuracy_can_reach_one_with_few_references():
    assert vqa_accuracy("red", ["the red"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    assert vqa_accuracy("red", ["red", "red", "red"]) == 1
    assert vqa_accuracy("red", ["red", "blue"]) == 0.5


def test_number_words_in_references_are_not_normalized_as_in_the_official_code():
    assert vqa_accuracy("two", ["two"] * 10) == 1
    assert vqa_accuracy("two", ["two"] * 10, raw_references=True) == 0
    assert vqa_accuracy("2", ["2."] * 9 + ["3"], raw_references=True) == 1
    assert vqa_accuracy("2", ["2."] * 10, raw_references=True) == 0


def test_ten_references_of_a_task_are_treated_as_by_the_official_code():
    ten = ["squares"] * 2 + ["two squares"] * 3 + ["2 squares"] * 2 + ["yellow squares"] * 3
    examples = [types.SimpleNamespace(answers=answers) for answers in (ten, ten[:9])]
    assert score_vqa(examples, ["two squares"] * 2).sample_scores == pytest.approx([0.6, 1])


@pytest.mark.slow
@shared_data.needs("vqa")
@pytest.mark.parametrize(("name", "both", "raw"), [("textvqa", 0.98452, 0.93694), ("vizwiz", 0.94110, 0.94017)])
def test_the_majority_answer_scores_as_leaving_out_each_of_ten_people(name, both, raw):
    with gzip.open(DATA / "vqa" / f"{name}_val_annotations_vqa_format.json.gz") as file:
        notes = json.load(file)["annotations"]
    scores = {"both": 0.0, "raw": 0.0}
    for note in notes:
        references = [answer["answer"] for answer in note["answers"]]
        majority = Counter(references).most_common(1)[0][0]
        score = vqa_accuracy(majority, references)
        normal = [normalize_answer(text) for text in references]
        nines = itertools.combinations(normal, len(normal) - 1)
        by_hand = [min(1, nine.count(normalize_answer(majority)) / 3) for nine in nines]
        assert score == pytest.approx(sum(by_hand) / 10)
        scores["both"] += score / len(notes)
        scores["raw"] += vqa_accuracy(majority, references, raw_references=True) / len(notes)
    # The second is what the challenge's own code gives for the same answers.
    assert scores == pytest.approx({"both": both, "raw": raw}, abs=1e-5)


@pytest.mark.parametrize("references", [[], "red"])
def test_no_reference_is_refused_in_a_sentence(references):
    with pytest.raises(ValueError, match="list of at least one answer"):
        vqa_accuracy("red", references)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No, there is none.", False),
        ("There is not a dog", False),
        ("I see no dog", False),
        ("Yes. There is no cat, though", True),  # only the first sentence counts
        ("", True),
        ("NO", True),
        ("It isn't", True),
        ("Nothing", True),
    ],
)
def test_pope_counts_every_answer_without_no_as_yes(text, said):
    assert parse_pope_answer(text) is said


def test_yes_or_no_is_read_from_the_first_word_or_not_at_all():
    assert [parse_yes_no(text) for text in ("Yes.", "TRUE", " no, it is", "False")] == [1, 1, 0, 0]
    assert [parse_yes_no(text) for text in ("", "maybe no", "nothing", "yesterday")] == [None] * 4


def test_pope_scores_of_a_small_confusion_table():
    said = [True, True, True, False, False]
    true = [True, True, False, True, False]
    expected = dict(accuracy=3 / 5, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_ratio=3 / 5)
    assert pope_scores(said, true) == pytest.approx(expected)


def test_pope_scores_stay_finite_when_one_side_is_empty():
    never = pope_scores([False, False], [True, False])
    assert never == dict(accuracy=0.5, precision=0, recall=0, f1=0, yes_ratio=0)
    always = pope_scores([True, True], [False, False])
    assert always == dict(accuracy=0, precision=0, recall=0, f1=0, yes_ratio=1)


@shared_data.needs("pope")
def test_always_yes_on_the_real_pope_questions_has_half_accuracy_and_full_recall():
    lines = (DATA / "pope" / "coco_pope_random.json").read_text().splitlines()
    labels = [json.loads(line)["label"] == "yes" for line in lines]
    scores = pope_scores([parse_pope_answer("Yes")] * len(labels), labels)
    assert (len(labels), sum(labels)) == (3000, 1500)
    expected = dict(accuracy=0.5, precision=0.5, recall=1, f1=2 / 3, yes_ratio=1)
    assert scores == pytest.approx(expected)


def test_vsr_counts_an_unread_answer_as_wrong():
    assert vsr_accuracy([True, None, None, False], [True, True, False, False]) == 0.5


@pytest.mark.parametrize("score", [pope_scores, vsr_accuracy])
def test_unequal_answers_and_labels_are_refused_in_a_sentence(score):
    with pytest.raises(ValueError, match="1 answers for 2 labels"):
        score([True], [True, False])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
