# SPDX-License-Identifier: Apache-2.0
"""Annotated images: a list of images, and for each task a list of annotations that refer to an image by index.

All readers of annotation formats return `AnnotatedImages`. An annotation has a question and answers, or only labels,
for which a question template is drawn. Boxes are kept in the annotator's units and validated when an example is made.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import images, templates
from lionjax.data.datasets.segmentations import region_masks
from lionjax.data.scenes.tasks import TASK_CATEGORY, Box, Example, box_to_text

PIXEL_TOLERANCE = 1.0
MIN_SIDE_OF_PIXELS = 8  # an image of fewer pixels may have a box of one pixel
BOXES_MARK = "<boxes>"  # where a text has its boxes (Shikra, NExT-Chat)
QUESTION_TEMPLATES = {
    "caption": templates.CAPTION,
    "grounded": templates.GROUNDED_CAPTION,
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
    """An image file under the root. `width`, `height`: the units of its boxes: pixels, or 1 for fractions.

    `in_pixels`: boxes are in pixels of the file, whose size is read with the image. `padded_boxes`: boxes in the texts
    are fractions of the image padded to a square (LLaVA-1.5), else of the image. An empty `name` means that there
    is no image: the example is text-only, with a blank image. Raises UserError for a size of 0 or less.
    """

    name: str
    width: float = 1.0
    height: float = 1.0
    tags: tuple[str, ...] = ()
    in_pixels: bool = False
    padded_boxes: bool = False

    def __post_init__(self):
        if not (self.width > 0 and self.height > 0):
            raise UserError(
                f"{self.name} has the annotated size {self.width} x {self.height}; give a width and a height above 0"
            )


@dataclass(frozen=True)
class Annotation:
    """One question, or the labels for one, about one image. `photo`: index of the image.

    `words`: a noun or referring expression that fills a template if `question` is empty. `boxes` are in the answer and
    `question_boxes` in the question, as (x0, y0, x1, y1) in the image's units. `regions`: indices of `segmentations`.
    `turns`: earlier (question, answer) rounds of a conversation. `image_marks`: the images stand where question and
    turns have `<image>`; the first is that of `photo`, the others are `more_images` (indices). A text with `<boxes>`
    gets its boxes in digits there: question and turns the `question_boxes`, answers the `boxes`, in order.
    `question_id`: the id that the files of its benchmark have. `choices`: the options, or candidate answers, in order.
    `facts`: what only the scorer of its benchmark reads, as JSON values.
    `problem`: why the row cannot be used; its example raises it.
    """

    photo: int
    answers: tuple[str, ...] = ()
    question: str = ""
    words: str = ""
    kind: str = ""
    boxes: tuple[Box, ...] = ()
    question_boxes: tuple[Box, ...] = ()
    regions: tuple[int, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    image_marks: bool = False
    more_images: tuple[int, ...] = ()
    question_id: str = ""
    choices: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass
class AnnotatedImages:
    """Images under one folder, and annotations by task. `segmentations`: COCO polygons or run lengths, for masks.

    `embedded`: {image index: bytes of its file}, for images that the annotation file itself holds; see `HeldImages`.
    """

    root: Path
    image_infos: list[ImageInfo]
    annotations: dict[str, list[Annotation]]
    segmentations: list = field(default_factory=list)
    max_pixels: int = images.MAX_PIXELS
    embedded: Mapping[int, bytes] = field(default_factory=dict)
    has_splits: ClassVar[bool] = True

    def __post_init__(self):
        self.annotations = {task: rows for task, rows in self.annotations.items() if rows}
        self.tag_vocabulary = tuple(sorted({tag for image_info in self.image_infos for tag in image_info.tags}))

    @property
    def task_sizes(self) -> dict[str, int]:
        """Number of examples of each task."""
        return {task: len(rows) for task, rows in self.annotations.items()}

    def record_index(self, task: str, index: int) -> int:
        """Index of the image of an example."""
        return self.annotations[task][index].photo

    def __len__(self) -> int:
        return len(self.image_infos)

    def row_problems(self) -> Iterator[str]:
        """Why rows of the annotation file cannot be used, in their order by task."""
        return (row.problem for rows in self.annotations.values() for row in rows if row.problem)

    def record_name(self, record_index: int) -> str:
        return self.image_infos[record_index].name or images.NO_IMAGE_NAME

    def image_path(self, record_index: int) -> Path:
        """The path of an image file. Raises UserError if it is outside the root."""
        return images.safe_path(self.root, self.image_infos[record_index].name)

    def image_place(self, record_index: int) -> Hashable:
        """What tells an image from those of other data sets: its path, or its place in the file that holds it."""
        if isinstance(self.embedded, HeldImages) and record_index in self.embedded:
            file, *place = self.embedded.places[record_index]
            return str(Path(file).resolve()), *place
        return str((self.root / self.image_infos[record_index].name).resolve())

    def image_file(self, record_index: int) -> bytes:
        """The bytes of an image file. Raises UserError if it is outside the root, and OSError if it is missing."""
        if record_index in self.embedded:
            return self.embedded[record_index]
        return self.image_path(record_index).read_bytes()

    def load_record(self, record_index: int) -> tuple[Image.Image, ImageInfo]:
        """(image, its info). Raises UserError for an unreadable image and for a wrong size."""
        image_info = self.image_infos[record_index]
        if not image_info.name:
            return Image.new("RGB", (1, 1)), image_info
        file = self.embedded[record_index] if record_index in self.embedded else self.image_path(record_index)
        image = images.open_image(file, image_info.name, self.max_pixels)
        check_image_size(image, image_info)
        return image, with_file_size(image_info, image)

    def make_example(
        self, task: str, index: int, truth: ImageInfo, rng: np.random.Generator, tag_noise: float
    ) -> Example:
        """A text example; see the function `make_example`."""
        return make_example(task, self.annotations[task][index], truth, rng, tag_noise, self.tag_vocabulary)

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        """bool (K, height, width): masks of the segmentations with these indices, in the image's own pixels."""
        image_info = self.image_infos[record_index]
        return region_masks(self.segmentations, regions, (image_info.width, image_info.height), image_info.name)

    def load_regions(self, record_index: int) -> None:
        """None: annotation files keep nothing of a refiner."""


class HeldImages(Mapping):
    """{image index: bytes of its file}, read when they are asked for: from `places` (file, ...) by `read_place`."""

    def __init__(self, places: Mapping[int, tuple], read_place: Callable[..., bytes]):
        self.places, self.read_place = places, read_place

    def __getitem__(self, index: int) -> bytes:
        return self.read_place(self.places[index])

    def __contains__(self, index: object) -> bool:
        return index in self.places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def check_image_size(image: Image.Image, image_info: ImageInfo) -> None:
    """Raises UserError if an image has another size than its annotations, as its boxes would then be wrong."""
    annotated_size = (image_info.width, image_info.height)
    if annotated_size != (1.0, 1.0) and image.size != annotated_size:
        width, height = image.size
        raise UserError(
            f"{image_info.name} is {width} x {height} but its annotations are for "
            f"{annotated_size[0]:g} x {annotated_size[1]:g}; "
            "use the image that was annotated"
        )


def with_file_size(image_info: ImageInfo, image: Image.Image) -> ImageInfo:
    """The image info with the image's size, if its boxes need it and no size was annotated."""
    if not (image_info.in_pixels or image_info.padded_boxes) or (image_info.width, image_info.height) != (1.0, 1.0):
        return image_info
    return replace(image_info, width=float(image.width), height=float(image.height))


def make_example(
    task: str,
    annotation: Annotation,
    image_info: ImageInfo,
    rng: np.random.Generator,
    tag_noise: float = 0.0,
    tag_vocabulary: tuple[str, ...] = (),
) -> Example:
    """A text example, with a drawn question template and one drawn answer.

    Raises UserError for a box outside the image or without area, for an empty question, and for an annotation with a
    problem.
    """
    if annotation.problem:
        raise UserError(annotation.problem)
    boxes, question_boxes = (
        _normalize_boxes(group, image_info) for group in (annotation.boxes, annotation.question_boxes)
    )
    answers = annotation.answers or (f"Answer: {''.join(map(box_to_text, boxes))}",)
    question = annotation.question or _question_from_template(task, annotation, question_boxes, rng)
    history, (question,) = fill_boxes(annotation.turns, (question,), question_boxes, image_info.name)
    _, answers = fill_boxes((), answers, boxes, image_info.name)
    if not question.strip():
        raise UserError(f"a {task} record of {image_info.name} has no question; add one")
    return Example(
        task=task,
        kind=annotation.kind or task,
        question=question,
        answer=answers[rng.integers(len(answers))],
        answers=answers,
        category=TASK_CATEGORY.get(task, "region_level" if boxes or question_boxes else "image_level"),
        question_boxes=question_boxes,
        boxes=boxes,
        targets=annotation.regions,
        history=history,
        image_marks=annotation.image_marks,
        more_records=annotation.more_images,
        padded_boxes=image_info.padded_boxes,
        tags=noisy_tags(image_info, tag_vocabulary, tag_noise),
        scene=image_info.name,
    )


def fill_boxes(
    turns: tuple[tuple[str, str], ...], texts: tuple[str, ...], boxes: tuple[Box, ...], name: str
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(turns, texts) with boxes in digits at their `<boxes>`, in order: first those of the turns, then of each text.

    `texts` are alternatives: each gets the boxes that the turns left. Texts without boxes are returned as they are.
    Raises UserError if a text has another number of `<boxes>` than there are boxes.
    """
    num_marks = sum(part.count(BOXES_MARK) for turn in turns for part in turn)
    counts = [num_marks + text.count(BOXES_MARK) for text in texts]
    if not boxes or not any(counts):
        return turns, texts
    if any(count != len(boxes) for count in counts):
        raise UserError(
            f"a text about {name} has {max(counts)} {BOXES_MARK} for {len(boxes)} boxes; give a box for each"
        )
    digits = [box_to_text(box) for box in boxes]

    def fill(text: str, remaining: Iterator[str]) -> str:
        return re.sub(BOXES_MARK, lambda _: next(remaining), text)

    remaining = iter(digits)
    filled_turns = tuple((fill(question, remaining), fill(answer, remaining)) for question, answer in turns)
    return filled_turns, tuple(fill(text, iter(digits[num_marks:])) for text in texts)


def _question_from_template(task: str, annotation: Annotation, question_boxes: tuple[Box, ...], rng) -> str:
    if task not in QUESTION_TEMPLATES:
        return ""
    placeholders = {
        "expr": annotation.words,
        "noun": annotation.words,
        "box": "".join(map(box_to_text, question_boxes)),
    }
    return templates.sample_question(QUESTION_TEMPLATES[task], rng, **placeholders)


def _normalize_boxes(boxes: tuple[Box, ...], image_info: ImageInfo) -> tuple[Box, ...]:
    size = (image_info.width, image_info.height)
    tolerance = PIXEL_TOLERANCE if size != (1.0, 1.0) else 1e-3
    for box in boxes if max(size) >= MIN_SIDE_OF_PIXELS else ():
        if max(box) <= 1 and min(box) >= 0:
            raise UserError(
                f"a box of {image_info.name}, {tuple(box)}, is in fractions, but the boxes of an image with width and "
                "height are in pixels; give all of them in pixels, or no width and height"
            )
    return tuple(images.normalize_box(box, size, tolerance, f"a box of {image_info.name},") for box in boxes)


def noisy_tags(image_info: ImageInfo, tag_vocabulary: tuple[str, ...], noise: float) -> tuple[str, ...]:
    """Tags of a simulated tagger: each tag is missing with probability `noise`, a quarter as many wrong ones are added.

    Deterministic for an image name and `noise`.
    """
    if not noise or not image_info.tags:
        return image_info.tags
    rng = np.random.default_rng(zlib.crc32(image_info.name.encode()))
    true_tags = [tag for tag in image_info.tags if rng.random() >= noise]
    absent_tags = [tag for tag in tag_vocabulary if tag not in image_info.tags]
    wrong_tags = rng.choice(
        absent_tags, min(len(absent_tags), rng.binomial(len(image_info.tags), noise / 4)), replace=False
    )
    # Sorted, so that the order does not reveal which tags are wrong.
    return tuple(sorted({*true_tags, *wrong_tags.tolist()}))
