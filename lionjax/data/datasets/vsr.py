# SPDX-License-Identifier: Apache-2.0
"""Visual Spatial Reasoning (arXiv 2205.00363) as published: train.jsonl, dev.jsonl and test.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile, required_text


@dataclass(frozen=True)
class Vsr(QuestionFile):
    """VSR's statements as task `relation`, true or false; rows have no id, so predictions are in the file's order.

    Images are of COCO's train2017 and val2017, told apart only by `image_link`.
    """

    name: str = "vsr"
    TASK = "relation"

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, statement = (required_text(row, key, location) for key in ("image", "caption"))
        if row.get("label") not in (0, 1):
            raise UserError(f"{location} has {row.get('label')!r} as 'label'; give 0 or 1")
        folder = next((part for part in ("train2017", "val2017") if part in str(row.get("image_link") or "")), "")
        facts = {"relation": row.get("relation") or "", "statement": statement}
        answers = ("yes",) if row["label"] else ("no",)
        question = f"Is this true of the image? {statement}"
        annotation = Annotation(0, answers, question, kind=facts["relation"], facts=facts)
        yield Question("relation", f"{folder}/{image}".lstrip("/"), annotation)
