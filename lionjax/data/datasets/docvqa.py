# SPDX-License-Identifier: Apache-2.0
"""DocVQA (arXiv 2007.00398) as published: train_v1.0.json, val_v1.0.json and test_v1.0.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, answer_texts, required_text, row_id


@dataclass(frozen=True)
class DocVqa(QuestionFile):
    """DocVQA's questions as task `vqa`. Answers of the test split are not public."""

    name: str = "docvqa"
    LIST_KEYS = ("data",)

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question = (required_text(row, key, location) for key in ("image", "question"))
        number = row_id(row, "questionId", location)
        answers = answer_texts(row, "answers", location)
        yield Question("vqa", image, Annotation(0, answers, question, question_id=number))
