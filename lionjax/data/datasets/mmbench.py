# SPDX-License-Identifier: Apache-2.0
"""MMBench (arXiv 2307.06281) as published: a TSV of multiple-choice questions with the images in base64."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.delimited import read_delimited
from lionjax.data.datasets.question_file import (
    OPTION_LETTERS,
    Question,
    QuestionFile,
    choice_annotation,
    required_text,
    row_id,
)

ROTATION = 1_000_000  # row INDEX + k * ROTATION is the k-th rotation of the options of question INDEX
MISSING = ("", "nan")  # cells of options that a question does not have


@dataclass(frozen=True)
class MmBench(QuestionFile):
    """MMBench's rows as task `choice`, kinds the category; also the circular files, with all rotations of the options.

    The image of a rotation is the index of the row that holds it. `facts` has the question's own index ("question_id"),
    the finer and coarser category and the row's other cells.
    """

    name: str = "mmbench"
    TASK = "choice"

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        path = Path(self.file)
        columns, rows = read_delimited(path, "\t")
        if not {"index", "question", "A"} <= set(columns):
            raise UserError(f"{path} has no columns index, question and A; give MMBench's TSV")
        yield from rows

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        index, question = row_id(row, "index", location), required_text(row, "question", location)
        cells = [row.get(letter, "") for letter in OPTION_LETTERS if letter in row]
        length = next((k for k, cell in enumerate(cells) if cell in MISSING), len(cells))
        target = OPTION_LETTERS.find(row.get("answer") or " ")
        if length < 2 or target >= length or not index.isdecimal():
            raise UserError(
                f"{location} has {length} options, answer {row.get('answer')!r}, index {index!r}; correct it"
            )
        hint = "" if row.get("hint") in MISSING else row.get("hint") or ""
        number = image_index(row.get("image") or index, location)
        l2 = row.get("l2-category") or ""
        facts = {"question_id": str(int(index) % ROTATION), "l2": l2, "split": row.get("split") or ""}
        fields = {"kind": row.get("category") or "", "facts": facts}
        options, right = cells[:length], None if target < 0 else target
        annotation = choice_annotation(index, question, options, right, hint, **fields)
        yield Question("choice", f"{number or index}.jpg", annotation)

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        opened, cells = super().open(split, max_pixels), {}
        for location, row in self.rows(split):
            if isinstance(row, dict) and (row.get("image") or "") not in MISSING and not row["image"].isdecimal():
                with contextlib.suppress(UserError):  # such a row is a bad one already
                    image_index(row["image"], location)
                    cells[f"{row['index']}.jpg"] = row["image"]
        names = enumerate(info.name for info in opened.image_infos)
        embedded = {number: base64.b64decode(cells[name]) for number, name in names if name in cells}
        return replace(opened, embedded=embedded)


def image_index(cell: str, location: str) -> str:
    """The index of the row that holds the image, or "" where this cell is the image.

    Raises UserError for a cell that is neither an index nor base64.
    """
    if cell.isdecimal():
        return cell
    try:
        base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{location} has an image that is no base64 ({error}); download the file again") from error
    return ""
