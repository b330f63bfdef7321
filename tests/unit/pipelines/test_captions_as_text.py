# SPDX-License-Identifier: Apache-2.0
"""Questions about captions: rows of files, what a frozen language model is asked, and captions made for questions."""

import dataclasses
import json

import numpy as np
import pytest

from lionjax.core.errors import UserError
from lionjax.pipelines import captions_as_text, pica, promptcap
from lionjax.pipelines.captions_as_text import CaptionedQuestion
from lionjax.pipelines.completion import Completion
from lionjax.pipelines.pica import ExampleFeatures, PicaConfig
from lionjax.pipelines.promptcap import ScoredCaption

ROW = {"question": "What is it?", "caption": "a kite", "answers": ["kite", "a kite"]}


class Model:
    """Continues each prompt with `reply(prompt)`, counting nothing."""

    def __init__(self, reply):
        self.reply, self.requests = reply, []

    def complete(self, requests):
        self.requests += requests
        return [self.reply(request) for request in requests]


def nearest_example(request):
    """What a model that copies its first example answers."""
    return Completion(" " + request.prompt.split("\nA: ")[1].split("\n")[0], ("x",), (-1.0,))


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_file_are_read_with_one_or_several_captions(tmp_path):
    several = {
        "question": "Why?",
        "captions": ["one", "two"],
        "tags": ["kite"],
        "choices": ["x", "y"],
        "image": "1.jpg",
    }
    rows = captions_as_text.read_questions(write_rows(tmp_path / "rows.jsonl", ROW, several))
    assert rows[0] == CaptionedQuestion("What is it?", ("a kite",), answers=("kite", "a kite"))
    assert rows[1].captions == ("one", "two") and rows[1].choices == ("x", "y") and rows[1].image == "1.jpg"


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "Why?"}, "empty caption or none"),
        (ROW | {"caption": " "}, "empty caption"),
        (ROW | {"question": ""}, "no question"),
        (ROW | {"anwsers": []}, "field 'anwsers'"),
        (ROW | {"answers": "kite"}, "answers that are no list"),
        (ROW | {"tags": [1]}, "tags that are no list of texts"),
        ([1], "no JSON object"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_by_file_and_line(tmp_path, row, words):
    with pytest.raises(UserError, match=f"line 2 .*{words}"):
        captions_as_text.read_questions(write_rows(tmp_path / "rows.jsonl", ROW, row))


def test_files_that_are_missing_or_empty_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        captions_as_text.read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no questions"):
        captions_as_text.read_questions(write_rows(tmp_path / "rows.jsonl"))


def test_examples_like_the_question_beat_random_ones_where_the_model_copies_its_first_example():
    rng = np.random.default_rng(0)
    key_ND = rng.normal(size=(40, 8)) * 3
    examples = [CaptionedQuestion(f"Q{k}?", ("a caption",), answers=(f"answer {k}",)) for k in range(40)]
    asked = rng.permutation(40)[:20]
    rows = [dataclasses.replace(examples[k], question="What?") for k in asked]
    key_ND /= np.linalg.norm(key_ND, axis=1, keepdims=True)
    config = PicaConfig(num_shots=4, similarity="question")
    orders = pica.similar_examples(ExampleFeatures(key_ND[asked]), ExampleFeatures(key_ND), config)
    accuracy = {}
    for name, chosen in (("similar", orders), ("random", pica.random_examples(20, 40, 4, seed=1))):
        answers = pica.answer_questions(Model(nearest_example), rows, examples, chosen, config)
        accuracy[name] = np.mean([answer == row.answers[0] for answer, row in zip(answers, rows)])
    assert accuracy["similar"] == 1.0 and accuracy["random"] < 0.3


def test_an_ensemble_takes_the_likeliest_answer_and_the_first_of_equal_ones():
    def member(text, *log_probs, problem=""):
        return Completion(text, tuple("x" * len(log_probs)), log_probs, problem)

    assert pica.choose_answer([member(" A cat", -2.0), member(" dog", -1.0), member(" cow", -1.0)]) == "dog"
    assert pica.choose_answer([member(" cat", -2000.0), member(" dog", -999.0)]) == ""
    assert pica.choose_answer([member(" cat", -0.1, problem="refused: too long"), member(" dog", -1.0)]) == "dog"
    assert pica.choose_answer([member(" cat", -1.0), member(" dog", float("nan"))]) == "cat"
    assert pica.choose_answer([]) == "" and pica.choose_answer([member("", problem="length")]) == ""
    counted = Completion(" dog", (" dog", "\n", "Q"), (-1.0, -50.0, -50.0))
    assert pica.choose_answer([member(" cat", -2.0), counted]) == "dog"


def test_an_ensemble_without_log_probabilities_takes_the_most_frequent_answer():
    assert pica.choose_answer([Completion(" cat"), Completion(" the dog\nQ:"), Completion("dog.")]) == "dog"


def test_a_question_that_the_budget_leaves_out_has_no_answer():
    model = Model(lambda request: None if request.prompt.count("Why?") else Completion(" x", ("x",), (-1.0,)))
    rows = [CaptionedQuestion("What?", ("c",)), CaptionedQuestion("Why?", ("c",))]
    assert pica.answer_questions(model, rows, [], [[], []], PicaConfig(0)) == ["x", None]
    assert promptcap.answer_questions(model, rows, [], [[], []]) == ["x", None]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PicaConfig(num_shots=-1), "num_shots is -1"),
        (lambda: PicaConfig(similarity="tags"), "similarity is 'tags'"),
        (lambda: ExampleFeatures(np.zeros((2, 3))).joint("imagequestion"), "no image features"),
        (lambda: captions_as_text.most_similar(np.zeros(3), np.zeros((2, 4)), 1), "do not match"),
        (lambda: pica.to_shot(CaptionedQuestion("Why?", ("c",))), "has no answers"),
        (lambda: promptcap.majority_answer([]), "has no answers"),
        (lambda: promptcap.choose("x", []), "no choices"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_an_accuracy_has_the_official_score_and_counts_missing_answers_as_wrong():
    references = [["kite"] * 3 + ["boat"] * 7, ["2"] * 10, []]
    summary = captions_as_text.accuracy_summary(["kite", "", "x"], references)
    assert summary["num_questions"] == 2 and summary["vqa_accuracy"] == pytest.approx(0.45)
    assert summary["quick_accuracy"] == pytest.approx(0.45) and summary["interval"][0] <= 0.45
    assert captions_as_text.accuracy_summary(["x"], [[]]) == {"num_questions": 0}


def test_captions_are_sampled_one_a_request_and_the_best_are_kept_shortest_first():
    texts = [" A red kite.", " A kite.", " A red kite.", "\n", " cut"]

    def reply(request):
        if request.temperature:
            return Completion(texts[request.sample], problem="length" if request.sample == 4 else "")
        return Completion(" a kite" if "kite" in request.prompt.split("Context: ")[-1] else " boat")

    model = Model(reply)
    row = CaptionedQuestion("What flies?", ("a sky",), ("sky",), ("kite",) * 10)
    (created,) = promptcap.create_captions(model, [row], num_samples=5)
    assert created == ["A red kite.", "A kite."]
    assert [request.sample for request in model.requests] == list(range(5))
    assert {(r.temperature, r.top_p, r.max_tokens) for r in model.requests} == {(1.0, 0.96, 128)}
    (scored,) = promptcap.score_candidates(model, [row], [["A boat.", *created]], [row], [[0]])
    assert [one.answer for one in scored] == ["boat", "kite", "kite"]
    assert promptcap.keep_best(scored) == ["A kite.", "A red kite."]
    assert promptcap.keep_best([ScoredCaption("c", "x", -1.0, 0.0)]) == [] == promptcap.keep_best([])


@pytest.mark.parametrize(
    "pair, distance", [(("", ""), 0), (("kitten", "sitting"), 3), (("ab", ""), 2), (("", "abc"), 3)]
)
def test_the_edit_distance_is_levenshteins(pair, distance):
    assert promptcap.edit_distance(*pair) == distance == promptcap.edit_distance(*pair[::-1])


@pytest.mark.parametrize("answer, place", [("a rope", 2), ("The Wood.", 0), ("irn", 1), ("", 0)])
def test_a_free_answer_is_read_as_the_choice_with_the_fewest_edits(answer, place):
    assert promptcap.choose(answer, ["wood", "iron", "a rope"]) == place
