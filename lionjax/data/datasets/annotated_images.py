# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures as two lists: the pictures, and for each task the rows that speak of one of them.

What every reader of an annotation format makes. A row says what is asked and answered, or only what is true, and
then a wording is drawn for it. Boxes stay as the annotator wrote them until a row is used: then they are checked.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import images, templates
from lionjax.data.scenes.tasks import CATEGORY, Box, Example, box_text

PIXEL_SLACK = 1.0
TEMPLATES = {
    "caption": templates.CAPTION,
    "existence": templates.EXISTENCE,
    "rec": templates.REC,
    "res": templates.RES,
    "reg": templates.REG,
    "tags": (
        "List the tags of the image.",
        "Which words describe what is in the image?",
        "What tags fit this picture?",
        "Name the kinds of things you see.",
    ),
}


@dataclass(frozen=True)
class Photo:
    """A picture by its path under the root. `width`, `height`: the unit of its boxes; 1 for fractions.

    Without a name there is no picture: what is asked then is words alone, beside a blank one.
    """

    name: str
    width: float = 1.0
    height: float = 1.0
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if not (self.width > 0 and self.height > 0):
            raise UserError(f"{self.name} is said to be {self.width} x {self.height}; correct its size")


@dataclass(frozen=True)
class Row:
    """What is asked of one picture. `photo` is its number.

    `words` fills a template where there is no `question`: a noun or an expression. `boxes` answer, `question_boxes`
    are asked about, both x0 y0 x1 y1 in the photo's unit. `regions` number the annotations whose masks are meant.
    """

    photo: int
    answers: tuple[str, ...] = ()
    question: str = ""
    words: str = ""
    kind: str = ""
    boxes: tuple[Box, ...] = ()
    question_boxes: tuple[Box, ...] = ()
    regions: tuple[int, ...] = ()


@dataclass
class Table:
    """Pictures under one folder, and rows by task. `outlines`: polygons or run lengths, for masks."""

    root: Path
    photos: list[Photo]
    rows: dict[str, list[Row]]
    outlines: list = field(default_factory=list)
    max_pixels: int = images.MAX_PIXELS

    def __post_init__(self):
        self.rows = {task: rows for task, rows in self.rows.items() if rows}
        self.vocabulary = tuple(sorted({tag for photo in self.photos for tag in photo.tags}))

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples there are of each task."""
        return {task: len(rows) for task, rows in self.rows.items()}

    def record(self, task: str, index: int) -> int:
        """The number of the picture that an example is about."""
        return self.rows[task][index].photo

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, record: int) -> str:
        return self.photos[record].name or "no picture"

    def path(self, record: int) -> Path:
        """The picture's file; UserError when it lies outside the root."""
        return images.safe_path(self.root, self.photos[record].name)

    def read(self, record: int) -> tuple[Image.Image, Photo]:
        """The picture, whose size must be the annotated one, and what is known of it."""
        photo = self.photos[record]
        if not photo.name:
            return Image.new("RGB", (1, 1)), photo
        picture = images.open_picture(self.path(record), photo.name, self.max_pixels)
        check_size(picture, photo)
        return picture, photo

    def ask(self, task: str, index: int, truth: Photo, rng: np.random.Generator, tag_noise: float) -> Example:
        """An example in words, with a wording and one of several answers drawn."""
        return ask(task, self.rows[task][index], truth, rng, tag_noise, self.vocabulary)

    def masks(self, record: int, regions: tuple[int, ...]) -> np.ndarray:
        """(K, height, width) bool of annotations by number, in the photo's own pixels."""
        photo = self.photos[record]
        size = (int(photo.height), int(photo.width))
        return np.stack([mask(self.outlines[region], size) for region in regions])


def check_size(picture: Image.Image, photo: Photo) -> None:
    """UserError when a picture is not as large as its annotations say: its boxes would be somewhere else."""
    said = (photo.width, photo.height)
    if said != (1.0, 1.0) and picture.size != said:
        width, height = picture.size
        raise UserError(
            f"{photo.name} is {width} x {height} but its annotations speak of {said[0]:g} x {said[1]:g}; "
            "bring the picture they were made for"
        )


def mask(outline, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of COCO polygons or run lengths."""
    from pycocotools import mask as runs

    height, width = size
    if isinstance(outline, list):
        coded = runs.merge(runs.frPyObjects(outline, height, width))
    elif isinstance(outline["counts"], list):
        coded = runs.frPyObjects(outline, height, width)
    else:
        coded = outline
    return runs.decode(coded).astype(bool)


def ask(
    task: str,
    row: Row,
    photo: Photo,
    rng: np.random.Generator,
    tag_noise: float = 0.0,
    vocabulary: tuple[str, ...] = (),
) -> Example:
    """A row in words. Raises UserError for a box outside the picture or without area, and for an empty row."""
    boxes, asked = (_fractions(group, photo) for group in (row.boxes, row.question_boxes))
    answers = row.answers or (f"Answer: {''.join(map(box_text, boxes))}",)
    question = row.question or _worded(task, row, asked, rng)
    if not question.strip():
        raise UserError(f"a {task} record of {photo.name} has no question; give it one")
    return Example(
        task=task,
        kind=row.kind or task,
        question=question,
        answer=answers[rng.integers(len(answers))],
        answers=answers,
        category=CATEGORY.get(task, "region_level" if boxes or asked else "image_level"),
        question_boxes=asked,
        boxes=boxes,
        targets=row.regions,
        tags=noisy(photo, vocabulary, tag_noise),
        scene=photo.name,
    )


def _worded(task: str, row: Row, asked: tuple[Box, ...], rng) -> str:
    if task not in TEMPLATES:
        return ""
    words = {"expr": row.words, "noun": row.words, "box": "".join(map(box_text, asked))}
    return templates.ask(TEMPLATES[task], rng, **words)


def _fractions(boxes: tuple[Box, ...], photo: Photo) -> tuple[Box, ...]:
    size = (photo.width, photo.height)
    slack = PIXEL_SLACK if size != (1.0, 1.0) else 1e-3
    return tuple(images.unit_box(box, size, slack, f"a box of {photo.name},") for box in boxes)


def noisy(photo: Photo, vocabulary: tuple[str, ...], noise: float) -> tuple[str, ...]:
    """Tags as a tagger says them: each missing with probability `noise`, and a quarter as many wrong ones.

    The same photo and noise give the same tags.
    """
    if not noise or not photo.tags:
        return photo.tags
    rng = np.random.default_rng(zlib.crc32(photo.name.encode()))
    kept = [tag for tag in photo.tags if rng.random() >= noise]
    false = [tag for tag in vocabulary if tag not in photo.tags]
    wrong = rng.choice(false, min(len(false), rng.binomial(len(photo.tags), noise / 4)), replace=False)
    # In alphabetic order, so that place does not tell right from wrong.
    return tuple(sorted({*kept, *wrong.tolist()}))
