# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench (arXiv 2304.08485) as published: questions.jsonl, beside it the context and GPT-4's answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_rows
from lionjax.data.datasets.question_file import NO_ANSWERS, Question, QuestionFile, required_text, row_id


@dataclass(frozen=True)
class LlavaBench(QuestionFile):
    """LLaVA-Bench's questions as task `conversation`, kinds conv, detail and complex.

    `references`: the file of GPT-4's answers, by question_id; without it the questions have no reference.
    """

    references: str = ""
    name: str = "llava_bench"
    TASK = "conversation"
    FURTHER_FILES = ("references",)

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        answers = {}
        for location, row in read_rows(Path(self.references)) if self.references else ():
            if not isinstance(row, dict) or "question_id" not in row:
                raise UserError(f"{location} has no question_id; give a file of LLaVA's answers")
            answers[str(row["question_id"])] = typed_rows.text(row, "text", location)
        for location, row in read_rows(Path(self.file)):
            is_row = isinstance(row, dict)
            yield location, {**row, "reference": answers.get(str(row.get("question_id")))} if is_row else row

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question, kind = (required_text(row, key, location) for key in ("image", "text", "category"))
        answers = (row["reference"],) if row["reference"] else NO_ANSWERS
        annotation = Annotation(0, answers, question, kind=kind, question_id=row_id(row, "question_id", location))
        yield Question("conversation", image, annotation)
