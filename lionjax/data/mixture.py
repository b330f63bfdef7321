# SPDX-License-Identifier: Apache-2.0
"""Examples of all sources behind one config: as arrays to learn from, or in words with their picture to evaluate."""

from __future__ import annotations

import functools
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data import images, letterbox
from lionjax.data.boxes import CODECS, HINTS
from lionjax.data.chat import AS_ASKED, FORMS, Form
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import Opened, open_split
from lionjax.data.letterbox import Square
from lionjax.data.processor import Processor
from lionjax.data.scenes.tasks import Example, box_text, describe
from lionjax.data.scenes.world import Scene

log = logging.getLogger(__name__)

TRUTH_BYTES = 8192  # about what a scene's truth takes in memory
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One task of one source in a mixture: `size` examples, `weight` of the whole.

    `places`: how its boxes are written, where not as the processor does. `form`: see `turns.Form`. `shots`: so many
    other examples of it, each with its picture, stand in a row before the last one. `entry`: of the mixture.
    """

    source: int
    task: str
    size: int
    weight: float
    places: str = ""
    form: str = ""
    shots: int = 0
    entry: int = 0

    def hinted(self, example: Example) -> Example:
        """The example asked so that a model knows how to write its boxes."""
        if not self.places:
            return example
        return replace(example, question=f"{example.question} {HINTS[self.places]}")


class Records:
    """The opened sources of one split, with what is needed to make a row of any example. Pickles as its config."""

    def __init__(self, data: DataConfig, split: str):
        self.data, self.split = data, split
        self.processor = Processor(data.processor)
        self.opened: list[Opened] = [open_split(source, split, data.processor.max_pixels) for source in data.sources]
        # Numbers of records run through all sources, so that one number names one picture.
        self.offsets = np.cumsum([0, *map(len, self.opened)])
        self.kept: dict[int, tuple[np.ndarray, Any, Square]] = {}
        self.kept_large: dict[int, dict[str, np.ndarray]] = {}
        self.room = data.cache_mib * 2**20
        self.changing = data.crop != (1.0, 1.0) or data.flip

    def __reduce__(self):
        return Records, (self.data, self.split)

    def parts(self, name: str, weight: float = 1.0) -> list[Part]:
        """What a name in a mixture means: "vqa" of every source that has it, or "coco/vqa" of one.

        "rec@digits" writes its boxes in digits whatever the processor does; so with "bins" and "embeddings".
        "caption@plain" leaves the question out, "vqa@told" tells of a scene in words instead of showing it, and
        "vqa+2" has two other examples in each row before the last one.
        """
        whole, at, how = name.partition("@")
        if at and how not in (*CODECS, *FORMS):
            known = ", ".join((*CODECS, *FORMS))
            raise UserError(f"{name!r} is to be written as {how!r}; choose one of {known}")
        whole, plus, count = whole.partition("+")
        if plus and not count.isdigit():
            raise UserError(f"{name!r} wants a number of examples behind its plus, as in vqa+2")
        ways = {"places": how if how in CODECS else "", "form": how if how in FORMS else ""}
        ways["shots"] = int(count or 0)
        source, _, task = whole.rpartition("/")
        found = [
            (k, opened.sizes[task])
            for k, opened in enumerate(self.opened)
            if source in ("", self.data.sources[k].name) and task in opened.sizes
        ]
        if not found:
            has = {s.name: "|".join(o.sizes) for s, o in zip(self.data.sources, self.opened)}
            known = "; ".join(f"{source}/{tasks}" for source, tasks in has.items())
            raise UserError(f"no data source has the task {name!r}; there are {known}")
        if task == "res" and self.split == "train":
            found = [(k, max(1, round(size * self.data.mask_share))) for k, size in found]
        total = sum(size for _, size in found)
        return [Part(k, task, size, weight * size / total, **ways) for k, size in found]

    def name(self, record: int) -> str:
        """The name of a record by the number that stands in `Batch.record_B`."""
        k = int(np.searchsorted(self.offsets, record, side="right")) - 1
        return f"{self.data.sources[k].name}/{self.opened[k].name(record - int(self.offsets[k]))}"

    def seen(self, k: int, record: int) -> tuple[np.ndarray, Any, Square]:
        """A record's picture at the model's size, its truth and its square, kept in memory while there is room."""
        number = int(self.offsets[k]) + record
        if number not in self.kept:
            picture, truth = self.opened[k].read(record)
            pixels = self.processor.pixels(picture)
            square = self.processor.square(picture)
            size = pixels.nbytes + TRUTH_BYTES
            if size > self.room:
                return pixels, truth, square
            self.room -= size
            self.kept[number] = pixels, truth, square
        return self.kept[number]

    def row(self, part: Part, index: int, rng: np.random.Generator, masks: bool = False) -> dict[str, np.ndarray]:
        """One example as arrays, with masks if asked for. Raises UserError when its record is bad."""
        opened, data = self.opened[part.source], self.data
        record = opened.record(part.task, index)
        if self.changing:
            picture, truth = opened.read(record)
            example = opened.ask(part.task, index, truth, rng, data.tag_noise)
            example, window, mirrored = changed(example, truth, data, rng)
            square = self.processor.square(picture, window)
            pixels = self.processor.pixels(picture, window)
            pixels = pixels[:, ::-1] if mirrored else pixels
        else:
            pixels, truth, square = self.seen(part.source, record)
            example = opened.ask(part.task, index, truth, rng, data.tag_noise)
        example, form = part.hinted(example), form_of(part, truth)
        if part.form == "told":
            example = told(example, truth, rng)
        if part.shots:
            seen, turns = self.shots(part, index, rng)
            form, pixels = Form("", turns, True), self.processor.filled([*seen, pixels])
        else:
            pixels = self.processor.filled([pixels])
        untagged = rng.random() < data.tag_drop or part.task == "tags"  # or they would be the answer
        tags = () if untagged else example.tags
        words = (example.question, tags, example.answer, example.category)
        boxes = (*example.question_boxes, *example.boxes)
        how = part.places or None
        row = self.processor.row(pixels, *words, boxes, square, how, form)
        row["record"] = np.int32(self.offsets[part.source] + record)
        row["part"] = np.int32(part.entry)
        return row | self._masks(part, record, example) if masks else row

    def shots(
        self, part: Part, index: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], tuple[tuple[str, str], ...]]:
        """Pictures, and questions with answers, of other examples of a part."""
        opened, seen, turns = self.opened[part.source], [], []
        while len(turns) < part.shots:
            other = int(rng.integers(part.size))
            if other == index and part.size > 1:
                continue
            pixels, truth, _ = self.seen(part.source, opened.record(part.task, other))
            example = opened.ask(part.task, other, truth, rng, self.data.tag_noise)
            seen.append(pixels)
            turns.append((example.question, example.answer))
        return seen, tuple(turns)

    def _masks(self, part: Part, record: int, example: Example) -> dict[str, np.ndarray]:
        """The picture for SAM and, of an example that is answered by masks, those of its boxes."""
        number, side = int(self.offsets[part.source]) + record, self.processor.config.sam_size
        if number not in self.kept_large:
            made = self.processor.large(self.opened[part.source].read(record)[0])
            size = sum(array.nbytes for array in made.values())
            if size <= self.room:
                self.room -= size
                self.kept_large[number] = made
        large = self.kept_large.get(number) or made
        most, first = self.processor.config.boxes, len(example.question_boxes)
        mask_KHW, known_K = np.zeros((most, side, side), bool), np.zeros(most, np.int32)
        if part.task == "res":
            true = self.opened[part.source].masks(record, example.targets)[: most - first]
            for place, mask_HW in enumerate(true, first):
                mask_KHW[place], known_K[place] = letterbox.sam_mask(mask_HW, side), 1
        return large | {"masks": mask_KHW, "masks_mask": known_K}


def form_of(part: Part, truth: Any) -> Form:
    """How examples of a part are written; one without a picture in words alone."""
    return Form("told" if not getattr(truth, "name", "a scene") else part.form)


def told(example: Example, truth: Any, rng: np.random.Generator) -> Example:
    """The example with its scene in words before the question."""
    if not isinstance(truth, Scene):
        raise UserError("only scenes can be told in words; leave @told to them")
    return replace(example, question=f"{describe(truth, rng, boxes=False)}. {example.question}")


def open_records(data: DataConfig, split: str) -> Records:
    """The records of a split, opened once and shared by stages and evaluations while their files stand unchanged."""
    stamps = tuple(stamp for source in data.sources for stamp in _stamps(source))
    return _opened(data, split, stamps)


@functools.lru_cache(maxsize=2)
def _opened(data: DataConfig, split: str, stamps: tuple) -> Records:
    return Records(data, split)


def _stamps(source: Any) -> Iterator[tuple[str, int, int]]:
    """Path, time and size of every file and folder that a source's fields name, and of the files in its `folder`."""
    for field in fields(source):
        value = getattr(source, field.name)
        if not isinstance(value, str) or not value or not Path(value).exists():
            continue
        inside = Path(value).iterdir() if field.name == "folder" and Path(value).is_dir() else ()
        for path in (Path(value), *sorted(inside)):
            about = path.stat()
            yield str(path), about.st_mtime_ns, about.st_size


def changed(
    example: Example, truth: Any, data: DataConfig, rng: np.random.Generator
) -> tuple[Example, images.Box, bool]:
    """The example for a window of its photo, perhaps mirrored: its boxes moved, also where they stand in the text.

    Only captions and questions with boxes are cropped: others may ask about what a crop leaves out.
    """
    boxes = (*example.question_boxes, *example.boxes)
    photo = not isinstance(truth, Scene)
    crops = photo and data.crop != (1.0, 1.0) and (bool(boxes) or example.task == "caption")
    window = images.window_around(boxes, rng, data.crop) if crops else images.WHOLE
    texts = " ".join((example.question, *example.answers))
    mirrored = photo and data.flip and not SIDES.search(texts) and bool(rng.random() < 0.5)
    moved = {box: images.seen_from(box, window, mirrored) for box in boxes}
    places = {box_text(old): box_text(new) for old, new in moved.items()}
    question, answer = (
        re.sub(r"\[[\d.,]+\]", lambda found: places.get(found[0], found[0]), text)
        for text in (example.question, example.answer)
    )
    words = {"question": question, "answer": answer}
    asked, said = (tuple(moved[box] for box in group) for group in (example.question_boxes, example.boxes))
    return replace(example, question_boxes=asked, boxes=said, **words), window, mirrored


@dataclass(frozen=True)
class Sample:
    """One example to evaluate: in words, with its picture as the source has it and the masks of what is meant."""

    example: Example
    picture: Any
    record: int
    name: str
    opened: Opened
    place: int
    places: str = ""  # how its boxes are to be written, where not as the processor does
    form: Form = AS_ASKED

    def masks(self) -> np.ndarray:
        """(K, height, width) bool of the regions in `example.targets`."""
        return self.opened.masks(self.place, self.example.targets)


def examples(
    data: DataConfig, task: str, split: str = "heldout", limit: int | None = None, seed: int = 0
) -> Iterator[Sample]:
    """Examples of a task ("vqa", or "coco/vqa" of one source) in a fixed order that the seed draws; at most `limit`.

    Wordings are drawn by the seed and the example's own number, so a smaller limit asks the same questions. A bad
    record raises UserError, or is left out and said once where `data.on_bad_record` is "replace".
    """
    records = open_records(data, split)
    parts = records.parts(task)
    left_out: set[int] = set()
    pairs = [(part, index) for part in parts for index in range(part.size)]
    for number in np.random.default_rng([seed, 0]).permutation(len(pairs))[:limit]:
        part, index = pairs[number]
        opened = records.opened[part.source]
        place = opened.record(part.task, index)
        record = int(records.offsets[part.source]) + place
        if record in left_out:
            continue
        rng = np.random.default_rng([seed, 1, zlib.crc32(part.task.encode()), int(number)])
        try:
            picture, truth = opened.read(place)
            example = part.hinted(opened.ask(part.task, index, truth, rng, data.tag_noise))
            form = form_of(part, truth)
            if part.form == "told":
                example = told(example, truth, rng)
        except UserError as error:
            if data.on_bad_record == "raise":
                raise
            log.warning("left out: %s", error)
            left_out.add(record)
            continue
        yield Sample(example, picture, record, records.name(record), opened, place, part.places, form)
