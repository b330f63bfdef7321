# SPDX-License-Identifier: Apache-2.0
"""GQA (arXiv 1902.09506) as published: testdev_balanced_questions.json and others, an object of questions by id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import NO_ANSWERS, Question, QuestionFile, required_text, row_id, rows_by_id


@dataclass(frozen=True)
class Gqa(QuestionFile):
    """GQA's questions as task `vqa`; the image is images/IMAGE_ID.jpg."""

    name: str = "gqa"

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        return rows_by_id(Path(self.file), "question_id")

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question = (required_text(row, key, location) for key in ("imageId", "question"))
        answer, number = typed_rows.text(row, "answer", location), row_id(row, "question_id", location)
        facts = {"types": row.get("types") or {}}
        annotation = Annotation(0, (answer,) if answer else NO_ANSWERS, question, question_id=number, facts=facts)
        yield Question("vqa", f"images/{image}.jpg", annotation)
