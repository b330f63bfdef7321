# SPDX-License-Identifier: Apache-2.0
"""What a language model that sees no image is told of it: captions, and objects with boxes, in LLaVA's form.

A file has JSON Lines {"id", "image", "captions": [...], "instances": [{"category", "bbox": [x0, y0, x1, y1]}]} with
boxes in 0..1, or, as LLaVA-Bench's, {"id", "image", "caption"}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lionjax.core.errors import UserError
from lionjax.data.boxes import Box
from lionjax.data.datasets.annotation_files import read_all_rows


@dataclass(frozen=True)
class ImageContext:
    """Captions of an image, and the names and boxes (x0 y0 x1 y1 in 0..1) of its objects in the file's order."""

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[tuple[str, Box], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row of a file."""
        instances = [{"category": name, "bbox": list(box)} for name, box in self.instances]
        return {"id": self.id, "image": self.image, "captions": list(self.captions), "instances": instances}


def read_contexts(path: Path, needs_captions: bool = True) -> list[ImageContext]:
    """The rows of a file, gzipped or not. Raises UserError for a missing file, and for a row that is not of the form.

    `needs_captions`: a row without a caption is not of the form.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give JSON Lines of id, image, captions and instances")
    rows = read_all_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows; give JSON Lines of id, image, captions and instances")
    contexts = [_to_context(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    if needs_captions:
        for number, context in enumerate(contexts, 1):
            if not any(context.captions):
                raise UserError(f"{path}: row {number} has no captions; give a list of texts")
    return contexts


def _to_context(row: Any, where: str) -> ImageContext:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise UserError(f"{where} has no image; give an object with id, image, captions and instances")
    captions = row.get("captions", row.get("caption")) or []
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where} has captions that are no texts; give a list of texts")
    instances = row.get("instances", [])
    if not isinstance(instances, list):
        raise UserError(f"{where} has instances that are no list; give category and bbox of each")
    pairs = tuple(_to_instance(one, where) for one in instances)
    name = row["image"] if row.get("id") is None else row["id"]
    if not isinstance(name, str | int | float):
        raise UserError(f"{where} has the id {name!r:.60}; give a text or a number")
    return ImageContext(str(name), row["image"], tuple(map(str.strip, captions)), pairs)


def _to_instance(one: Any, where: str) -> tuple[str, Box]:
    box = one.get("bbox") if isinstance(one, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not isinstance(one.get("category"), str):
        raise UserError(f"{where} has an instance without category and bbox; give both")
    is_number = [isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box]
    if not all(is_number) or not all(math.isfinite(edge) and 0 <= edge <= 1 for edge in box):
        raise UserError(f"{where} has the box {box!r:.80}; give x0, y0, x1, y1 in 0..1")
    if box[0] > box[2] or box[1] > box[3]:
        raise UserError(f"{where} has the box {box}, whose end is before its start; give x0, y0, x1, y1")
    return " ".join(one["category"].split()), tuple(map(float, box))  # a line break would begin another object


def format_context(context: ImageContext, with_boxes: bool = True) -> str:
    """The captions, one a line, and below an empty line the objects, one a line: `name: [x0, y0, x1, y1]`.

    Numbers have at most three decimals, as Python prints a rounded float.
    """
    lines = [f"{name}: {[round(edge, 3) for edge in box]}" for name, box in context.instances if with_boxes]
    return "\n".join([*context.captions, *(["", *lines] if lines else [])])


def by_image(contexts: Iterable[ImageContext], images: Sequence[str], where: Path) -> list[ImageContext]:
    """The context of each image name. Raises UserError for an image without one."""
    known = {context.image: context for context in contexts}
    if missing := [name for name in images if name not in known]:
        raise UserError(f"{where} has nothing about the image {missing[0]!r}; give a file with all images")
    return [known[name] for name in images]
