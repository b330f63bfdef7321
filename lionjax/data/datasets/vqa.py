# SPDX-License-Identifier: Apache-2.0
"""VQA (arXiv 1612.00837) as published: a questions file, an annotations file and a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_json
from lionjax.data.datasets.question_file import NO_ANSWERS
from lionjax.data.datasets.splits import check_heldout_fraction


@renamed_fields()
@dataclass(frozen=True)
class Vqa:
    """VQA-format files. `file_name_pattern` formats an image id: 'COCO_val2014_{:012d}.jpg', '{}.jpg'.

    All 10 answers are kept with repetitions, so that an answer is drawn as often as annotators gave it. Questions
    without answers are skipped, unless `answers` is empty: a test split, whose answers are not public.
    """

    questions: str
    answers: str
    image_dir: str
    file_name_pattern: str = "{}.jpg"
    heldout_fraction: float = 0.0
    name: str = "vqa"

    def __post_init__(self):
        check_heldout_fraction(self.heldout_fraction)

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return Path(self.questions), *([Path(self.answers)] if self.answers else []), Path(self.image_dir)

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        """The questions of a split. Raises UserError if the answers are to none of them."""
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        answers_by_question, facts_by_question, path = {}, {}, Path(self.answers)
        fields = ("question_id", "answers")
        tree = read_json(path) if self.answers else {"annotations": []}
        for location, annotation in builder.entries(path, tree, "annotations", fields, "vqa"):
            with builder.row(location, "vqa"):
                answers = tuple(typed_rows.text(item, "answer", location) for item in annotation["answers"])
                answers_by_question[annotation["question_id"]] = tuple(filter(str.strip, answers))
                types = {key: annotation[key] for key in ("answer_type", "question_type") if annotation.get(key)}
                facts_by_question[annotation["question_id"]] = {"references": list(answers)} | types
        path, fields, question_ids = Path(self.questions), ("question_id", "image_id", "question"), set()
        for location, entry in builder.entries(path, read_json(path), "questions", fields, "vqa"):
            with builder.row(location, "vqa"):
                question_ids.add(entry["question_id"])
                image_id, answers = entry["image_id"], answers_by_question.get(entry["question_id"])
                answers = answers if self.answers else NO_ANSWERS
                name, question = self.file_name_pattern.format(image_id), typed_rows.text(entry, "question", location)
                if answers and builder.includes(name):
                    image_index = builder.add_image(image_id, ImageInfo(name))
                    question_id = str(entry["question_id"])
                    facts = facts_by_question.get(entry["question_id"], {})
                    annotation = Annotation(image_index, answers, question, question_id=question_id, facts=facts)
                    builder.add_annotation("vqa", annotation)
        if question_ids and answers_by_question and question_ids.isdisjoint(answers_by_question):
            raise UserError(
                f"{self.answers} answers none of the questions of {path}, such as {next(iter(answers_by_question))!r}; "
                "give the annotations of the same split"
            )
        return builder.build(max_pixels)
