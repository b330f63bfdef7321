# SPDX-License-Identifier: Apache-2.0
"""VQA as published: a questions file, an annotations file and a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.data.datasets.annotated_images import Photo, Row, Table
from lionjax.data.datasets.annotation_files import Reader, entries, in_split, read_json, well_formed


@dataclass(frozen=True)
class Vqa:
    """VQA-format files. `pattern` makes a file name of an image id: 'COCO_val2014_{:012d}.jpg', '{}.jpg'.

    All ten answers stay, so that one is drawn as often as people gave it. Questions without answers are left out.
    """

    questions: str
    answers: str
    images: str
    pattern: str = "{}.jpg"
    share: float = 0.0
    name: str = "vqa"

    def open(self, split: str, max_pixels: int) -> Table:
        said, reader = {}, Reader(Path(self.images))
        path = Path(self.answers)
        with well_formed(path):
            for note in entries(path, read_json(path), "annotations", ("question_id", "answers")):
                said[note["question_id"]] = tuple(a["answer"] for a in note["answers"])
        path = Path(self.questions)
        fields = ("question_id", "image_id", "question")
        with well_formed(path):
            for entry in entries(path, read_json(path), "questions", fields):
                key, answers = entry["image_id"], said.get(entry["question_id"])
                if answers and in_split(key, split, self.share):
                    number = reader.photo(key, Photo(self.pattern.format(key)))
                    reader.row("vqa", Row(number, answers, entry["question"]))
        return reader.table(max_pixels)
