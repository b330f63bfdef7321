# SPDX-License-Identifier: Apache-2.0
"""OCR-VQA (ICDAR 2019) as published: dataset.json, an object of books by id, each with several questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, row_id, rows_by_id

SPLIT_NUMBERS = {"train": 1, "validation": 2, "heldout": 3}


@dataclass(frozen=True)
class OcrVqa(QuestionFile):
    """OCR-VQA's questions in the file's own splits as task `vqa`; an id is BOOK/NUMBER, the image BOOK.jpg."""

    name: str = "ocrvqa"
    OWN_SPLITS = True

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        for location, row in rows_by_id(Path(self.file), "book"):
            if not isinstance(row, dict) or row.get("split") == SPLIT_NUMBERS[split]:
                yield location, row

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        book, questions, answers = row_id(row, "book", location), row["questions"], row["answers"]
        if len(questions) != len(answers):
            raise UserError(f"{location} has {len(questions)} questions but {len(answers)} answers; give one each")
        for number, (question, answer) in enumerate(zip(questions, answers)):
            annotation = Annotation(0, (str(answer),), str(question), question_id=f"{book}/{number}")
            yield Question("vqa", f"{book}.jpg", annotation)
