# SPDX-License-Identifier: Apache-2.0
"""A-OKVQA (arXiv 2206.01718) as published: aokvqa_v1p0_{train,val,test}.json, with the images of COCO 2017."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, answer_texts, required_text, row_id


@dataclass(frozen=True)
class AOkvqa(QuestionFile):
    """A-OKVQA's rows as task `vqa` with the ten direct answers; `choices` are the four of the multiple-choice form."""

    name: str = "aokvqa"

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        question = required_text(row, "question", location)
        choices, target = typed_rows.texts(row, "choices", location), row.get("correct_choice_idx")
        facts = {"target": target, "difficult": bool(row.get("difficult_direct_answer"))}
        answers, number = answer_texts(row, "direct_answers", location), row_id(row, "question_id", location)
        annotation = Annotation(0, answers, question, question_id=number, choices=choices, facts=facts)
        yield Question("vqa", f"{int(row['image_id']):012d}.jpg", annotation)
