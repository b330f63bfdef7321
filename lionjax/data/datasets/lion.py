# SPDX-License-Identifier: Apache-2.0
"""The records of LION's published training code (commit 699a4cc of JiuTian-LION): questions with a level each.

{"image" or "image_path" or "image_id", "question", "answer" (a text, or a list whose first text counts), "category",
"tags"}. Boxes are digits in the texts, as fractions of the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.boxes import BOX_PATTERN, Box
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import BOXES_MARK, AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_rows
from lionjax.data.datasets.conversations import ImageFolders

IMAGE_KEYS = ("image", "image_path", "image_id")  # the first one that a record has
KEYS = (*IMAGE_KEYS, "question", "answer", "category", "tags")
REGION_CATEGORIES = ("ref", "region", "region_level", "grounding")  # every other category is image level


@renamed_fields()
@dataclass(frozen=True)
class LionRecords(AnnotationFile):
    """A JSON list or JSON Lines of LION's training records, as the tasks `image_level` and `region_level`.

    Boxes in digits in the texts are the example's boxes, so that crops and flips move them; they are written with three
    decimals. `tags` is a list, or one text with commas or bars between the tags; `lionjax data build --tagger` makes
    them with RAM. Where both levels are trained, give each a group in the mixture (`Mix`).
    """

    name: str = "lion"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file, root = Path(self.file), Path(self.image_dir)
        builder, folders = AnnotatedImagesBuilder(root, split, self.heldout_fraction), ImageFolders(root)
        for location, row in read_rows(file):
            with builder.row(location, _task(row)):
                _add_record(builder, folders, row, location, file)
        return builder.build(max_pixels)


def _task(row: object) -> str:
    category = row.get("category") if isinstance(row, dict) else ""
    return "region_level" if category in REGION_CATEGORIES else "image_level"


def _add_record(builder: AnnotatedImagesBuilder, folders: ImageFolders, row: object, location: str, file: Path) -> None:
    """Adds a record to a builder. Raises UserError for one without image, question or answer."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{location} is {typed_rows.abbreviate(row)}; give a JSON object with a question and an answer")
    builder.check_keys(row, KEYS, IMAGE_KEYS, location, file)
    names = (typed_rows.text(row, key, location) for key in IMAGE_KEYS)
    name, answers = next(filter(None, names), ""), typed_rows.texts(row, "answer", location)
    question = typed_rows.text(row, "question", location)
    if not name or not question.strip() or not answers:
        lacking = "image" if not name else "question" if not question.strip() else "answer"
        raise UserError(f"{location} has no {lacking!r}; add it")
    path, task = folders.find(name), _task(row)
    if not builder.includes(path):
        return
    index = builder.add_image(path, ImageInfo(path, tags=_tags(row, location)))
    question, question_boxes = _mark_boxes(question)
    answer, boxes = _mark_boxes(answers[0])
    fields = {"kind": "box" if boxes else "text", "boxes": boxes, "question_boxes": question_boxes}
    builder.add_annotation(task, Annotation(index, (answer,), question, **fields))


def _tags(row: Mapping, location: str) -> tuple[str, ...]:
    tags = row.get("tags")
    tags = tags.replace("|", ",").split(",") if isinstance(tags, str) else typed_rows.texts(row, "tags", location)
    return tuple(tag.strip() for tag in tags if tag.strip())


def _mark_boxes(text: str) -> tuple[str, tuple[Box, ...]]:
    """(text with `<boxes>` where boxes stand, boxes in order); numbers in brackets that are no box stay text."""
    boxes: list[Box] = []

    def mark(match: re.Match) -> str:
        x0, y0, x1, y1 = map(float, match.groups())
        if not (x0 < x1 <= 1 and y0 < y1 <= 1):
            return match[0]
        boxes.append((x0, y0, x1, y1))
        return BOXES_MARK

    return BOX_PATTERN.sub(mark, text), tuple(boxes)
