# SPDX-License-Identifier: Apache-2.0
"""VizWiz-VQA (arXiv 1802.08218) as published: train.json, val.json and test.json, each a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, answer_texts, required_text


@dataclass(frozen=True)
class VizWiz(QuestionFile):
    """VizWiz' questions as task `vqa`, named by their image. Answers of the test split are not public."""

    name: str = "vizwiz"

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question = (required_text(row, key, location) for key in ("image", "question"))
        facts = {"answerable": row.get("answerable"), "answer_type": typed_rows.text(row, "answer_type", location)}
        answers = answer_texts(row, "answers", location)
        yield Question("vqa", image, Annotation(0, answers, question, question_id=image, facts=facts))
