# SPDX-License-Identifier: Apache-2.0
"""OwlEval (mPLUG-Owl, arXiv 2304.14178) as published: questions.jsonl, rated by people from A to D."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import NO_ANSWERS, Question, QuestionFile, required_text, row_id


@dataclass(frozen=True)
class OwlEval(QuestionFile):
    """OwlEval's questions as task `conversation`, without references; `facts` has the abilities that each one needs."""

    name: str = "owl_eval"
    TASK = "conversation"

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question, ability = (required_text(row, key, location) for key in ("image", "question", "ability"))
        abilities = [part.strip() for part in ability.split(",") if part.strip()]
        facts = {"abilities": abilities, "categories": list(typed_rows.texts(row, "category", location))}
        fields = {"question_id": row_id(row, "question_id", location), "facts": facts}
        yield Question("conversation", image, Annotation(0, NO_ANSWERS, question, **fields))
