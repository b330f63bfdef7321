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
from lionjax.data.scenes.tasks import TASK_CATEGORY, Box, Example, box_to_text

PIXEL_TOLERANCE = 1.0
QUESTION_TEMPLATES = {
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
class ImageInfo:
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
class Annotation:
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
class AnnotatedImages:
    """Pictures under one folder, and rows by task. `outlines`: polygons or run lengths, for masks."""

    root: Path
    image_infos: list[ImageInfo]
    annotations: dict[str, list[Annotation]]
    segmentations: list = field(default_factory=list)
    max_pixels: int = images.MAX_PIXELS

    def __post_init__(self):
        self.annotations = {task: rows for task, rows in self.annotations.items() if rows}
        self.tag_vocabulary = tuple(sorted({tag for photo in self.image_infos for tag in photo.tags}))

    @property
    def task_sizes(self) -> dict[str, int]:
        """How many examples there are of each task."""
        return {task: len(rows) for task, rows in self.annotations.items()}

    def record_index(self, task: str, index: int) -> int:
        """The number of the picture that an example is about."""
        return self.annotations[task][index].photo

    def __len__(self) -> int:
        return len(self.image_infos)

    def record_name(self, record_index: int) -> str:
        return self.image_infos[record_index].name or "no picture"

    def image_path(self, record_index: int) -> Path:
        """The picture's file; UserError when it lies outside the root."""
        return images.safe_path(self.root, self.image_infos[record_index].name)

    def load_record(self, record_index: int) -> tuple[Image.Image, ImageInfo]:
        """The picture, whose size must be the annotated one, and what is known of it."""
        photo = self.image_infos[record_index]
        if not photo.name:
            return Image.new("RGB", (1, 1)), photo
        picture = images.open_image(self.image_path(record_index), photo.name, self.max_pixels)
        check_image_size(picture, photo)
        return picture, photo

    def make_example(
        self, task: str, index: int, truth: ImageInfo, rng: np.random.Generator, tag_noise: float
    ) -> Example:
        """An example in words, with a wording and one of several answers drawn."""
        return make_example(task, self.annotations[task][index], truth, rng, tag_noise, self.tag_vocabulary)

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        """(K, height, width) bool of annotations by number, in the photo's own pixels."""
        photo = self.image_infos[record_index]
        size = (int(photo.height), int(photo.width))
        return np.stack([segmentation_to_mask(self.segmentations[region], size) for region in regions])


def check_image_size(image: Image.Image, image_info: ImageInfo) -> None:
    """UserError when a picture is not as large as its annotations say: its boxes would be somewhere else."""
    said = (image_info.width, image_info.height)
    if said != (1.0, 1.0) and image.size != said:
        width, height = image.size
        raise UserError(
            f"{image_info.name} is {width} x {height} but its annotations speak of {said[0]:g} x {said[1]:g}; "
            "bring the picture they were made for"
        )


def segmentation_to_mask(segmentation, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of COCO polygons or run lengths."""
    from pycocotools import mask as runs

    height, width = size
    if isinstance(segmentation, list):
        coded = runs.merge(runs.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        coded = runs.frPyObjects(segmentation, height, width)
    else:
        coded = segmentation
    return runs.decode(coded).astype(bool)


def make_example(
    task: str,
    annotation: Annotation,
    image_info: ImageInfo,
    rng: np.random.Generator,
    tag_noise: float = 0.0,
    tag_vocabulary: tuple[str, ...] = (),
) -> Example:
    """A row in words. Raises UserError for a box outside the picture or without area, and for an empty row."""
    boxes, asked = (_normalize_boxes(group, image_info) for group in (annotation.boxes, annotation.question_boxes))
    answers = annotation.answers or (f"Answer: {''.join(map(box_to_text, boxes))}",)
    question = annotation.question or _question_from_template(task, annotation, asked, rng)
    if not question.strip():
        raise UserError(f"a {task} record of {image_info.name} has no question; give it one")
    return Example(
        task=task,
        kind=annotation.kind or task,
        question=question,
        answer=answers[rng.integers(len(answers))],
        answers=answers,
        category=TASK_CATEGORY.get(task, "region_level" if boxes or asked else "image_level"),
        question_boxes=asked,
        boxes=boxes,
        targets=annotation.regions,
        tags=noisy_tags(image_info, tag_vocabulary, tag_noise),
        scene=image_info.name,
    )


def _question_from_template(task: str, annotation: Annotation, question_boxes: tuple[Box, ...], rng) -> str:
    if task not in QUESTION_TEMPLATES:
        return ""
    words = {"expr": annotation.words, "noun": annotation.words, "box": "".join(map(box_to_text, question_boxes))}
    return templates.sample_question(QUESTION_TEMPLATES[task], rng, **words)


def _normalize_boxes(boxes: tuple[Box, ...], image_info: ImageInfo) -> tuple[Box, ...]:
    size = (image_info.width, image_info.height)
    slack = PIXEL_TOLERANCE if size != (1.0, 1.0) else 1e-3
    return tuple(images.normalize_box(box, size, slack, f"a box of {image_info.name},") for box in boxes)


def noisy_tags(image_info: ImageInfo, tag_vocabulary: tuple[str, ...], noise: float) -> tuple[str, ...]:
    """Tags as a tagger says them: each missing with probability `noise`, and a quarter as many wrong ones.

    The same photo and noise give the same tags.
    """
    if not noise or not image_info.tags:
        return image_info.tags
    rng = np.random.default_rng(zlib.crc32(image_info.name.encode()))
    kept = [tag for tag in image_info.tags if rng.random() >= noise]
    false = [tag for tag in tag_vocabulary if tag not in image_info.tags]
    wrong = rng.choice(false, min(len(false), rng.binomial(len(image_info.tags), noise / 4)), replace=False)
    # In alphabetic order, so that place does not tell right from wrong.
    return tuple(sorted({*kept, *wrong.tolist()}))
