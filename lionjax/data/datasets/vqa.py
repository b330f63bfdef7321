# SPDX-License-Identifier: Apache-2.0
"""VQA as published: a questions file, an annotations file and a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    convert_format_errors,
    in_split,
    read_json,
    validated_entries,
)


@renamed_fields(images="image_dir", pattern="file_name_pattern", share="heldout_fraction")
@dataclass(frozen=True)
class Vqa:
    """VQA-format files. `pattern` makes a file name of an image id: 'COCO_val2014_{:012d}.jpg', '{}.jpg'.

    All ten answers stay, so that one is drawn as often as people gave it. Questions without answers are left out.
    """

    questions: str
    answers: str
    image_dir: str
    file_name_pattern: str = "{}.jpg"
    heldout_fraction: float = 0.0
    name: str = "vqa"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        said, reader = {}, AnnotatedImagesBuilder(Path(self.image_dir))
        path = Path(self.answers)
        with convert_format_errors(path):
            for note in validated_entries(path, read_json(path), "annotations", ("question_id", "answers")):
                said[note["question_id"]] = tuple(a["answer"] for a in note["answers"])
        path = Path(self.questions)
        fields = ("question_id", "image_id", "question")
        with convert_format_errors(path):
            for entry in validated_entries(path, read_json(path), "questions", fields):
                key, answers = entry["image_id"], said.get(entry["question_id"])
                if answers and in_split(key, split, self.heldout_fraction):
                    number = reader.add_image(key, ImageInfo(self.file_name_pattern.format(key)))
                    reader.add_annotation("vqa", Annotation(number, answers, entry["question"]))
        return reader.build(max_pixels)
