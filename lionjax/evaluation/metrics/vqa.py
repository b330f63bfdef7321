# SPDX-License-Identifier: Apache-2.0
"""Metrics of answers: VQA accuracy, POPE, VSR, ScienceQA choices, and SQuAD's exact match and token F1.

Answers are normalized as in the official VQA evaluation code (GT-Vision-Lab/VQA), quirks included, so that scores are
comparable with papers; each quirk is documented below. "Two dogs." and "2 dogs" are one answer.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
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
# A contraction is restored if exactly one of its apostrophes is missing.
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in CONTRACTION_LIST for i, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the official table


@functools.lru_cache(2**16)  # most answers are given many times
def normalize_answer(text: str) -> str:
    """The normalized form of an answer: lower case, without punctuation and articles, number words as digits.

    "It's the Two dogs!" becomes "it's 2 dogs", "dont" becomes "don't", "1,000" becomes "1000".
    Source: the VQA challenge's evaluation code (GT-Vision-Lab/VQA).
    """
    words = strip_punctuation(re.sub(r"[\n\t]", " ", text).strip()).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_evalai_answer(text: str) -> str:
    """An answer as EvalAI's servers of TextVQA and VizWiz normalize it: then "it's" is "it 's", and "what?" is "what".

    Source: the EvalAI answer processor of MMF (facebookresearch/mmf), which LLaVA's evaluation of TextVQA uses.
    """
    return normalize_answer(re.sub("[,?]", "", text.lower()).replace("'s", " 's").strip())


def strip_punctuation(text: str) -> str:
    """`text` without punctuation: a mark next to a space anywhere in `text` is removed, others become spaces.

    All marks are removed if a comma is between digits. A period is removed unless a digit follows. Apostrophes and
    colons stay.
    """
    joined = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if joined or beside_space else " ")
    return re.sub(r"\.(?!\d)", "", stripped)


def vqa_accuracy(answer: str, references: Sequence[str], raw_references: bool = False) -> float:
    """Official VQA accuracy of one answer, 0..1.

    The mean over the references of min(1, matches among the other references / 3); with ten references, 0 to 4 matches
    give 0, 0.3, 0.6, 0.9 and 1. With fewer than four references, the 3 becomes the number of other references; with a
    single reference, the score is an exact match after normalization.

    Both sides are normalized. The official code expects normalized references and only strips their punctuation, and
    only if they are not all equal: `raw_references=True` does the same (then "2" does not match ten references "two").

    Raises ValueError without references. Source: Antol et al. 2015 (arXiv 1505.00468), and the official VQA code.
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
    full_score_matches = min(3, len(references) - 1)
    scores = [min(1.0, (matches - (answer == text)) / full_score_matches) for text in references]
    return sum(scores) / len(scores)


def official_vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """`vqa_accuracy` with the references of a published file, of which only the punctuation is stripped."""
    return vqa_accuracy(answer, references, raw_references=True)


def evalai_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of one answer, 0..1, with both sides as `normalize_evalai_answer` (TextVQA, VizWiz)."""
    normalized, answer = [normalize_evalai_answer(text) for text in references], normalize_evalai_answer(answer)
    matches = [sum(text == answer for text in normalized[:k] + normalized[k + 1 :]) for k in range(len(normalized))]
    return sum(min(1.0, count / 3) for count in matches) / len(matches)


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Normalized Levenshtein similarity of one answer, 0..1, the best of the references; 0 below `threshold`.

    Both are lower-cased and their blanks collapsed before the edit distance, which is divided by the longer length
    without that, as in lmms-eval. Source: DocVQA (arXiv 2007.00398), where its mean is ANLS.
    """

    def similarity(reference: str) -> float:
        distance = edit_distance(*(" ".join(text.lower().split()) for text in (reference, answer)))
        length = max(len(reference.upper()), len(answer.upper()))
        return 1 - distance / length if length else 1.0

    best = max(map(similarity, references))
    return best if best >= threshold else 0.0


def edit_distance(left: str, right: str) -> int:
    """The Levenshtein distance of two texts."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def parse_pope_answer(text: str) -> bool:
    """Whether POPE's evaluation script counts an answer as yes.

    An answer is no if "No", "no" or "not" is a word before the first period (commas ignored); everything else is yes,
    including an empty answer, "NO" and "isn't". Source: AoiDragon/POPE, evaluate.py.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def parse_yes_no(text: str) -> bool | None:
    """True or False if the first word is yes/true or no/false (any case), None otherwise."""
    word = re.match(r"\W*(yes|true|no|false)\b", text, re.IGNORECASE)
    return None if word is None else word.group(1).lower() in ("yes", "true")


def pope_scores(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and ratio of yes answers, each 0..1, with "yes" as the positive class.

    `answers` come from `parse_pope_answer`. A ratio with denominator 0 is 0: a model that never answers yes has
    precision, recall and F1 of 0. Source: POPE (Li et al. 2023, arXiv 2305.10355), section 5.
    """
    predicted, true = as_bool_arrays(answers, labels)
    hits = int(np.sum(predicted & true))
    precision = hits / predicted.sum() if predicted.any() else 0.0
    recall = hits / true.sum() if true.any() else 0.0
    return {
        "accuracy": float(np.mean(predicted == true)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / (precision + recall)) if hits else 0.0,
        "yes_ratio": float(np.mean(predicted)),
    }


def vsr_accuracy(answers: Sequence[bool | None], labels: Sequence[bool]) -> float:
    """Fraction of statements classified correctly, 0..1; an answer of None (see `parse_yes_no`) is wrong.

    Source: Visual Spatial Reasoning (Liu et al. 2023, arXiv 2205.00363).
    """
    as_bool_arrays(answers, labels)
    return sum(answer is not None and answer == label for answer, label in zip(answers, labels, strict=True)) / len(
        labels
    )


def as_bool_arrays(answers: Sequence[bool | None], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool arrays of the same length. Raises ValueError if the lengths differ or are zero."""
    if len(answers) != len(labels) or not len(labels):
        raise ValueError(f"{len(answers)} answers for {len(labels)} labels; give one per question, at least one")
    return np.array(answers, dtype=bool), np.array(labels, dtype=bool)


def parse_choice(text: str) -> str | None:
    """The option letter of a ScienceQA answer, parsed as in LLaVA's evaluation code; None if there is none.

    Accepted: a single letter, a letter before ". ", or exactly one "The answer is X" with any character behind the
    letter: LLaVA's pattern ends in a dot that stands for every character, so "The answer is B, surely" is B.
    """
    if re.fullmatch(r"[A-Z]", text) or re.match(r"[A-Z]\. ", text):
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else None


def squad_tokens(text: str) -> list[str]:
    """The words of an answer for SQuAD's metrics: lower case, without ASCII punctuation and articles."""
    unpunctuated = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in unpunctuated.split() if word not in ARTICLES]


def squad_scores(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """(exact match, token F1) of one answer, each the best over the references, 0..1.

    Two answers without words are equal; one without words has an F1 of 0. Source: Rajpurkar et al. 2018 (arXiv
    1806.03822), the official evaluation code of SQuAD 2.0.
    """
    words, exact, best = squad_tokens(answer), 0.0, 0.0
    for reference_words in map(squad_tokens, references):
        same = float(words == reference_words)
        common = sum((Counter(words) & Counter(reference_words)).values())
        f1 = 2 * common / (len(words) + len(reference_words)) if words and reference_words else same
        exact, best = max(exact, same), max(best, f1)
    return exact, best
