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
from lionjax.data.boxes import BOX_FORMAT_HINTS, BOX_FORMATS
from lionjax.data.chat import DEFAULT_FORMAT, TEMPLATE_KINDS, PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import OpenDataset, open_split
from lionjax.data.letterbox import Letterbox
from lionjax.data.processor import Processor
from lionjax.data.scenes.tasks import Example, box_to_text, scene_to_text
from lionjax.data.scenes.world import Scene

log = logging.getLogger(__name__)

TRUTH_CACHE_BYTES = 8192  # about what a scene's truth takes in memory
LEFT_RIGHT_PATTERN = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class MixtureComponent:
    """One task of one source in a mixture: `size` examples, `weight` of the whole.

    `places`: how its boxes are written, where not as the processor does. `form`: see `turns.Form`. `shots`: so many
    other examples of it, each with its picture, stand in a row before the last one. `entry`: of the mixture.
    """

    source_index: int
    task: str
    num_examples: int
    weight: float
    box_format: str = ""
    template: str = ""
    shots: int = 0
    mixture_index: int = 0

    def add_format_hint(self, example: Example) -> Example:
        """The example asked so that a model knows how to write its boxes."""
        if not self.box_format:
            return example
        return replace(example, question=f"{example.question} {BOX_FORMAT_HINTS[self.box_format]}")


class MixtureDataset:
    """The opened sources of one split, with what is needed to make a row of any example. Pickles as its config."""

    def __init__(self, data: DataConfig, split: str):
        self.data, self.split = data, split
        self.processor = Processor(data.processor)
        self.datasets: list[OpenDataset] = [
            open_split(source, split, data.processor.max_pixels) for source in data.sources
        ]
        # Numbers of records run through all sources, so that one number names one picture.
        self.record_offsets = np.cumsum([0, *map(len, self.datasets)])
        self.image_cache: dict[int, tuple[np.ndarray, Any, Letterbox]] = {}
        self.sam_image_cache: dict[int, dict[str, np.ndarray]] = {}
        self.free_cache_bytes = data.image_cache_mib * 2**20
        self.random_augmentation = data.crop_scale != (1.0, 1.0) or data.hflip

    def __reduce__(self):
        return MixtureDataset, (self.data, self.split)

    def components(self, name: str, weight: float = 1.0) -> list[MixtureComponent]:
        """What a name in a mixture means: "vqa" of every source that has it, or "coco/vqa" of one.

        "rec@digits" writes its boxes in digits whatever the processor does; so with "bins" and "embeddings".
        "caption@plain" leaves the question out, "vqa@told" tells of a scene in words instead of showing it, and
        "vqa+2" has two other examples in each row before the last one.
        """
        whole, at, how = name.partition("@")
        if at and how not in (*BOX_FORMATS, *TEMPLATE_KINDS):
            known = ", ".join((*BOX_FORMATS, *TEMPLATE_KINDS))
            raise UserError(f"{name!r} is to be written as {how!r}; choose one of {known}")
        whole, plus, count = whole.partition("+")
        if plus and not count.isdigit():
            raise UserError(f"{name!r} wants a number of examples behind its plus, as in vqa+2")
        ways = {"box_format": how if how in BOX_FORMATS else "", "template": how if how in TEMPLATE_KINDS else ""}
        ways["shots"] = int(count or 0)
        source, _, task = whole.rpartition("/")
        found = [
            (k, opened.task_sizes[task])
            for k, opened in enumerate(self.datasets)
            if source in ("", self.data.sources[k].name) and task in opened.task_sizes
        ]
        if not found:
            has = {s.name: "|".join(o.task_sizes) for s, o in zip(self.data.sources, self.datasets)}
            known = "; ".join(f"{source}/{tasks}" for source, tasks in has.items())
            raise UserError(f"no data source has the task {name!r}; there are {known}")
        if task == "res" and self.split == "train":
            found = [(k, max(1, round(size * self.data.mask_fraction))) for k, size in found]
        total = sum(size for _, size in found)
        return [MixtureComponent(k, task, size, weight * size / total, **ways) for k, size in found]

    def record_name(self, record_id: int) -> str:
        """The name of a record by the number that stands in `Batch.record_B`."""
        k = int(np.searchsorted(self.record_offsets, record_id, side="right")) - 1
        return f"{self.data.sources[k].name}/{self.datasets[k].record_name(record_id - int(self.record_offsets[k]))}"

    def load_cached(self, source_index: int, record_index: int) -> tuple[np.ndarray, Any, Letterbox]:
        """A record's picture at the model's size, its truth and its square, kept in memory while there is room."""
        number = int(self.record_offsets[source_index]) + record_index
        if number not in self.image_cache:
            picture, truth = self.datasets[source_index].load_record(record_index)
            pixels = self.processor.load_pixels(picture)
            square = self.processor.get_letterbox(picture)
            size = pixels.nbytes + TRUTH_CACHE_BYTES
            if size > self.free_cache_bytes:
                return pixels, truth, square
            self.free_cache_bytes -= size
            self.image_cache[number] = pixels, truth, square
        return self.image_cache[number]

    def encode_example(
        self, component: MixtureComponent, index: int, rng: np.random.Generator, with_masks: bool = False
    ) -> dict[str, np.ndarray]:
        """One example as arrays, with masks if asked for. Raises UserError when its record is bad."""
        opened, data = self.datasets[component.source_index], self.data
        record = opened.record_index(component.task, index)
        if self.random_augmentation:
            picture, truth = opened.load_record(record)
            example = opened.make_example(component.task, index, truth, rng, data.tag_noise)
            example, window, mirrored = augment(example, truth, data, rng)
            square = self.processor.get_letterbox(picture, window)
            pixels = self.processor.load_pixels(picture, window)
            pixels = pixels[:, ::-1] if mirrored else pixels
        else:
            pixels, truth, square = self.load_cached(component.source_index, record)
            example = opened.make_example(component.task, index, truth, rng, data.tag_noise)
        example, form = component.add_format_hint(example), prompt_format_for(component, truth)
        if component.template == "told":
            example = prepend_scene_text(example, truth, rng)
        if component.shots:
            seen, turns = self.sample_shots(component, index, rng)
            form, pixels = PromptFormat("", turns, True), self.processor.stack_images([*seen, pixels])
        else:
            pixels = self.processor.stack_images([pixels])
        untagged = rng.random() < data.tag_dropout or component.task == "tags"  # or they would be the answer
        tags = () if untagged else example.tags
        words = (example.question, tags, example.answer, example.category)
        boxes = (*example.question_boxes, *example.boxes)
        how = component.box_format or None
        row = self.processor.encode_example(pixels, *words, boxes, square, how, form)
        row["record"] = np.int32(self.record_offsets[component.source_index] + record)
        row["part"] = np.int32(component.mixture_index)
        return row | self._encode_masks(component, record, example) if with_masks else row

    def sample_shots(
        self, component: MixtureComponent, index: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], tuple[tuple[str, str], ...]]:
        """Pictures, and questions with answers, of other examples of a part."""
        opened, seen, turns = self.datasets[component.source_index], [], []
        while len(turns) < component.shots:
            other = int(rng.integers(component.num_examples))
            if other == index and component.num_examples > 1:
                continue
            pixels, truth, _ = self.load_cached(component.source_index, opened.record_index(component.task, other))
            example = opened.make_example(component.task, other, truth, rng, self.data.tag_noise)
            seen.append(pixels)
            turns.append((example.question, example.answer))
        return seen, tuple(turns)

    def _encode_masks(self, component: MixtureComponent, record_index: int, example: Example) -> dict[str, np.ndarray]:
        """The picture for SAM and, of an example that is answered by masks, those of its boxes."""
        number, side = (
            int(self.record_offsets[component.source_index]) + record_index,
            self.processor.config.sam_image_size,
        )
        if number not in self.sam_image_cache:
            made = self.processor.load_sam_pixels(self.datasets[component.source_index].load_record(record_index)[0])
            size = sum(array.nbytes for array in made.values())
            if size <= self.free_cache_bytes:
                self.free_cache_bytes -= size
                self.sam_image_cache[number] = made
        large = self.sam_image_cache.get(number) or made
        most, first = self.processor.config.max_boxes, len(example.question_boxes)
        mask_KHW, known_K = np.zeros((most, side, side), bool), np.zeros(most, np.int32)
        if component.task == "res":
            true = self.datasets[component.source_index].masks(record_index, example.targets)[: most - first]
            for place, mask_HW in enumerate(true, first):
                mask_KHW[place], known_K[place] = letterbox.letterbox_mask(mask_HW, side), 1
        return large | {"masks": mask_KHW, "masks_mask": known_K}


def prompt_format_for(component: MixtureComponent, truth: Any) -> PromptFormat:
    """How examples of a part are written; one without a picture in words alone."""
    return PromptFormat("told" if not getattr(truth, "name", "a scene") else component.template)


def prepend_scene_text(example: Example, truth: Any, rng: np.random.Generator) -> Example:
    """The example with its scene in words before the question."""
    if not isinstance(truth, Scene):
        raise UserError("only scenes can be told in words; leave @told to them")
    return replace(example, question=f"{scene_to_text(truth, rng, with_boxes=False)}. {example.question}")


def open_mixture(data: DataConfig, split: str) -> MixtureDataset:
    """The records of a split, opened once and shared by stages and evaluations while their files stand unchanged."""
    stamps = tuple(stamp for source in data.sources for stamp in _file_stamps(source))
    return _open_mixture_cached(data, split, stamps)


@functools.lru_cache(maxsize=2)
def _open_mixture_cached(data: DataConfig, split: str, stamps: tuple) -> MixtureDataset:
    return MixtureDataset(data, split)


def _file_stamps(source: Any) -> Iterator[tuple[str, int, int]]:
    """Path, time and size of every file and folder that a source's fields name, and of the files in its `folder`."""
    for field in fields(source):
        value = getattr(source, field.name)
        if not isinstance(value, str) or not value or not Path(value).exists():
            continue
        inside = Path(value).iterdir() if field.name == "folder" and Path(value).is_dir() else ()
        for path in (Path(value), *sorted(inside)):
            about = path.stat()
            yield str(path), about.st_mtime_ns, about.st_size


def augment(
    example: Example, truth: Any, data: DataConfig, rng: np.random.Generator
) -> tuple[Example, images.Box, bool]:
    """The example for a window of its photo, perhaps mirrored: its boxes moved, also where they stand in the text.

    Only captions and questions with boxes are cropped: others may ask about what a crop leaves out.
    """
    boxes = (*example.question_boxes, *example.boxes)
    photo = not isinstance(truth, Scene)
    crops = photo and data.crop_scale != (1.0, 1.0) and (bool(boxes) or example.task == "caption")
    window = images.bbox_safe_random_crop(boxes, rng, data.crop_scale) if crops else images.FULL_IMAGE
    texts = " ".join((example.question, *example.answers))
    mirrored = photo and data.hflip and not LEFT_RIGHT_PATTERN.search(texts) and bool(rng.random() < 0.5)
    moved = {box: images.crop_and_flip_box(box, window, mirrored) for box in boxes}
    places = {box_to_text(old): box_to_text(new) for old, new in moved.items()}
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
    image: Any
    record_id: int
    name: str
    dataset: OpenDataset
    record_index: int
    box_format: str = ""  # how its boxes are to be written, where not as the processor does
    prompt_format: PromptFormat = DEFAULT_FORMAT

    def masks(self) -> np.ndarray:
        """(K, height, width) bool of the regions in `example.targets`."""
        return self.dataset.masks(self.record_index, self.example.targets)


def examples(
    data: DataConfig, task: str, split: str = "heldout", limit: int | None = None, seed: int = 0
) -> Iterator[Sample]:
    """Examples of a task ("vqa", or "coco/vqa" of one source) in a fixed order that the seed draws; at most `limit`.

    Wordings are drawn by the seed and the example's own number, so a smaller limit asks the same questions. A bad
    record raises UserError, or is left out and said once where `data.on_bad_record` is "replace".
    """
    records = open_mixture(data, split)
    parts = records.components(task)
    left_out: set[int] = set()
    pairs = [(part, index) for part in parts for index in range(part.num_examples)]
    for number in np.random.default_rng([seed, 0]).permutation(len(pairs))[:limit]:
        part, index = pairs[number]
        opened = records.datasets[part.source_index]
        place = opened.record_index(part.task, index)
        record = int(records.record_offsets[part.source_index]) + place
        if record in left_out:
            continue
        rng = np.random.default_rng([seed, 1, zlib.crc32(part.task.encode()), int(number)])
        try:
            picture, truth = opened.load_record(place)
            example = part.add_format_hint(opened.make_example(part.task, index, truth, rng, data.tag_noise))
            form = prompt_format_for(part, truth)
            if part.template == "told":
                example = prepend_scene_text(example, truth, rng)
        except UserError as error:
            if data.on_bad_record == "raise":
                raise
            log.warning("left out: %s", error)
            left_out.add(record)
            continue
        yield Sample(example, picture, record, records.record_name(record), opened, place, part.box_format, form)
