# SPDX-License-Identifier: Apache-2.0
"""Metrics of yes-or-no questions: the readings of POPE in four harnesses, MME's score, and AUROC.

A reading gives True (yes), False (no) or None (neither).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lionjax.evaluation.metrics.vqa import parse_pope_answer, parse_yes_no

ANSWER_SENTENCE = re.compile(r"(?:(?:(?:So t|T|t)he answer is)|(?:Answer:)) (.+)")
MME_PREFIX = 4  # characters


def read_whole_answer(text: str) -> bool | None:
    """The whole answer is "yes" or "no" in any case; "No." is neither. Source: lmms-eval's task pope."""
    return {"yes": True, "no": False}.get(text.lower().strip())


def read_one_word(text: str) -> bool | None:
    """Exactly one of the words yes and no occurs in any case. Source: VLMEvalKit."""
    words = set(re.findall(r"[a-z]+", text.lower())) & {"yes", "no"}
    return None if len(words) != 1 else words == {"yes"}


def read_answer_sentence(text: str) -> bool | None:
    """The end of the one sentence "The answer is ...", or else whether "yes" occurs. Source: Shikra, NExT-Chat."""
    found = ANSWER_SENTENCE.findall(text.strip())
    if len(found) != 1:
        return "yes" in text.lower()
    return {"yes": True, "no": False}.get(found[0].strip().rstrip(".").strip().lower())


def read_mme_answer(text: str) -> bool | None:
    """Yes if "yes" is in the first four characters, else no if "no" is. Source: MME's calculation.py."""
    start = text.lower()[:MME_PREFIX]
    return True if "yes" in start else False if "no" in start else None


YES_NO_READERS: Mapping[str, Callable[[str], bool | None]] = {
    "pope": parse_pope_answer,
    "whole_answer": read_whole_answer,
    "one_word": read_one_word,
    "answer_sentence": read_answer_sentence,
    "first_word": parse_yes_no,
    "mme": read_mme_answer,
}


def yes_no_scores(predicted: Sequence[bool | None], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and ratio of yes answers, 0..1, under the names of POPE's script.

    An answer that is neither is wrong for the accuracy, and counts neither as a false positive nor as a false negative
    of the other figures, as in lmms-eval. Ratios with denominator 0 are 0.
    """
    pairs = list(zip(predicted, labels, strict=True))
    hits = sum(answer is True and label for answer, label in pairs)
    false_yes = sum(answer is True and not label for answer, label in pairs)
    false_no = sum(answer is False and label for answer, label in pairs)
    precision = hits / (hits + false_yes) if hits else 0.0
    recall = hits / (hits + false_no) if hits else 0.0
    return {
        "accuracy": sum(answer is label for answer, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1_score": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(answer is True for answer, _ in pairs) / len(pairs),
    }


def mme_task_score(correct_by_image: Mapping[str, Sequence[bool]]) -> float:
    """100 times the share of correct answers, plus 100 times the share of images with all answers correct: 0..200."""
    answers = [correct for image in correct_by_image.values() for correct in image]
    return 100 * float(np.mean(answers)) + 100 * float(np.mean(list(map(all, correct_by_image.values()))))


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve, 0..1: the share of (positive, negative) pairs in order, a tie counting half.

    NaN without a positive or without a negative.
    """
    values, positive = np.asarray(scores, np.float64), np.asarray(labels, bool)
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values[order], return_inverse=True, return_counts=True)
    ranks = np.empty(len(values))
    ranks[order] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))
