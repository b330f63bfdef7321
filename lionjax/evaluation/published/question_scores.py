# SPDX-License-Identifier: Apache-2.0
"""Beside a benchmark's figure: the score of each question, a 95 % interval, and the best constant answer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lionjax.data.datasets.question_file import NO_ANSWERS, OPTION_LETTERS
from lionjax.data.scenes.tasks import Example
from lionjax.evaluation.metrics import captions, regions
from lionjax.evaluation.metrics.box_reading import BOX_READERS
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published import scoring
from lionjax.evaluation.published.predictions import AnsweredQuestion
from lionjax.evaluation.tasks import best_constant_box

Rows = Sequence[AnsweredQuestion]
CAPTIONS = ("coco_karpathy", "flickr30k", "textcaps", "nocaps", "reg")
YES_OR_NO = ("pope", "mme", "vsr")
LETTERS = ("scienceqa", "mmbench", "seed")
OPEN_ANSWERS = ("vqav2", "okvqa", "aokvqa", "gqa", "vizwiz", "textvqa", "ocrvqa", "docvqa")
# The figures of one question that say whether it is right, where the main figure does not.
QUESTION_FIGURES = {
    "aokvqa": "direct_answer_all_as_lavis",
    "pope": "accuracy",
    "hateful_memes": "accuracy",
    "res": "giou",
    "mme": "perception cognition",
}
# The largest value of the figure of one question, where it is no percentage.
QUESTION_MAXIMUM = {"pope": 1.0, "visdial": 1.0, "docvqa": 1.0, "flickr30k_entities": 1.0, "mme": 200.0}
MAX_RESAMPLES = 200  # of a figure that is no mean over questions
MAX_CONSTANTS = 5  # constant answers that are tried, the most common first
MAX_CAPTIONS, MAX_COMPARED = 20, 200  # constant captions that are tried, and images they are compared on


def question_scores(name: str, protocol: Protocol, rows: Rows) -> list[float] | None:
    """The score of each answer, 0..1; None for captions and judged answers, which are neither right nor wrong."""
    if name in CAPTIONS or name in scoring.JUDGED:
        return None
    return [_question_figure(name, protocol, row) / QUESTION_MAXIMUM.get(name, 100.0) for row in rows]


def _question_figure(name: str, protocol: Protocol, row: AnsweredQuestion) -> float:
    figures = scoring.BENCHMARKS[name].score([row], protocol)
    if name in QUESTION_FIGURES:
        return float(sum(figures[key] for key in QUESTION_FIGURES[name].split()))
    return float(scoring.main_figure(name, protocol, figures)["value"])


def interval(
    name: str, protocol: Protocol, rows: Rows, scores: Sequence[float] | None, seed: int = 0
) -> list[float] | None:
    """The 95 % bootstrap interval of the main figure over questions; None for judged answers.

    A figure that is the mean of the questions' is resampled as their mean, CIDEr with fixed document frequencies.
    Others (F1, AUROC, cIoU, MME's and MMBench's) are scored anew for each resample, of images or of questions with all
    their rotations where the figure counts those.
    """
    if name in scoring.JUDGED:
        return None
    if name in CAPTIONS:
        cider_B = captions.cider_d([row.text for row in rows], [_references(row, protocol) for row in rows])
        return list(regions.bootstrap_interval(cider_B, seed))
    main = _main_value(name, protocol, rows)
    if main is None:
        return None
    if name == "res":
        figures = [scoring.BENCHMARKS[name].score([row], protocol) for row in rows]
        overlaps_B2 = np.array([(one["intersection"], one["union"]) for one in figures])
        return [100 * edge for edge in regions.bootstrap_interval(overlaps_B2, seed, regions.ciou)]
    scale = QUESTION_MAXIMUM.get(name, 100.0)
    if scores is not None and abs(scale * float(np.mean(scores)) - main) < 1e-6:
        return [scale * edge for edge in regions.bootstrap_interval(np.array(scores), seed)]
    return _resampled_interval(name, protocol, rows, seed)


def _references(row: AnsweredQuestion, protocol: Protocol) -> list[str]:
    return row.references[:1] if protocol.aggregation == "one reference" else row.references


def _resampled_interval(name: str, protocol: Protocol, rows: Rows, seed: int) -> list[float] | None:
    units: dict[Any, list[AnsweredQuestion]] = {}
    for index, row in enumerate(rows):
        units.setdefault(_unit(name, row, index), []).append(row)
    groups, rng, values = list(units.values()), np.random.default_rng(seed), []
    for _ in range(MAX_RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups)).tolist()
        sample = [_renamed(row, copy) for copy, k in enumerate(drawn) for row in groups[k]]
        if (value := _main_value(name, protocol, sample)) is not None:
            values.append(value)
    return np.quantile(values, [0.025, 0.975]).tolist() if values else None


def _unit(name: str, row: AnsweredQuestion, index: int) -> Any:
    """What is drawn together: the rotations of a question of MMBench, the questions about an image of MME."""
    if name == "mmbench":
        return row.annotation.facts["question_id"]
    return (row.annotation.kind, row.image.name) if name == "mme" else index


def _renamed(row: AnsweredQuestion, copy: int) -> AnsweredQuestion:
    """A question drawn once more, under ids and an image's name of its own."""
    facts = dict(row.annotation.facts)
    if "question_id" in facts:
        facts["question_id"] = f"{facts['question_id']}#{copy}"
    number = f"{row.annotation.question_id}#{copy}"
    annotation = dataclasses.replace(row.annotation, question_id=number, facts=facts)
    return row._replace(annotation=annotation, image=dataclasses.replace(row.image, name=f"{row.image.name}#{copy}"))


def _main_value(name: str, protocol: Protocol, rows: Rows) -> float | None:
    value = scoring.main_figure(name, protocol, scoring.BENCHMARKS[name].score(list(rows), protocol))["value"]
    return None if value is None or np.isnan(value) else float(value)


def majority(name: str, protocol: Protocol, rows: Rows) -> dict[str, Any] | None:
    """{"answer", "value"}: the best main figure of one answer to all questions, and that answer; None without one.

    It is chosen on the questions themselves, so it is at least what a constant chosen on other data reaches.
    """
    candidates = constant_answers(name, protocol, rows)
    tried = [(value, text) for text in candidates if (value := _constant_value(name, protocol, rows, text)) is not None]
    if not tried:
        return None
    value, answer = max(tried, key=lambda pair: pair[0])
    return {"answer": answer, "value": value}


def _constant_value(name: str, protocol: Protocol, rows: Rows, answer: Any) -> float | None:
    return _main_value(name, protocol, [row._replace(prediction=answer) for row in rows])


def constant_answers(name: str, protocol: Protocol, rows: Rows) -> list[Any]:
    """Answers of which one may be the best to all questions; none for ranks, masks and judged answers."""
    if name in YES_OR_NO:
        return ["yes", "no"]
    if name in LETTERS:
        return list(OPTION_LETTERS[: max(len(row.annotation.choices) for row in rows)])
    if name == "iconqa":
        return list(range(max(len(row.annotation.choices) for row in rows)))
    if name == "hateful_memes":
        return [{"proba": 0.5}]
    if name == "rec":
        box = _constant_box(rows, protocol)
        return [] if box is None else [box]
    if name in OPEN_ANSWERS:
        counts = Counter(Counter(row.references).most_common(1)[0][0] for row in rows if row.references)
        return [text for text, _ in counts.most_common(MAX_CONSTANTS)]
    return _constant_captions(name, rows) if name in CAPTIONS else []


def _constant_captions(name: str, rows: Rows) -> list[str]:
    """The first reference, among those of the first images, with the highest CIDEr on the first images."""
    compared = [row.references for row in rows[:MAX_COMPARED] if row.annotation.answers != NO_ANSWERS]
    texts = list(dict.fromkeys(references[0] for references in compared))[:MAX_CAPTIONS]
    if not texts:
        return []
    return [max(texts, key=lambda text: captions.cider_d([text] * len(compared), compared).mean())]


def _constant_box(rows: Rows, protocol: Protocol) -> str | None:
    """The true box that overlaps most others, as text, if the protocol reads such a text."""
    fractions = [true_box(row) for row in rows[:MAX_COMPARED]]
    text = best_constant_box([Example("rec", "", "", "", (), "region_level", boxes=(box,)) for box in fractions])
    return text if not protocol.padded and BOX_READERS[protocol.reader](text) is not None else None


def true_box(row: AnsweredQuestion) -> tuple[float, ...]:
    """The true box of a question in fractions of its image."""
    width, height = row.image.width, row.image.height
    return tuple((np.array(row.annotation.boxes[0]) / (width, height, width, height)).tolist())


def answer_overlays(name: str, protocol: Protocol, row: AnsweredQuestion) -> Mapping[str, list]:
    """`boxes` and `truth_boxes` of an answer to a referring expression, in fractions of its image."""
    if name != "rec" or protocol.padded:
        return {}
    box = BOX_READERS[protocol.reader](row.text)
    return {"boxes": [] if box is None else [list(box)], "truth_boxes": [list(true_box(row))]}
