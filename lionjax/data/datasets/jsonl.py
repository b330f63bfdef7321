# SPDX-License-Identifier: Apache-2.0
"""JSON Lines with one annotated image or question per line (see docs/index.md for the keys)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, convert_format_errors, in_split, read_json


@renamed_fields(images="image_dir", share="heldout_fraction")
@dataclass(frozen=True)
class JsonLines:
    """Lines of JSON: {"image", "question", "answer" or "answers", "task", "kind", "expression", "boxes",
    "question_boxes", "tags", "width", "height"}; only an answer or boxes are needed. A line without an image is text
    alone, such as an instruction that mPLUG-Owl's second stage mixes in.

    A "file_name" goes before the image. Without a question a wording is drawn for the task. Boxes are fractions, or
    pixels where width and height stand. POPE's "text" and "label" are read as existence.
    """

    file: str
    image_dir: str
    heldout_fraction: float = 0.0
    name: str = "lines"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file, reader = Path(self.file), AnnotatedImagesBuilder(Path(self.image_dir))
        for number, line in enumerate(_read_lines(file), 1):
            where = f"{file}, line {number},"
            with convert_format_errors(Path(where)):
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("image", ""), str):
                    raise UserError(f"{where} is no object with a picture's path as its 'image'")
                entry.setdefault("image", "")
                if isinstance(entry.get("file_name"), str):
                    entry["image"] = entry["file_name"]  # as RefCOCO rows say where their picture lies
                if in_split(entry["image"] or line, split, self.heldout_fraction):
                    _add_line(reader, entry, where)
        return reader.build(max_pixels)


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error})") from error
    if text.lstrip().startswith("["):
        rows = read_json(file)  # the same entries as one JSON list
        return [json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])]
    return [line for line in text.splitlines() if line.strip()]


def _add_line(builder: AnnotatedImagesBuilder, entry: dict, location: str) -> None:
    pope = "label" in entry and "text" in entry
    task = entry.get("task") or ("existence" if pope else "vqa")
    answers = entry.get("answers") or [entry.get("label" if pope else "answer")]
    boxes, asked = (entry.get(key) or [] for key in ("boxes", "question_boxes"))
    texts = [answer for answer in answers if isinstance(answer, str) and answer.strip()]
    if not texts and not boxes:
        raise UserError(f"{location} has neither an answer nor boxes")
    size = [float(entry.get(key) or 1) for key in ("width", "height")]
    number = builder.add_image(entry["image"], ImageInfo(entry["image"], *size, tuple(entry.get("tags") or ())))
    row = Annotation(
        number,
        tuple(texts),
        entry.get("text" if pope else "question") or "",
        entry.get("expression") or "",
        entry.get("kind") or entry.get("setting") or "",
        tuple(map(tuple, boxes)),
        tuple(map(tuple, asked)),
    )
    builder.add_annotation(task, row)
