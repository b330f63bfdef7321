# SPDX-License-Identifier: Apache-2.0
"""JSON Lines with one annotated image or question per line (keys: docs/own_data.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    AnnotationFile,
    convert_format_errors,
    in_split,
    read_json,
)


@renamed_fields()
@dataclass(frozen=True)
class JsonLines(AnnotationFile):
    """JSON Lines: {"image", "question", "answer" or "answers", "task", "kind", "expression", "boxes",
    "question_boxes", "tags", "width", "height"}; only an answer or boxes are required. A line without an image is a
    text-only example, such as the instructions in mPLUG-Owl's second stage.

    "file_name" takes precedence over "image". Without a question, a template of the task is drawn. Boxes are
    fractions, or pixels if width and height are present. POPE's "text" and "label" become task "existence". `open`
    raises UserError with file and line for a malformed line.
    """

    name: str = "lines"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file, builder = Path(self.file), AnnotatedImagesBuilder(Path(self.image_dir))
        for line_number, line in enumerate(_read_lines(file), 1):
            location = f"{file}, line {line_number},"
            with convert_format_errors(Path(location)):
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("image", ""), str):
                    raise UserError(f"{location} is not a JSON object with an image path as 'image'; correct the line")
                entry.setdefault("image", "")
                if isinstance(entry.get("file_name"), str):
                    entry["image"] = entry["file_name"]  # the image path in RefCOCO entries
                if in_split(entry["image"] or line, split, self.heldout_fraction):
                    _add_line(builder, entry, location)
        return builder.build(max_pixels)


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); give a UTF-8 file") from error
    if text.lstrip().startswith("["):
        rows = read_json(file)  # a JSON list of the same entries
        return [json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])]
    return [line for line in text.splitlines() if line.strip()]


def _add_line(builder: AnnotatedImagesBuilder, entry: dict, location: str) -> None:
    is_pope = "label" in entry and "text" in entry
    task = entry.get("task") or ("existence" if is_pope else "vqa")
    answers = entry.get("answers") or [entry.get("label" if is_pope else "answer")]
    boxes, question_boxes = (entry.get(key) or [] for key in ("boxes", "question_boxes"))
    texts = [answer for answer in answers if isinstance(answer, str) and answer.strip()]
    if not texts and not boxes:
        raise UserError(f"{location} has neither an answer nor boxes; add one of them")
    size = [float(entry.get(key) or 1) for key in ("width", "height")]
    image_index = builder.add_image(entry["image"], ImageInfo(entry["image"], *size, tuple(entry.get("tags") or ())))
    annotation = Annotation(
        image_index,
        tuple(texts),
        entry.get("text" if is_pope else "question") or "",
        entry.get("expression") or "",
        entry.get("kind") or entry.get("setting") or "",
        tuple(map(tuple, boxes)),
        tuple(map(tuple, question_boxes)),
    )
    builder.add_annotation(task, annotation)
