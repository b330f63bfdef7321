# SPDX-License-Identifier: Apache-2.0
"""JSON Lines with one annotated image or question per line (keys: docs/own_data.md)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    AnnotationFile,
    read_json,
    read_text,
    split_lines,
)

IMAGE_KEYS = ("image", "file_name")  # the last one counts
KEYS = (
    *(*IMAGE_KEYS, "question", "answer", "answers", "task", "kind", "setting", "expression", "boxes", "question_boxes"),
    *("tags", "width", "height", "text", "label"),
)
POPE_LABELS = ("no", "yes")  # some copies of POPE have 0 and 1


@renamed_fields()
@dataclass(frozen=True)
class JsonLines(AnnotationFile):
    """JSON Lines: {"image", "question", "answer" or "answers", "task", "kind", "expression", "boxes",
    "question_boxes", "tags", "width", "height"}; only an answer or boxes are required. A line without an image is a
    text-only example, such as the instructions in mPLUG-Owl's second stage.

    "file_name" takes precedence over "image". Without a question, a template of the task is drawn. Boxes are
    fractions, or pixels if width and height are present. POPE's "text" and "label" become task "existence". A text
    where a list belongs is a list of one. A line of another type, with a misspelt key, or with boxes in other units
    than an earlier line about its image is a bad record, whose error names file and line.
    """

    name: str = "lines"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file = Path(self.file)
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        for line_number, line in _read_lines(file):
            location = f"{file}, line {line_number},"
            with builder.row(location, "vqa"):
                add_row(builder, _parse_line(line, location), location, file)
        return builder.build(max_pixels)


def _read_lines(file: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank, or of each entry of a JSON list."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        rows = read_json(file)  # a JSON list of the same entries
        return [(number, json.dumps(row)) for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1)]
    return split_lines(text)


def _parse_line(line: str, location: str) -> dict:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not valid JSON ({error}); correct the line") from error
    if not isinstance(entry, dict):
        raise UserError(f"{location} is {typed_rows.abbreviate(entry)}; give a JSON object with an image and an answer")
    return entry


def add_row(builder: AnnotatedImagesBuilder, entry: dict, location: str, file: Path) -> None:
    """Adds a row to a builder; one of another type or without an answer is a bad row.

    Raises UserError for keys that are not of the format.
    """
    builder.check_keys(entry, KEYS, IMAGE_KEYS, location, file)
    is_pope = "label" in entry and "text" in entry
    task = typed_rows.text(entry, "task", location) or ("existence" if is_pope else "vqa")
    with builder.row(location, task):
        name = next(filter(None, (typed_rows.text(entry, key, location) for key in reversed(IMAGE_KEYS))), "")
        size, tags = typed_rows.image_size(entry, location), typed_rows.texts(entry, "tags", location)
        annotation = _parse_annotation(entry, is_pope, location)
        if not (builder.includes(name) if name else builder.includes_text(json.dumps(entry, sort_keys=True))):
            return
        has_boxes = bool(annotation.boxes or annotation.question_boxes)
        if has_boxes and not name:
            raise UserError(f"{location} has boxes but no image; give its path as 'image'")
        index = builder.add_image(name or ("text", location), ImageInfo(name, tags=tags))
        builder.check_units(index, size, has_boxes, location)
        builder.add_annotation(task, dataclasses.replace(annotation, photo=index))


def _parse_annotation(entry: dict, is_pope: bool, location: str) -> Annotation:
    """The annotation of a row, with image index 0."""
    if is_pope:
        label = entry["label"]
        answers = (POPE_LABELS[label],) if isinstance(label, int) and label in (0, 1) else ()
        as_text = {str(number): word for number, word in enumerate(POPE_LABELS)}
        answers = answers or tuple(as_text.get(text, text) for text in typed_rows.texts(entry, "label", location))
    else:
        answers = typed_rows.texts(entry, "answers", location) or typed_rows.texts(entry, "answer", location)
    boxes = typed_rows.boxes(entry, "boxes", location)
    if not answers and not boxes:
        raise UserError(f"{location} has neither an answer nor boxes; add one of them")
    return Annotation(
        0,
        answers,
        typed_rows.text(entry, "text" if is_pope else "question", location),
        typed_rows.text(entry, "expression", location),
        typed_rows.text(entry, "kind", location) or typed_rows.text(entry, "setting", location),
        boxes,
        typed_rows.boxes(entry, "question_boxes", location),
        question_id="" if entry.get("question_id") is None else str(entry["question_id"]),
    )
