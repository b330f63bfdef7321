# SPDX-License-Identifier: Apache-2.0
"""Scorers of captions and of short open answers; figures have the names of the benchmarks' own scorers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.evaluation.metrics import captions, vqa
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published.predictions import AnsweredQuestion, prediction_text

Rows = Sequence[AnsweredQuestion]


def score_captions(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D as coco-caption prints them; METEOR needs Java and is left out.

    Of a set with domains (NoCaps) for each domain with the document frequencies of its own references, and `entire`.
    """
    domains = sorted({row.annotation.kind for row in rows if row.annotation.kind})
    if not domains:
        return caption_figures(rows)
    groups = {domain: [row for row in rows if row.annotation.kind == domain] for domain in domains}
    return {"entire": caption_figures(rows)} | {domain: caption_figures(group) for domain, group in groups.items()}


def caption_figures(rows: Rows) -> dict[str, float]:
    """The figures of one set of captions, of 0..1 but CIDEr of 0..10."""
    texts, references = [row.text for row in rows], [row.references for row in rows]
    figures = {f"Bleu_{n}": float(value) for n, value in enumerate(captions.bleu(texts, references), 1)}
    figures["ROUGE_L"] = float(captions.rouge_l(texts, references).mean())
    return figures | {"CIDEr": float(captions.cider_d(texts, references).mean())}


def percent(values: Iterable[float]) -> float:
    """100 times the mean of scores in 0..1."""
    return 100 * float(np.mean(list(values)))


def score_vqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """Official VQA accuracy in percent: overall, by type of answer and of question, and of each question.

    The normalizer "vqa" treats references as the official code does, "evalai" as lmms-eval.
    """
    accuracy = {"vqa": vqa.official_vqa_accuracy, "evalai": vqa.evalai_accuracy}[protocol.normalizer]
    scores = [100 * accuracy(row.text, row.references) for row in rows]
    figures: dict[str, Any] = {"overall": float(np.mean(scores))}
    for key, name in (("answer_type", "perAnswerType"), ("question_type", "perQuestionType")):
        groups: dict[str, list[float]] = {}
        for row, score in zip(rows, scores):
            if kind := row.annotation.facts.get(key):
                groups.setdefault(kind, []).append(score)
        figures[name] = {kind: float(np.mean(values)) for kind, values in groups.items()}
    return figures | {"perQuestion": {row.annotation.question_id: score for row, score in zip(rows, scores)}}


def score_evalai(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """Accuracy of TextVQA and VizWiz in percent; `submission` has VizWiz' answers as its server takes them.

    The normalizer "exact" counts equal references as MiniGPT-4 does: min(1, n / 3) of all ten, without leaving one out.
    """
    if protocol.normalizer == "exact":
        accuracy = percent(min(1.0, row.references.count(row.text) / 3) for row in rows)
    else:
        accuracy = percent(vqa.evalai_accuracy(row.text, row.references) for row in rows)
    figures: dict[str, Any] = {"accuracy": accuracy}
    if any("answerable" in row.annotation.facts for row in rows):
        answers = ((row.annotation.question_id, vqa.normalize_evalai_answer(row.text)) for row in rows)
        figures["submission"] = [{"image": image, "answer": answer} for image, answer in answers]
    return figures


def score_aokvqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """A-OKVQA in percent: multiple choice, and direct answers without the difficult questions, and with them (LAVIS).

    An answer file has `multiple_choice` and `direct_answer`; a text is the direct answer.
    """
    figures: dict[str, Any] = {}
    picked = [row for row in rows if isinstance(row.prediction, dict) and "multiple_choice" in row.prediction]
    if picked:
        choices = [row.prediction["multiple_choice"] for row in picked]
        targets = [row.annotation.choices[_target(row)] for row in picked]
        figures["multiple_choice"] = percent(choice == target for choice, target in zip(choices, targets))
        named = [choice in row.annotation.choices for choice, row in zip(choices, picked)]
        figures["not_a_choice"] = named.count(False)
    direct = [(row, answer) for row in rows if (answer := direct_answer(row.prediction)) is not None]
    if direct:
        scores = [min(1.0, row.references.count(answer) / 3) for row, answer in direct]
        easy = [score for (row, _), score in zip(direct, scores) if not row.annotation.facts["difficult"]]
        figures["direct_answer"] = percent(easy) if easy else None
        figures["direct_answer_all_as_lavis"] = percent(scores)
    return figures


def direct_answer(prediction: Any) -> str | None:
    """The direct answer of a row of A-OKVQA; None of one that only chooses."""
    if isinstance(prediction, dict) and {"multiple_choice", "direct_answer"} & prediction.keys():
        return prediction.get("direct_answer")
    return prediction_text(prediction)


def _target(row: AnsweredQuestion) -> int:
    """The index of the right choice. Raises UserError for a question without a public answer."""
    target = row.annotation.facts.get("target")
    if not isinstance(target, int) or not 0 <= target < len(row.annotation.choices):
        raise UserError(f"question {row.annotation.question_id} has no public answer; score a split that has them")
    return target


def score_gqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """GQA in percent: exact equality (official), VQA's normalizer (LAVIS), without case and marks (lmms)."""

    texts = [row.text for row in rows]
    if protocol.reader == "lower_case_without_dot":  # as LLaVA writes its predictions
        texts = [text.rstrip(".").lower() for text in texts]

    def same(normalize) -> float:
        return percent(normalize(text) == normalize(row.references[0]) for text, row in zip(texts, rows))

    return {
        "official_exact": same(str),
        "lavis_normalised": same(vqa.normalize_answer),
        "lmms_ignore_case_and_punctuation": same(ignore_case_and_marks),
    }


def ignore_case_and_marks(text: str) -> str:
    """Lower case without ASCII punctuation."""
    return "".join(letter for letter in text.lower() if letter not in vqa.string.punctuation)


def score_ocrvqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """OCR-VQA's accuracy in percent: equality in lower case without blanks at both ends."""
    return {"accuracy": percent(row.text.lower().strip() == row.references[0].lower().strip() for row in rows)}


def score_docvqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """DocVQA's ANLS, 0..1."""
    return {"anls": float(np.mean([vqa.anls(row.text, row.references) for row in rows]))}
