# SPDX-License-Identifier: Apache-2.0
"""TextVQA (arXiv 1904.08920) as published: TextVQA_0.5.1_{train,val,test}.json and train_images/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, answer_texts, required_text, row_id


@dataclass(frozen=True)
class TextVqa(QuestionFile):
    """TextVQA's questions as task `vqa`; the images of train and val are train_images/IMAGE_ID.jpg."""

    name: str = "textvqa"
    LIST_KEYS = ("data",)

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question = row_id(row, "image_id", location), required_text(row, "question", location)
        # LLaVA's answer files name a question by its image and its text.
        facts = {"aliases": [f"{image}|{question.lower()}"], "image_id": image}
        answers, number = answer_texts(row, "answers", location), row_id(row, "question_id", location)
        annotation = Annotation(0, answers, question, question_id=number, facts=facts)
        yield Question("vqa", f"train_images/{image}.jpg", annotation)
