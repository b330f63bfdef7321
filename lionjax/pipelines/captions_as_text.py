# SPDX-License-Identifier: Apache-2.0
"""Questions about images for a language model that sees captions: rows, prompts, cleaned answers, scores.

PICa (arXiv 2109.05014) and PromptCap (arXiv 2211.09699) share the prompt and the cleaning of answers; what only one
of them does is in `pica` and `promptcap`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lionjax.core.errors import UserError
from lionjax.data.datasets.annotation_files import read_all_rows
from lionjax.evaluation.metrics.regions import bootstrap_interval
from lionjax.evaluation.metrics.vqa import vqa_accuracy
from lionjax.pipelines.completion import CompletionRequest

INSTRUCTION = "Please answer the question according to the above context."
SEPARATOR = "==="
STOP = ("\n", "<|endoftext|>")
REMOVED_WORDS = frozenset(("a", "an", "the", "to", ""))
SCORE_PER_MATCH = 0.3  # of the quick accuracy
TEXT_LISTS = ("captions", "tags", "answers", "choices")


@dataclasses.dataclass(frozen=True)
class CaptionedQuestion:
    """A question about an image that captions and tags describe; `answers` are those of the annotators.

    `ocr`: text in the image, for PromptCap's captioner. `choices`: the answers of a multiple-choice question.
    """

    question: str
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    question_id: int | str = 0
    image: str = ""
    ocr: str = ""


class Shot(NamedTuple):
    """A solved example in a prompt."""

    context: str
    question: str
    answer: str


def read_questions(path: Path) -> list[CaptionedQuestion]:
    """The rows of a JSON Lines file with the fields of CaptionedQuestion; "caption" may stand for "captions".

    Raises UserError for a row without a question or a caption, and for a field that does not exist or has another type.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give JSON Lines with question, captions and answers")
    rows = [_parse_row(row, f"{path}, line {number}") for number, row in enumerate(read_all_rows(path), 1)]
    if not rows:
        raise UserError(f"{path} has no questions; give at least one line")
    return rows


def _parse_row(row: Mapping[str, Any], where: str) -> CaptionedQuestion:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object; give one object for each question")
    fields = dict(row)
    if "caption" in fields:
        fields["captions"] = [fields.pop("caption"), *fields.get("captions", ())]
    if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(CaptionedQuestion)}):
        raise UserError(
            f"{where} has a field {unknown[0]!r}; the fields are question, captions and other optional ones"
        )
    for name in TEXT_LISTS:
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where} has {name} that are no list of texts; give a list")
        fields[name] = tuple(value)
    if not isinstance(fields.get("question"), str) or not fields["question"].strip():
        raise UserError(f"{where} has no question; give a text")
    if not fields["captions"] or not fields["captions"][0].strip():
        raise UserError(f"{where} has an empty caption or none; give captions, the first of which is used")
    return CaptionedQuestion(**fields)


def build_prompt(shots: Sequence[Shot], context: str, question: str) -> str:
    """The prompt of both methods: an instruction, the shots in order, and a question whose answer is left out."""
    lines = [INSTRUCTION, SEPARATOR]
    for shot in shots:
        lines += [f"Context: {shot.context}", SEPARATOR, f"Q: {shot.question}", f"A: {shot.answer}", "", SEPARATOR]
    return "\n".join([*lines, f"Context: {context}", SEPARATOR, f"Q: {question}", "A:"])


def greedy_requests(prompts: Sequence[str], max_tokens: int) -> list[CompletionRequest]:
    """Greedy continuations of prompts up to the end of the line; one that `max_tokens` cuts is an answer too."""
    return [CompletionRequest(prompt, max_tokens=max_tokens, stop=STOP, may_be_cut=True) for prompt in prompts]


def most_similar(query_D: np.ndarray, keys_ND: np.ndarray, count: int) -> list[int]:
    """The `count` rows of `keys_ND` with the largest dot products with `query_D`, the largest first.

    Features are not normalized, as in the released code. Of equal rows the later one comes first, as there.
    """
    if keys_ND.ndim != 2 or query_D.shape != keys_ND.shape[1:]:
        raise UserError(f"features of shapes {query_D.shape} and {keys_ND.shape} do not match; give one row a question")
    order = np.argsort(keys_ND @ query_D, kind="stable")
    return order[::-1][:count].tolist()


def first_line(text: str) -> str:
    """The text before its first line break."""
    return text.partition("\n")[0]


def clean_answer(text: str) -> str:
    """A generated answer in lower case without periods, commas and the words a, an, the, to.

    As in the released code, words are split at single spaces, "10,000.5" becomes "100005", and annotators' answers are
    compared as they are.
    """
    words = text.replace(".", "").replace(",", "").lower().split(" ")
    return " ".join(word for word in words if word not in REMOVED_WORDS)


def quick_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy that the released code prints while it runs: 0.3 for each equal reference, at most 1."""
    return min(1.0, SCORE_PER_MATCH * sum(answer == reference for reference in references))


def accuracy_summary(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Official VQA accuracy with a 95 % bootstrap interval, and the quick accuracy, over questions with references.

    An answer that is missing is an empty text and counts as wrong.
    """
    pairs = [(answer, found) for answer, found in zip(answers, references, strict=True) if found]
    if not pairs:
        return {"num_questions": 0}
    official = [vqa_accuracy(answer, found) for answer, found in pairs]
    return {
        "num_questions": len(pairs),
        "vqa_accuracy": float(np.mean(official)),
        "interval": [float(end) for end in bootstrap_interval(np.array(official), seed=0)],
        "quick_accuracy": float(np.mean([quick_accuracy(answer, found) for answer, found in pairs])),
    }
