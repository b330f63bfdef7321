# SPDX-License-Identifier: Apache-2.0
"""The table of frozen language models: what its rows are made from, and when a margin is kept."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import frozen_lms, frozen_lms_filter, frozen_lms_real, frozen_lms_rows
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.pipelines.completion import Completion


def row(name: str, scores: list[float], part: str = "scenes", task: str = "vqa") -> dict:
    mean = sum(scores) / len(scores)
    return {"part": part, "row": name, "task": task, "count": len(scores), "score": mean, "scores": scores}


def test_a_margin_of_zero_is_kept_only_where_the_interval_of_the_difference_is_above_zero():
    better, worse = frozen_lms.PICA, frozen_lms.RANDOM
    clear = [row(better, [1.0] * 60 + [0.0] * 40), row(worse, [0.0] * 60 + [1.0] * 5 + [0.0] * 35)]
    narrow = [row(better, [1.0, 0.0] * 50), row(worse, [0.0, 1.0] * 49 + [0.0, 0.0])]
    assert [kept for _, kept in frozen_lms.compared(clear)] == [True]
    assert [kept for _, kept in frozen_lms.compared(narrow)] == [False]
    assert frozen_lms.compared([row(better, [1.0] * 9, "easy-VQA"), row(worse, [0.0] * 9, "easy-VQA")]) == []
    part, task, similar, drawn = frozen_lms.SHOWN[0]
    real = [row(similar, [1.0] * 9, part, task), row(drawn, [0.0] * 9, part, task)]
    assert frozen_lms.row_difference(real, *frozen_lms.SHOWN[0])[1:] == (1.0, 1.0)


def test_a_row_is_made_once_and_kept_with_the_score_of_each_example(tmp_path, capsys):
    run, made = frozen_lms_rows.Run(workdir=tmp_path), []

    def answers():
        made.append(1)
        return ["red", "2"]

    examples = [SimpleNamespace(answers=("red",)), SimpleNamespace(answers=("3",))]
    first, second = (frozen_lms_rows.measured(run, "scenes", "a model", "vqa", examples, answers) for _ in range(2))
    assert first == second and made == [1]
    assert (first["scores"], first["texts"], first["score"]) == ([1.0, 0.0], ["red", "2"], 0.5)


def test_the_filter_keeps_the_best_caption_of_each_question_and_the_unfiltered_one_is_the_first():
    wrong = {"caption": "The star is blue.", "answer": "blue", "soft_score": 0.0, "hard_score": 0.0}
    right = {"caption": "The star is red.", "answer": "red", "soft_score": 1.0, "hard_score": 0.3}
    captions = frozen_lms_filter.training_captions([[wrong, right], [wrong], []])
    assert captions[frozen_lms_filter.CREATED] == [wrong["caption"], wrong["caption"], ""]
    assert captions[frozen_lms_filter.FILTERED] == [right["caption"], "", ""]


def test_chosen_examples_are_counted_by_the_kind_of_their_question():
    samples, shown = (
        [SimpleNamespace(example=SimpleNamespace(kind=kind)) for kind in kinds]
        for kinds in (("color", "count"), ("color", "color", "count", "shape"))
    )
    assert frozen_lms_filter.examples_of_one_kind(samples, shown, [[0, 1], [2, 3]]) == 0.75


@pytest.fixture
def photos(tmp_path):
    """A folder of ten photographs: five of dogs, five of cats and a car; each caption names its photograph."""
    captions = [{"image_id": k, "caption": f"photo {k} ."} for k in range(10) for _ in range(2)]
    instances = [{"image_id": k, "category_id": 1 + k % 2} for k in range(10)]
    instances += [{"image_id": k, "category_id": number} for k in range(1, 10, 2) for number in (2, 3)]
    categories = [{"id": number, "name": name} for number, name in ((1, "dog"), (2, "cat"), (3, "car"))]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": instances, "categories": categories}))
    return tmp_path


def test_photographs_have_the_given_categories_the_most_frequent_first(photos):
    read = frozen_lms_real.read_photos(photos)
    assert [photo.context for photo in read[:2]] == ["dog", "cat, car"] and read[1].answers == ("photo 1 .",) * 2
    (photos / "instances.json").unlink()
    with pytest.raises(UserError, match="there is no .*instances.json"):
        frozen_lms_real.read_photos(photos)


def test_captions_of_a_photograph_are_written_from_examples_of_the_other_folds_the_most_similar_last(
    photos, tmp_path, monkeypatch, capsys
):
    prompts = []

    def complete(requests):
        prompts.append([request.prompt for request in requests])
        return [Completion(" a photo\nQ:") for _ in requests]

    monkeypatch.setattr(frozen_lms_real, "language_model", lambda folder: SimpleNamespace(complete=complete))
    run = frozen_lms_rows.Run(workdir=tmp_path / "run", smollm2=tmp_path, coco=photos)
    rows = frozen_lms_real.coco_rows(run)
    assert [len(row["texts"]) for row in rows] == [10] * 5 and rows[-1]["texts"] == ["a photo"] * 10
    alone, drawn, similar = prompts
    assert all(f"A: photo {k} ." not in prompt for group in prompts for k, prompt in enumerate(group))
    assert all(prompt.count("Context: no listed object") == 5 for prompt in alone)
    for number, prompt in enumerate(similar):
        contexts = [line for line in prompt.splitlines() if line.startswith("Context: ")]
        assert contexts[-1] == contexts[-2] == f"Context: {('dog', 'cat, car')[number % 2]}"
    assert drawn != similar


class Clip:
    """Embeds texts and images by their first numbers, and ranks texts in their order."""

    def rank(self, images, texts):
        return [SimpleNamespace(texts=texts) for _ in images]

    def embed_texts(self, texts):
        return np.array([[len(text), text.count("e"), 1.0] for text in texts])

    def embed_images(self, images):
        return np.array([np.asarray(image, float)[:3, 0, 0] / 255 for image in images])


class Captioner:
    """A model that sees: one caption for all images."""

    def answer(self, images, prompts):
        return [SimpleNamespace(text="A red star.") for _ in prompts]


@pytest.fixture
def scenes(monkeypatch):
    """Few questions about small scenes, a language model that repeats the last answer, and how often it was asked."""
    data = frozen_lms_rows.load_config(frozen_lms_rows.Run(), "tiny_clip").data
    small = dataclasses.replace(data, sources=(dataclasses.replace(data.sources[0], image_size=16),))
    models = dict.fromkeys(frozen_lms.SYSTEMS, Captioner())
    models["tiny_clip"] = SimpleNamespace(experiment=SimpleNamespace(data=small))
    asked = []

    def complete(requests):
        asked.append([request.prompt for request in requests])
        shown = [re.findall(r"^(?:A|Answer): (.*)$", prompt, re.MULTILINE) for prompt in asked[-1]]
        return [Completion(f" {answers[-1]}" if answers else " nothing") for answers in shown]

    for module in (frozen_lms, frozen_lms_filter):
        monkeypatch.setattr(module, "language_model", lambda folder: SimpleNamespace(complete=complete))
    monkeypatch.setattr(frozen_lms, "NUM_EXAMPLES", 20)
    monkeypatch.setattr(frozen_lms_filter, "NUM_QUESTIONS", 6)
    return models, asked


def test_questions_about_scenes_are_answered_from_each_context_and_by_the_two_created_captioners(
    scenes, tmp_path, monkeypatch, capsys
):
    (models, asked), trained = scenes, []

    def train(run, name, experiment):
        trained.append((name, experiment))
        return Captioner()

    monkeypatch.setattr(frozen_lms_filter, "trained", train)
    monkeypatch.setattr(frozen_lms_rows, "handed_on", lambda folder, parts: [])
    run = frozen_lms_rows.Run(workdir=tmp_path, smollm2=tmp_path, question_limit=4)
    rows, notes = frozen_lms.answer_rows(run, models, Clip())
    assert {row["row"] for row in rows} >= {frozen_lms.PICA, frozen_lms.RANDOM, frozen_lms.FILTERED, "PromptCap"}
    assert len(notes) == 3 and all(row["count"] == 4 for row in rows)
    created = [json.loads(line) for line in (tmp_path / "created/created/created.jsonl").read_text().splitlines()]
    assert len(created) == 6 and created[0]["question"].startswith("please describe this image according")
    assert {name for name, _ in trained} == {"created/created_captioner", "created/created_filtered_captioner"}
    batch = next(pipeline.batches(trained[0][1].data, trained[0][1].stages[0], 0, 8))
    assert batch.target_BM.shape[0] == 8
    assert any("Original contexts: " in prompt for prompt in asked[0])


def test_easy_vqa_is_asked_with_the_given_color_and_shape_of_each_image(scenes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("easy_vqa")
    models, asked = scenes
    monkeypatch.setattr(frozen_lms_real, "language_model", frozen_lms.language_model)
    monkeypatch.setattr(frozen_lms_real, "NUM_EXAMPLES", 8)
    run = frozen_lms_rows.Run(workdir=tmp_path, smollm2=tmp_path, question_limit=3)
    rows = frozen_lms_real.easy_vqa_rows(run, models, Clip(), frozen_lms.QUESTION)
    assert len(rows) == 8 and all(row["part"] == "easy-VQA" for row in rows)
    given = re.findall(r"^Context: A (\w+) ([a-z]+)\.$", asked[-1][0], re.MULTILINE)
    assert len(given) == 5 and {shape for _, shape in given} <= {*frozen_lms_real.SHAPES, "shape"}
    assert any("Context: A black circle." in prompt for group in asked for prompt in group)  # the first that CLIP ranks


def test_the_given_color_and_shape_are_those_of_the_answers_also_of_negated_questions():
    questions = [
        (0, "what color is the circle?", "red", "color"),
        (1, "is there not a blue shape?", "no", "yesno"),
        (1, "is there a triangle?", "no", "yesno"),
        (2, "is no green shape present?", "yes", "yesno"),
        (2, "does the image contain a rectangle?", "yes", "yesno"),
    ]
    rows = [Annotation(photo, (answer,), text, kind=kind) for photo, text, answer, kind in questions]
    dataset = SimpleNamespace(annotations={"vqa": rows})
    samples = [SimpleNamespace(dataset=dataset, record_index=number) for number in range(3)]
    assert frozen_lms_real.given_words(samples) == ["A red circle.", "A blue shape.", "A rectangle."]
