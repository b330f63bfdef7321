# SPDX-License-Identifier: Apache-2.0
"""Questions from JSON Lines to JSON Lines: what a kill leaves is kept, and a bad row costs only its own answer."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from lionjax.core.types import UserError
from lionjax.inference.engine import Answer
from lionjax.pipelines import question_files
from lionjax.pipelines.question_files import answer_file, read_questions

SETTINGS = {"model": "a", "seed": 0}


class Listener:
    """A model that answers with its prompt, refuses some, and is killed after so many calls."""

    processor = types.SimpleNamespace(config=types.SimpleNamespace(max_pixels=10**6))

    def __init__(self, calls=99):
        self.asked, self.calls = [], calls

    def answer(self, images, prompts, seed, **given):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        if "too long" in prompts:
            raise UserError("the prompt is too long; shorten it")
        self.asked.append((list(prompts), seed, given))
        return [Answer(f"{prompt}!", np.zeros((0, 4))) for prompt in prompts]


def to_json(answer):
    return {"text": answer.text}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(question_files, "ROWS_AT_ONCE", 2)
    return tmp_path


def test_a_killed_run_goes_on_and_writes_the_answers_in_the_order_of_the_questions(folder):
    rows = [{"image": "a.png", "prompt": f"{k}?", "id": k} for k in range(6)]
    out, killed, model = folder / "answers.jsonl", Listener(calls=2), Listener()
    with pytest.raises(KeyboardInterrupt):
        answer_file(killed, rows, out, SETTINGS, to_json, folder, seed=7)
    assert not out.exists()
    with pytest.raises(UserError, match="answers of another seed"):
        answer_file(model, rows, out, SETTINGS | {"seed": 1}, to_json, folder, seed=1)
    assert answer_file(model, rows, out, SETTINGS, to_json, folder, seed=7) == 0
    assert model.asked == [(["4?", "5?"], [11, 12], {})]  # the others are kept, and seeds stay with their rows
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == [row | {"text": f"{row['prompt']}!"} for row in rows]
    with pytest.raises(UserError, match="is there already"):
        answer_file(model, rows, out, SETTINGS, to_json, folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["a.png", "answers.jsonl"]


def test_a_row_that_cannot_be_asked_says_why_and_the_others_are_answered(folder):
    rows = [
        {"image": "a.png", "question": "one?", "box": [0, 0, 0.5, 1]},
        {"image": "a.png", "prompt": "too long"},
        {"image": "none.png", "prompt": "?"},
        {"image": "https://example.com/a.png", "prompt": "?"},
        {"image": "../a.png", "prompt": "?"},
        {"image": "a.png", "prompt": "two?", "tags": ["star"]},
    ]
    model = Listener()
    assert answer_file(model, rows, folder / "out.jsonl", SETTINGS, to_json, folder) == 4
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row.get("text") for row in found] == ["one?!", None, None, None, None, "two?!"]
    reasons = [
        "too long; shorten it",
        "there is no image none.png",
        "addresses are not fetched",
        "leaves the data folder",
    ]
    assert all(reason in row["error"] for reason, row in zip(reasons, found[1:5], strict=True))
    assert model.asked[0][2] == {"boxes": [[[0, 0, 0.5, 1]]]} and model.asked[1][2] == {"tags": [("star",)]}


def test_questions_without_an_image_or_a_prompt_are_refused_by_their_line(tmp_path):
    file = tmp_path / "questions.jsonl"
    for text, sentence in (
        ("", "has no rows"),
        ('{"prompt": "?"}\n', "line 1 has no image"),
        ('{"image": "a.png", "prompt": "?"}\n{"image": "b.png"}\n', "line 2 has no prompt"),
        ("{\n{}\n", "line 1, is not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_questions(file)
    file.write_text('{"image": "a.png"}\n')
    assert read_questions(file, "?") == [{"image": "a.png", "prompt": "?"}]
    with pytest.raises(UserError, match="there is no file"):
        read_questions(tmp_path / "none.jsonl")
