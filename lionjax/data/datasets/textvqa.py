# SPDX-License-Identifier: Apache-2.0
"""TextVQA (arXiv 1904.08920) as published: TextVQA_0.5.1_{train,val,test}.json and train_images/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_rows
from lionjax.data.datasets.question_file import Question, QuestionFile, answer_texts, list_rows, required_text, row_id

LLAVA_OCR = re.compile(r"^Reference OCR token: ?(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class TextVqa(QuestionFile):
    """TextVQA's questions as task `vqa`; the images of train and val are train_images/IMAGE_ID.jpg.

    `ocr_file`: the words that an OCR system read in each image, which become `facts["ocr_tokens"]`: Rosetta's
    TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json, or LLaVA's questions with them (llava_textvqa_val_v051_ocr.jsonl).
    """

    ocr_file: str = ""
    name: str = "textvqa"
    LIST_KEYS = ("data",)
    FURTHER_FILES = ("ocr_file",)

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        """As the base's, each row with its image's words as `ocr_words` if there is an `ocr_file`."""
        words = read_ocr_words(Path(self.ocr_file)) if self.ocr_file else None
        for location, row in super().rows(split):
            if words is not None and isinstance(row, dict):
                row = {**row, "ocr_words": words.get(str(row.get("image_id")))}
            yield location, row

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        image, question = row_id(row, "image_id", location), required_text(row, "question", location)
        # LLaVA's answer files name a question by its image and its text.
        facts = {"aliases": [f"{image}|{question.lower()}"], "image_id": image}
        if self.ocr_file:
            if row["ocr_words"] is None:
                raise UserError(f"{location}: {self.ocr_file} has no image {image!r}; give the OCR file of the split")
            facts["ocr_tokens"] = row["ocr_words"]
        answers, number = answer_texts(row, "answers", location), row_id(row, "question_id", location)
        annotation = Annotation(0, answers, question, question_id=number, facts=facts)
        yield Question("vqa", f"train_images/{image}.jpg", annotation)


def read_ocr_words(path: Path) -> dict[str, list[str]]:
    """{image id: words read in it} of Rosetta's file or of LLaVA's questions. Raises UserError for another file."""
    is_llava, found = path.suffix == ".jsonl", {}
    for location, row in read_rows(path) if is_llava else list_rows(path, "data"):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{location} is {typed_rows.abbreviate(row)}; give a file of TextVQA's OCR tokens")
        if is_llava:
            line = LLAVA_OCR.search(required_text(row, "text", location))
            if line is None:
                raise UserError(f"{location} has no line 'Reference OCR token: ...'; give LLaVA's file with them")
            found[row_id(row, "question_id", location)] = line[1].split(", ") if line[1] else []
            continue
        words = row.get("ocr_tokens")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{location} has {typed_rows.abbreviate(words)} as 'ocr_tokens'; give a list of words")
        found[row_id(row, "image_id", location)] = words
    return found
