# SPDX-License-Identifier: Apache-2.0
"""ReasonSeg (LISA, arXiv 2308.00692) as published: {train,val,test}/NAME.jpg with NAME.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lionjax.core.types import UserError
from lionjax.data.boxes import box_around
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.question_file import Question, QuestionFile
from lionjax.data.images import ALLOWED_FORMATS
from lionjax.data.rle import encode_rle

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val",), "heldout": ("test", "val")}
TARGET, IGNORE = 1, 255
FLAG, IGNORE_LABEL, MIN_CORNERS = "flag", "ignore", 3  # a flag marks an image, not a region
MASK_PROMPT = "{text} Please output segmentation mask."  # of a sentence, as LISA asks


@dataclass(frozen=True)
class ReasonSeg(QuestionFile):
    """A folder (`file`) of ReasonSeg in its own splits as task `res`; kinds are "long" (a sentence) and "short".

    Split "heldout" is test, or val where there is no test. Pixels that the annotators left open are
    `facts["ignore"]`, in COCO's run lengths, and no part of the mask. An id is the file's name and the query's number.
    """

    name: str = "reason_seg"
    TASK = "res"
    OWN_SPLITS = True

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        folders = [Path(self.file) / name for name in SPLIT_FOLDERS[split]]
        folder = next(filter(Path.is_dir, folders), folders[0])
        for path in sorted(folder.glob("*.json")):
            try:
                row = json.loads(_decode(path.read_bytes()))
                yield str(path), {**row, "path": path, "folder": folder.name} if isinstance(row, dict) else row
            except (OSError, ValueError) as error:
                yield str(path), UserError(f"{path} cannot be read as JSON ({error}); replace it")

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        texts, shapes = typed_rows.texts(row, "text", location), row.get("shapes")
        if not texts or not isinstance(shapes, list):
            raise UserError(f"{location} has no 'text' or no 'shapes'; add them")
        image = row["path"].with_suffix(".jpg")
        labels_HW = draw_labels(shapes, image_size(image), location)
        kind = "long" if row.get("is_sentence") else "short"
        facts = {"ignore": encode_rle(labels_HW == IGNORE)}
        target_HW = labels_HW == TARGET
        mask, box = encode_rle(target_HW), box_around(target_HW)
        fields = {"kind": kind, "facts": facts}
        if box is not None:
            width, height = labels_HW.shape[::-1]
            fields["boxes"] = ((box[0] * width, box[1] * height, box[2] * width, box[3] * height),)
        for number, text in enumerate(texts):
            question_id = image.stem if len(texts) == 1 else f"{image.stem}/{number}"
            question = MASK_PROMPT.format(text=text) if kind == "long" else ""
            annotation = Annotation(0, question=question, words=text, question_id=question_id, **fields)
            yield Question("res", f"{row['folder']}/{image.name}", annotation, True, mask)


def _decode(data: bytes) -> str:
    """The text of a file in UTF-8, or else in the code page 1252, in which some of the released files are."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252")


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file by its header. Raises UserError if it cannot be read."""
    try:
        with Image.open(path, formats=ALLOWED_FORMATS) as image:
            return image.size
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); add or replace it") from error


def draw_labels(shapes: Sequence[dict], size: tuple[int, int], location: str) -> np.ndarray:
    """uint8 (height, width): 1 in target regions, 255 in ignored ones, else 0; `size` is (width, height).

    As LISA's code: a "flag" is no region, a label that contains "ignore" is ignored, any other is a target, and the
    largest region is drawn first, so that a smaller one stays visible. Raises UserError for less than three corners.
    """
    masks = []
    for shape in shapes:
        label = str(shape["label"]).lower()
        if label == FLAG:
            continue
        # Integer pixels, without the fraction, as where LISA draws.
        corners = [tuple(int(float(number)) for number in point) for point in shape["points"]]
        if len(corners) < MIN_CORNERS:
            raise UserError(f"{location} has a polygon with {len(corners)} corners; give at least three")
        masks.append((fill_polygon(corners, size), IGNORE if IGNORE_LABEL in label else TARGET))
    labels_HW = np.zeros(size[::-1], np.uint8)
    for mask_HW, value in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        labels_HW[mask_HW] = value
    return labels_HW


def fill_polygon(corners: Sequence[tuple[int, int]], size: tuple[int, int]) -> np.ndarray:
    """bool (height, width): the inside of a polygon and its outline, which belongs to it.

    Drawn by OpenCV, as in LISA, if it is installed (`pip install lionjax[opencv]`). Pillow's outline differs from it by
    at most one pixel.
    """
    try:
        import cv2
    except ImportError:
        canvas = Image.new("1", size)
        ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
        return np.asarray(canvas)
    canvas_HW, points = np.zeros(size[::-1], np.uint8), np.array([corners], np.int32)
    cv2.polylines(canvas_HW, points, True, 1, 1)
    cv2.fillPoly(canvas_HW, points, 1)
    return canvas_HW.astype(bool)
