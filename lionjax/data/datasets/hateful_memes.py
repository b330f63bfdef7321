# SPDX-License-Identifier: Apache-2.0
"""Hateful Memes (arXiv 2005.04790) as published: dev.jsonl, dev_seen.jsonl and others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import NO_ANSWERS, Question, QuestionFile, required_text, row_id

QUESTION = 'This is an image with: "{}" written on it. Is it hateful?'


@dataclass(frozen=True)
class HatefulMemes(QuestionFile):
    """Hateful Memes as yes-or-no questions of the task `vqa`. Labels of the test split are not public."""

    name: str = "hateful_memes"

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, text, label = required_text(row, "img", location), required_text(row, "text", location), row.get("label")
        answers = {0: ("no",), 1: ("yes",)}.get(label, NO_ANSWERS)
        fields = {"question_id": row_id(row, "id", location), "facts": {"text": text, "label": label}}
        yield Question("vqa", image, Annotation(0, answers, QUESTION.format(text), **fields))
