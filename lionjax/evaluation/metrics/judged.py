# SPDX-License-Identifier: Apache-2.0
"""Answers rated by a judge: LLaVA-Bench's pairs of scores (arXiv 2304.08485), and OwlEval's ratings by people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

UNREADABLE = [-1, -1]
GOOD_RATINGS = ("A", "B")


def parse_judge_scores(reply: str) -> list[float]:
    """[reference's score, answer's score] of a judge's reply: the two numbers of its first line, or [-1, -1].

    The line is split at single blanks, after commas became blanks, so that "9, 5" and "7 7 " have three parts and are
    unreadable, as in LLaVA's code.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(part) for part in parts] if len(parts) == 2 else list(UNREADABLE)
    except ValueError:
        return list(UNREADABLE)


def judge_table(pairs: Sequence[Sequence[float]], categories: Sequence[str]) -> list[dict]:
    """One row a category, "all" first: the ratio of the means in percent, and both means times 10.

    Unreadable replies enter with -1, as in LLaVA's code. Keys: category, ratio, reference, answer.
    """
    rows = []
    for name in ("all", *sorted(set(categories))):
        chosen = [pair for pair, category in zip(pairs, categories) if name in ("all", category)]
        reference, answer = np.asarray(chosen, float).mean(axis=0).tolist()
        ratio = answer / reference * 100 if reference else float("nan")
        rows.append({"category": name, "ratio": ratio, "reference": reference * 10, "answer": answer * 10})
    return rows


def judge_lines(rows: Sequence[Mapping]) -> list[str]:
    """The rows of `judge_table` as LLaVA prints them: category, ratio, and both means times 10, with one decimal."""
    return [
        f"{row['category']} {round(row['ratio'], 1)} {round(row['reference'], 1)} {round(row['answer'], 1)}"
        for row in rows
    ]


def rating_counts(ratings: Sequence[str], abilities: Sequence[Sequence[str]]) -> dict:
    """How many answers are rated A or B, of how many, and both by ability (OwlEval, arXiv 2304.14178)."""
    good = [rating in GOOD_RATINGS for rating in ratings]
    by_ability = {}
    for name in sorted({ability for group in abilities for ability in group}):
        chosen = [is_good for is_good, group in zip(good, abilities) if name in group]
        by_ability[name] = [sum(chosen), len(chosen)]
    return {"A_or_B": sum(good), "of": len(good), "by_ability": by_ability}
