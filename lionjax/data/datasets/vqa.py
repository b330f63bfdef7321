# SPDX-License-Identifier: Apache-2.0
"""VQA (arXiv 1612.00837) as published: a questions file, an annotations file and a folder of images."""

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


@renamed_fields()
@dataclass(frozen=True)
class Vqa:
    """VQA-format files. `file_name_pattern` formats an image id: 'COCO_val2014_{:012d}.jpg', '{}.jpg'.

    All 10 answers are kept with repetitions, so that an answer is drawn as often as annotators gave it. Questions
    without answers are skipped.
    """

    questions: str
    answers: str
    image_dir: str
    file_name_pattern: str = "{}.jpg"
    heldout_fraction: float = 0.0
    name: str = "vqa"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        answers_by_question, builder = {}, AnnotatedImagesBuilder(Path(self.image_dir))
        path = Path(self.answers)
        with convert_format_errors(path):
            for annotation in validated_entries(path, read_json(path), "annotations", ("question_id", "answers")):
                answers_by_question[annotation["question_id"]] = tuple(a["answer"] for a in annotation["answers"])
        path = Path(self.questions)
        fields = ("question_id", "image_id", "question")
        with convert_format_errors(path):
            for entry in validated_entries(path, read_json(path), "questions", fields):
                image_id, answers = entry["image_id"], answers_by_question.get(entry["question_id"])
                if answers and in_split(image_id, split, self.heldout_fraction):
                    image_index = builder.add_image(image_id, ImageInfo(self.file_name_pattern.format(image_id)))
                    builder.add_annotation("vqa", Annotation(image_index, answers, entry["question"]))
        return builder.build(max_pixels)
