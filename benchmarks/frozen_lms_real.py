# SPDX-License-Identifier: Apache-2.0
"""Rows of frozen language models on real data: questions of easy-VQA, captions of COCO photographs in five folds.

No model here was trained on either. easy-VQA is asked with the captions of the models of scenes, with the words that
CLIP finds among easy-VQA's colors and shapes, and with the given color and shape; its solved examples are training
images with the given ones. COCO's captions are written from the given categories of objects; the examples of an image
are those of the other four folds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.frozen_lms_rows import Run, captioned, clip_features, language_model, measured
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.evaluation import tasks
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.model import Model
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.captions_as_text import Shot, build_prompt, first_line, greedy_requests
from lionjax.pipelines.pica import PicaConfig

EASY_VQA, COCO = "easy-VQA", "COCO"
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NUM_SHOTS, NUM_EXAMPLES, NUM_FOLDS = 4, 300, 5
SETTINGS = PicaConfig(NUM_SHOTS, use_tags=False)
NO_CONTEXT = "A picture of an object."
GIVEN = "PICa, given color and shape"
CAPTION_REQUEST, CAPTION_TOKENS = "Describe the photograph in one sentence.", 24
NO_CATEGORY = "no listed object"


# ---------------------------------------------------------------- easy-VQA


def easy_vqa_rows(run: Run, models: dict[str, Model], clip: DualEncoder, caption_request: str) -> list[dict]:
    """The rows of easy-VQA; none where the package is not installed."""
    if importlib.util.find_spec("easy_vqa") is None:
        return []
    data = dataclasses.replace(models["tiny_clip"].experiment.data, sources=(EasyVqa(),))
    samples = list(pipeline.examples(data, "vqa", "heldout", run.question_limit))
    shown = list(pipeline.examples(data, "vqa", "train", NUM_EXAMPLES))
    given, of_shown = given_words(samples), given_words(shown)
    examples = [s.example for s in samples]
    constant = tasks.constant_answers("vqa", [s.example for s in shown], examples)
    rows = [measured(run, EASY_VQA, "most frequent answer", "vqa", examples, lambda: constant)]
    if run.smollm2 is None:
        return rows
    images, asked = [s.image for s in samples], [s.example.question for s in samples]
    similar = pica.similar_examples(clip_features(clip, samples), clip_features(clip, shown), SETTINGS)
    drawn = pica.random_examples(len(samples), len(shown), NUM_SHOTS, 0)

    def answers(contexts: Sequence[str], of_examples: Sequence[str], orders) -> list[str]:
        made = captioned(samples, one_each(contexts)), captioned(shown, one_each(of_examples)), orders
        return [answer or "" for answer in pica.answer_questions(language_model(run.smollm2), *made, SETTINGS)]

    def generic() -> list[str]:
        return [answer.text for answer in models["tiny_llava"].answer(images, [caption_request] * len(images))]

    def aware() -> list[str]:
        contexts = promptcap.captions_for_questions(models["tiny_promptcap"], images, asked)
        made = captioned(samples, one_each(contexts)), captioned(shown, one_each(of_shown)), similar
        return [answer or "" for answer in promptcap.answer_questions(language_model(run.smollm2), *made)]

    blank = [NO_CONTEXT] * len(samples), [NO_CONTEXT] * len(shown)
    made = {
        "trained small model of scenes": lambda: [a.text for a in models["tiny_llava"].answer(images, asked)],
        "language model alone": lambda: answers(*blank, similar),
        "PICa, captions of a model of scenes": lambda: answers(generic(), of_shown, similar),
        "PromptCap of scenes": aware,
        "PICa, words found by the CLIP of scenes": lambda: answers(found_words(clip, images), of_shown, similar),
        GIVEN: lambda: answers(given, of_shown, similar),
        f"{GIVEN}, random examples": lambda: answers(given, of_shown, drawn),
    }
    return rows + [measured(run, EASY_VQA, name, "vqa", examples, make) for name, make in made.items()]


def one_each(texts: Sequence[str]) -> list[list[str]]:
    """Each text as a list of one caption."""
    return [[text] for text in texts]


def given_words(samples: Sequence) -> list[str]:
    """The color and shape of the image of each sample, as a caption, from the answers to all questions about it.

    A word that no answer gives is left out: "A red shape."
    """
    known: dict[int, set[str]] = {}
    for row in samples[0].dataset.annotations["vqa"]:
        words, (answer,) = set(re.findall(r"\w+", row.question.lower())), row.answers
        if row.kind != "yesno":
            words.add(answer)
        elif (answer == "yes") == bool(words & {"not", "no"}):
            words = set()
        known.setdefault(row.photo, set()).update(words)
    texts = []
    for words in (known[sample.record_index] for sample in samples):
        names = [next((name for name in group if name in words), "") for group in (COLORS, SHAPES)]
        texts.append(f"A {' '.join(filter(None, (names[0], names[1] or 'shape')))}.")
    return texts


def found_words(clip: DualEncoder, images: Sequence) -> list[str]:
    """The color and shape that CLIP finds in each image, among those of easy-VQA."""
    texts = [f"A {color} {shape}." for color in COLORS for shape in SHAPES]
    return [ranking.texts[0] for ranking in clip.rank(images, texts)]


# ---------------------------------------------------------------- COCO


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph: its captions and the given categories of its objects, the most frequent first."""

    answers: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.answers[0]

    @property
    def context(self) -> str:
        return ", ".join(self.categories) or NO_CATEGORY


def read_photos(folder: Path) -> list[Photo]:
    """The photographs of a folder with captions.json and instances.json, by image id. Raises UserError without them."""
    for name in ("captions.json", "instances.json"):
        if not (folder / name).is_file():
            raise UserError(f"there is no {folder / name}; give a folder with COCO's captions.json and instances.json")
    captions, instances = (json.loads((folder / f"{name}.json").read_text()) for name in ("captions", "instances"))
    names = {category["id"]: category["name"] for category in instances["categories"]}
    texts: dict[int, list[str]] = {}
    for row in captions["annotations"]:
        texts.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    counts: dict[int, Counter] = {key: Counter() for key in texts}
    for row in instances["annotations"]:
        if row["image_id"] in counts:
            counts[row["image_id"]][names[row["category_id"]]] += 1
    return [
        Photo(tuple(texts[key]), tuple(name for name, _ in sorted(counts[key].items(), key=lambda pair: -pair[1])))
        for key in sorted(texts)
    ]


def coco_rows(run: Run) -> list[dict]:
    """The rows of captions of photographs; none without a folder."""
    if run.coco is None:
        return []
    photos = read_photos(run.coco)
    folds = np.random.default_rng(0).permutation(len(photos)) % NUM_FOLDS
    others = [np.flatnonzero(folds != folds[place]) for place in range(len(photos))]
    vocabulary = sorted({name for photo in photos for name in photo.categories})
    feature_ND = np.array([[name in photo.categories for name in vocabulary] for photo in photos], float)
    feature_ND /= np.maximum(np.linalg.norm(feature_ND, axis=1, keepdims=True), 1e-12)
    similar = [rest[np.argsort(-feature_ND[rest] @ feature_ND[k], kind="stable")] for k, rest in enumerate(others)]
    drawn = [np.random.default_rng([1, k]).permutation(rest) for k, rest in enumerate(others)]

    def constants() -> list[str]:
        """The best constant caption of the other folds."""
        by_fold = {
            fold: tasks.constant_answers(
                "caption",
                [p for p, f in zip(photos, folds) if f != fold],
                [p for p, f in zip(photos, folds) if f == fold],
            )
            for fold in range(NUM_FOLDS)
        }
        return [by_fold[fold][0] for fold in folds]

    def written(orders, with_context: bool) -> list[str]:
        """Captions that the language model writes; of the examples the most similar is shown last."""
        contexts = [photo.context if with_context else NO_CATEGORY for photo in photos]
        prompts = [
            build_prompt(
                [Shot(contexts[shot], CAPTION_REQUEST, photos[shot].answer) for shot in reversed(order[:NUM_SHOTS])],
                contexts[k],
                CAPTION_REQUEST,
            )
            for k, order in enumerate(orders)
        ]
        replies = language_model(run.smollm2).complete(greedy_requests(prompts, CAPTION_TOKENS))
        return [first_line(reply.text).strip() or "." for reply in replies]

    made = {
        "best constant": constants,
        "caption of the photograph with the most similar categories": lambda: [
            photos[order[0]].answer for order in similar
        ],
    }
    if run.smollm2 is not None:
        made |= {
            "language model alone": lambda: written(drawn, False),
            "given categories, random examples": lambda: written(drawn, True),
            "given categories, similar examples": lambda: written(similar, True),
        }
    return [measured(run, COCO, name, "caption", photos, make) for name, make in made.items()]
