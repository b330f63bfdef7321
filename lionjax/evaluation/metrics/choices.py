# SPDX-License-Identifier: Apache-2.0
"""Metrics of multiple choice: reading option letters, MMBench's circular accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MARKS = re.compile(r"[.()\[\],:;!*#{}]")
MAX_WORDS_WITH_ARTICLE = 3  # in a longer answer, a lone "A" is taken for the article


def read_option(text: str, choices: Mapping[str, str]) -> str:
    """The letter of the option that an answer names, or "".

    The one letter of `choices` ({letter: text}) that stands alone among blanks and marks, unless it is an "A" in an
    answer of more than three words; else the one option whose text occurs in the answer, in any case.
    Source: the reading without a language model of VLMEvalKit and of lmms-eval's MMBench.
    """
    words = MARKS.sub(" ", text).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and not (letters[0] == "A" and len(words) > MAX_WORDS_WITH_ARTICLE):
        return letters[0]
    named = [letter for letter, choice in choices.items() if choice.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def circular_accuracy(correct_by_question: Mapping[str, Sequence[bool]]) -> dict[str, bool]:
    """{question: whether every rotation of its options was answered correctly} (MMBench, arXiv 2307.06281)."""
    return {question: all(correct) for question, correct in correct_by_question.items()}


def read_candidate(text: str, choices: Sequence[str]) -> int | None:
    """The index of the candidate that an answer is: its text in any case, a letter, or None."""
    word = text.strip().rstrip(".").lower()
    lowered = [choice.strip().rstrip(".").lower() for choice in choices]
    if word in lowered:
        return lowered.index(word)
    match = re.fullmatch(r"\(?([a-z])\)?", word)
    index = ord(match[1]) - ord("a") if match else len(choices)
    return index if index < len(choices) else None
