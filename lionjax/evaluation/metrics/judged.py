# SPDX-License-Identifier: Apache-2.0
"""Answers rated by a judge: LLaVA-Bench's pairs of scores (arXiv 2304.08485), and OwlEval's ratings by people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from lionjax.evaluation.metrics.regions import bootstrap_interval

SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\s*(?:\n|$)")
UNREADABLE = [-1, -1]
GOOD_RATINGS = ("A", "B")


def parse_judge_scores(reply: str) -> list[float]:
    """[reference's score, answer's score] of a judge's reply: the two numbers of its first line, or [-1, -1].

    The line is split at single blanks, after commas became blanks, so that "9, 5" and "7 7 " have three parts and are
    unreadable, as in LLaVA's code.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        scores = [float(part) for part in parts] if len(parts) == 2 else list(UNREADABLE)
    except ValueError:
        return list(UNREADABLE)
    return scores if np.isfinite(scores).all() else list(UNREADABLE)


def read_scores(reply: str) -> tuple[float, float] | None:
    """(reference's score, answer's score) of a judge's reply that begins with two numbers of 1 to 10, else None.

    Spaces, commas and a slash may stand between them, and spaces around.
    """
    match = SCORES.match(reply[:200])
    scores = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    return scores if all(1 <= score <= 10 for score in scores) else None


def judge_table(pairs: Sequence[Sequence[float]], categories: Sequence[str]) -> list[dict]:
    """One row a category, "all" first: the ratio of the means in percent, and both means times 10.

    Unreadable replies enter with -1, as in LLaVA's code. Keys: category, ratio, reference, answer, count, and interval,
    the ratio's 95 % bootstrap interval over questions (None where a reference's score is not positive).
    """
    rows = []
    for name in ("all", *sorted(set(categories))):
        chosen = [pair for pair, category in zip(pairs, categories) if name in ("all", category)]
        reference, answer = np.asarray(chosen, float).mean(axis=0).tolist()
        ratio = answer / reference * 100 if reference else float("nan")
        row = {"category": name, "ratio": ratio, "reference": reference * 10, "answer": answer * 10}
        is_positive = all(pair[0] > 0 for pair in chosen)
        interval = list(bootstrap_interval(np.asarray(chosen, float), 0, _ratio)) if is_positive else None
        rows.append(row | {"count": len(chosen), "interval": interval})
    return rows


def _ratio(pairs_N2: np.ndarray) -> float:
    reference, answer = pairs_N2.mean(axis=0)
    return float(answer / reference * 100)


def judge_lines(rows: Sequence[Mapping]) -> list[str]:
    """The rows of `judge_table` as LLaVA prints them: category, ratio, and both means times 10, with one decimal.

    As in LLaVA's code the means are rounded to three decimals before they are divided.
    """
    lines = []
    for row in rows:
        reference, answer = round(row["reference"] / 10, 3), round(row["answer"] / 10, 3)
        ratio = answer / reference * 100 if reference else float("nan")
        lines.append(f"{row['category']} {round(ratio, 1)} {round(reference * 10, 1)} {round(answer * 10, 1)}")
    return lines


def rating_counts(ratings: Sequence[str], abilities: Sequence[Sequence[str]]) -> dict:
    """How many answers are rated A or B, of how many, and both by ability (OwlEval, arXiv 2304.14178)."""
    good = [rating in GOOD_RATINGS for rating in ratings]
    by_ability = {}
    for name in sorted({ability for group in abilities for ability in group}):
        chosen = [is_good for is_good, group in zip(good, abilities) if name in group]
        by_ability[name] = [sum(chosen), len(chosen)]
    return {"A_or_B": sum(good), "of": len(good), "by_ability": by_ability}
