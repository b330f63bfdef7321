# SPDX-License-Identifier: Apache-2.0
"""ScienceQA as LLaVA asks and scores it."""

import json

import numpy as np
import pytest
from chat_prompts import decoder_prompts
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets.scienceqa import ScienceQa, format_answer, format_question
from lionjax.evaluation import runner
from lionjax.evaluation.metrics.vqa import parse_choice
from lionjax.evaluation.tasks import SCORERS

PLANT = {
    "question": "Which one is alive?",
    "choices": ["a rock", "a fern"],
    "answer": 1,
    "hint": "",
    "image": None,
    "lecture": "Living things\ngrow.",
    "solution": "A fern grows.",
}
MAP = PLANT | {"hint": "Look at  the map.", "image": "image.png", "answer": 0, "lecture": "", "solution": ""}


def test_a_problem_is_asked_as_qcm_and_answered_as_lea():
    assert format_question(PLANT) == "Which one is alive?\nContext: N/A\nOptions: (A) a rock (B) a fern"
    assert format_answer(PLANT) == "Living things grow. A fern grows. The answer is B."
    assert "Context: Look at the map.\n" in format_question(MAP) and format_answer(MAP) == "The answer is A."
    with pytest.raises(UserError, match="6 options"):
        format_question(PLANT | {"choices": list("abcdef")})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. a fern", "B"),
        ("A fern grows. The answer is B.", "B"),
        ("a fern", None),
        ("B a fern", None),
        ("The answer is A. No: The answer is B.", None),
        ("the answer is B.", None),
        ("", None),
    ],
)
def test_choice_letter_is_parsed_as_in_llavas_evaluation(text, letter):
    assert parse_choice(text) == letter


def test_questions_with_and_without_a_picture_are_read_counted_apart_and_shown_what_there_is(tmp_path):
    (tmp_path / "images/test/2").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/test/2/image.png")
    (tmp_path / "problems.json").write_text(json.dumps({"1": PLANT, "2": MAP}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": [], "val": [], "test": ["1", "2"]}))
    prompts = decoder_prompts(max_target_tokens=32)
    data = DataConfig((ScienceQa(str(tmp_path)),), prompts, num_threads=0)
    samples = sorted(pipeline.examples(data, "choice", "heldout"), key=lambda sample: sample.example.kind)
    assert [sample.example.kind for sample in samples] == ["image", "text"]
    processor = pipeline.open_mixture(data, "heldout").processor
    rows = [row[False] for _, row in runner.encode_samples(processor, data, samples, False, "choice")]
    assert [(row["prompt"] == 21).any() for row in rows] == [True, False]
    assert np.ptp(rows[1]["pixels"]) == 0
    scored = SCORERS["choice"]([sample.example for sample in samples], ["The answer is A.", "who knows"])
    assert scored.metrics == {"choice_accuracy": 0.5} and scored.details == {"unreadable": 0.5}
