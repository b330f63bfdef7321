# SPDX-License-Identifier: Apache-2.0
"""Scores of a short answer: VQA accuracy with the official normaliser, and yes/no questions.

The normaliser makes "Two dogs." and "2 dogs" one answer. It follows the VQA challenge's code in
what it does, oddities included, so that figures compare with papers; each oddity is named here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = "none:0 zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10"
NUMBERS = dict(pair.split(":") for pair in NUMBER_WORDS.split())
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTION_LIST = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# A contraction is mended where exactly one of its apostrophes is missing.
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in CONTRACTION_LIST for i, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def normalize_answer(text: str) -> str:
    """The official VQA form of an answer: lower case, no punctuation, articles or number words.

    "It's the Two dogs!" becomes "it's 2 dogs", "dont" becomes "don't", "1,000" becomes "1000".
    Source: the VQA challenge's evaluation code (GT-Vision-Lab/VQA).
    """
    words = strip_punctuation(re.sub(r"[\n\t]", " ", text).strip()).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Drops a mark that touches a space anywhere in `text`, else puts a space in its place.

    All marks are dropped where a comma stands between digits. A period goes unless a digit
    follows it. Apostrophes and colons stay.
    """
    joined = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if joined or beside_space else " ")
    return re.sub(r"\.(?!\d)", "", stripped)


def vqa_accuracy(answer: str, references: Sequence[str], raw_references: bool = False) -> float:
    """Official VQA accuracy of one answer, 0..1: how far people agree with it.

    Every reference is left out in turn and min(1, matches among the others / 3) is averaged; with
    ten references, 0 to 4 matches give 0, 0.3, 0.6, 0.9 and 1. With fewer than four references the
    3 shrinks to the number of others; a single reference is an exact match after normalising.

    Both sides are normalised. The official code expects references that already are, and only
    strips their punctuation, and that only where they are not all the same:
    `raw_references=True` does so too (then "2" misses ten references "two").

    Source: Antol et al. 2015, and the VQA challenge's evaluation code. ValueError if there is no
    reference.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"references are {references!r}; give a list of at least one answer")
    answer = normalize_answer(answer)
    if not raw_references:
        references = [normalize_answer(text) for text in references]
    elif len(set(references)) > 1:
        references = [strip_punctuation(text) for text in references]
    if len(references) == 1:
        return float(answer == references[0])
    matches = sum(answer == text for text in references)
    enough = min(3, len(references) - 1)
    left_out = [min(1.0, (matches - (answer == text)) / enough) for text in references]
    return sum(left_out) / len(left_out)


def parse_pope_answer(text: str) -> bool:
    """True for yes, as POPE's own script reads an answer: yes unless its first sentence says no.

    "No", "no" or "not" must stand as a word before the first period (commas ignored); everything
    else is a yes, also an empty answer, "NO" and "isn't". Source: AoiDragon/POPE, evaluate.py.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def parse_yes_no(text: str) -> bool | None:
    """True or False by the first word (yes/true or no/false, any case), None for anything else."""
    word = re.match(r"\W*(yes|true|no|false)\b", text, re.IGNORECASE)
    return None if word is None else word.group(1).lower() in ("yes", "true")


def pope_scores(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, each 0..1, with "yes" the positive class.

    `answers` as `read_pope` gives them. A ratio whose denominator is zero is 0: a model that
    never says yes has precision, recall and F1 of 0. Source: Li et al. 2023 (POPE), section 5.
    """
    said, true = as_bool_arrays(answers, labels)
    hits = int(np.sum(said & true))
    precision = hits / said.sum() if said.any() else 0.0
    recall = hits / true.sum() if true.any() else 0.0
    return {
        "accuracy": float(np.mean(said == true)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / (precision + recall)) if hits else 0.0,
        "yes_ratio": float(np.mean(said)),
    }


def vsr_accuracy(answers: Sequence[bool | None], labels: Sequence[bool]) -> float:
    """Share of statements judged rightly, 0..1; None (see `read_yes_no`) is wrong.

    Source: Liu et al. 2023, Visual Spatial Reasoning.
    """
    as_bool_arrays(answers, labels)
    return sum(said is not None and said == true for said, true in zip(answers, labels, strict=True)) / len(labels)


def as_bool_arrays(answers: Sequence[bool | None], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool arrays of the same length; ValueError if the lengths differ or are zero."""
    if len(answers) != len(labels) or not len(labels):
        raise ValueError(f"{len(answers)} answers for {len(labels)} labels; give one a question, at least one")
    return np.array(answers, dtype=bool), np.array(labels, dtype=bool)


def parse_choice(text: str) -> str | None:
    """The option that an answer to ScienceQA names, as LLaVA's evaluation reads it; None where it names none.

    A letter alone, a letter before ". ", or the one sentence "The answer is X."; two such sentences are none.
    """
    if re.fullmatch(r"[A-Z]", text) or re.match(r"[A-Z]\. ", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None
