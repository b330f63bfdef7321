# SPDX-License-Identifier: Apache-2.0
"""PICa and PromptCap against their released scripts: prompts byte for byte, shots, ensembles, answers, scores.

Every folder under $LIONJAX_GOLDEN (default tests/golden) is checked, whatever its number of questions and examples.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from golden import folders

from lionjax.pipelines import captions_as_text, pica, promptcap
from lionjax.pipelines.captions_as_text import CaptionedQuestion, clean_answer, quick_accuracy
from lionjax.pipelines.completion import Completion
from lionjax.pipelines.pica import ExampleFeatures, PicaConfig


def read(folder):
    cases, data = (json.loads((folder / name).read_text()) for name in ("cases.json", "data.json"))
    return cases, data, dict(np.load(folder / "arrays.npz"))


def to_row(row) -> CaptionedQuestion:
    captions = [row["caption"]] if "caption" in row else row["prompt_guided_captions"]
    return CaptionedQuestion(row["question"], tuple(captions), tuple(row["tags"]), tuple(row["answers"]))


UNKNOWN = Completion("another prompt")
SHIPPED = Path(__file__).resolve().parents[1] / "golden"


class Scripted:
    """A language model that continues the prompts it knows."""

    def __init__(self, completions):
        self.completions, self.prompts = completions, []

    def complete(self, requests):
        self.prompts += [request.prompt for request in requests]
        return [self.completions.get(request.prompt, UNKNOWN) for request in requests]


def to_completion(member) -> Completion:
    return Completion(member["text"], tuple(member["tokens"]), tuple(member["token_log_probs"]))


@pytest.fixture(scope="module", params=folders("pica"))
def pica_golden(request):
    return read(request.param)


@pytest.fixture(scope="module", params=folders("promptcap"))
def promptcap_golden(request):
    return read(request.param)


def test_pica_shows_the_released_codes_shots_in_its_prompts_and_chooses_its_answers(pica_golden):
    cases, data, arrays = pica_golden
    examples = [to_row(row) for row in data["train"]]
    keys = ExampleFeatures(arrays["train_question"], arrays["train_image"])
    place_of = {row["question_id"]: place for place, row in enumerate(data["val"])}
    assert cases["cases"]
    for case in cases["cases"]:
        s, place = case["settings"], place_of[case["question_id"]]
        config = PicaConfig(s["n_shot"], s["n_ensemble"], s["caption_type"] == "vinvl_tag", s["similarity_metric"])
        one = slice(place, place + 1)
        query = ExampleFeatures(arrays["val_question"][one], arrays["val_image"][one])
        orders = pica.similar_examples(query, keys, config)
        assert orders == [case["chosen"]]
        model = Scripted({member["prompt"]: to_completion(member) for member in case["members"]})
        row = data["val"][place]
        assert pica.answer_questions(model, [to_row(row)], examples, orders, config) == [case["answer"]]
        assert model.prompts == [member["prompt"] for member in case["members"]]
        assert quick_accuracy(case["answer"], row["answers"]) == pytest.approx(case["quick_accuracy"], abs=1e-6)


def test_pica_cleans_answers_as_the_released_code(pica_golden):
    for text, cleaned in pica_golden[0]["cleaning"]:
        assert clean_answer(text) == cleaned


def test_promptcap_answers_as_the_released_code(promptcap_golden):
    cases, data, arrays = promptcap_golden
    examples = [to_row(row) for row in data["train"]]
    assert cases["answers"]
    for case in cases["answers"]:
        part = case["partition"]
        ids = [row["question_id"] for row in data[part]]
        place = ids.index(case["question_id"])
        query_D = arrays[f"{part}_features"][place]
        order = promptcap.select_shots(query_D, arrays["train_features"], case["n_shot"], part == "train")
        assert order == case["chosen"]
        model, row = Scripted({case["prompt"]: Completion(case["completion"])}), to_row(data[part][place])
        assert promptcap.answer_questions(model, [row], examples, [order]) == [case["answer"]]
        assert model.prompts == [case["prompt"]]
        assert promptcap.majority_answer(row.answers) == case["gold_answer"]
        assert promptcap.soft_score(case["answer"], row.answers) == pytest.approx(case["soft_score"], abs=1e-6)
        assert promptcap.hard_score(case["answer"], row.answers) == pytest.approx(case["hard_score"], abs=1e-6)


def test_promptcaps_filter_scores_candidates_as_the_released_code(promptcap_golden):
    cases, data, arrays = promptcap_golden
    examples = [to_row(row) for row in data["train"]]
    places = {row["question_id"]: place for place, row in enumerate(data["val"])}
    assert cases["filtering"]
    for case in cases["filtering"]:
        place = places[case["question_id"]]
        order = promptcap.select_shots(
            arrays["val_features"][place], arrays["train_features"], len(case["chosen"]), False
        )
        assert order == case["chosen"]
        model = Scripted(dict(zip(case["prompts"], map(Completion, case["completions"]))))
        row = to_row(data["val"][place])
        (scored,) = promptcap.score_candidates(model, [row], [case["candidates"]], examples, [order])
        assert model.prompts == case["prompts"]
        assert [one.soft_score for one in scored] == pytest.approx(case["soft_scores"], abs=1e-6)
        assert [one.hard_score for one in scored] == pytest.approx(case["hard_scores"], abs=1e-6)


def test_promptcaps_scores_and_cleaning_are_the_released_codes(promptcap_golden):
    cases = promptcap_golden[0]
    for case in cases["scores"]:
        scores = [score(case["answer"], case["gold"]) for score in (promptcap.soft_score, promptcap.hard_score)]
        assert scores == pytest.approx([case["soft_score"], case["hard_score"]], abs=1e-6), case
    for text, cleaned in cases["cleaning"]:
        assert promptcap.clean_direct_answer(text) == cleaned
    for text, cleaned in cases["cleaning_filtering"]:
        assert clean_answer(text) == cleaned


def test_promptcaps_captioner_qa_model_and_data_creation_get_the_released_codes_texts(promptcap_golden):
    cases, data, _ = promptcap_golden
    rows = {row["question_id"]: row for row in data["val"]}
    for case in cases["generation"]:
        row = rows[case["question_id"]]
        asked = CaptionedQuestion(row["question"], tuple(row["coco_captions"]), (), tuple(row["answers"]))
        few_shot = case["prompt"].partition("\n\nOriginal contexts: ")[0]
        assert promptcap.creation_prompt(asked, few_shot) == case["prompt"]
    for case in cases["unified_qa"]:
        assert promptcap.captioner_prompt(case["question"], case["ocr"]) == case["captioner_prompt"]
        assert promptcap.unified_qa_input(case["question"], case["caption"], case["choices"] or ()) == case["qa_input"]


def fails(test, golden) -> bool:
    try:
        test(golden)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    "mutate",
    [
        lambda p: p.setattr(
            pica, "build_prompt", lambda shots, *rest: captions_as_text.build_prompt(shots[::-1], *rest)
        ),
        lambda p: p.setattr(captions_as_text, "SCORE_PER_MATCH", 1 / 3),
        lambda p: p.setattr(pica, "log_prob_of_answer", lambda member: sum(member.token_log_probs)),
        lambda p: p.setattr(captions_as_text, "REMOVED_WORDS", {"a", "an", "the", ""}),
    ],
    ids=["most similar shot last", "thirds in the quick accuracy", "tokens behind the line count", "'to' stays"],
)
def test_a_pica_that_departs_from_the_released_code_fails(monkeypatch, mutate):
    golden = read(SHIPPED / "pica")
    mutate(monkeypatch)
    tests = (
        test_pica_shows_the_released_codes_shots_in_its_prompts_and_chooses_its_answers,
        test_pica_cleans_answers_as_the_released_code,
    )
    assert any(fails(test, golden) for test in tests)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda p: p.setattr(
            promptcap, "build_prompt", lambda shots, *rest: captions_as_text.build_prompt(shots[::-1], *rest)
        ),
        lambda p: p.setattr(captions_as_text, "SCORE_PER_MATCH", 1 / 3),
        lambda p: p.setattr(promptcap, "BEST_REFERENCES", 10),
        lambda p: p.setattr(promptcap, "majority_answer", lambda answers: max(answers, key=answers.count)),
        lambda p: p.setattr(promptcap, "select_shots", lambda q, k, n, s: captions_as_text.most_similar(q, k, n)),
    ],
    ids=["most similar shot first", "thirds in the hard score", "all references", "first majority", "itself as a shot"],
)
def test_a_promptcap_that_departs_from_the_released_code_fails(monkeypatch, mutate):
    mutate(monkeypatch)
    assert fails(test_promptcap_answers_as_the_released_code, read(SHIPPED / "promptcap"))
