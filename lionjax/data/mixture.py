# SPDX-License-Identifier: Apache-2.0
"""Task mixtures over all data sources of a config: encoded examples for training, text samples for evaluation."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.experiment import Mix
from lionjax.core.types import UserError
from lionjax.data import images, letterbox
from lionjax.data.boxes import BOX_FORMAT_HINTS, Box
from lionjax.data.chat import PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotated_images import ImageInfo
from lionjax.data.datasets.array_record import RecordTruth
from lionjax.data.datasets.source import OpenDataset, open_split
from lionjax.data.letterbox import Letterbox
from lionjax.data.mask_answers import with_mask_answer
from lionjax.data.processor import Processor
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes.tasks import MASK_TASKS, Example, box_to_text, scene_to_text
from lionjax.data.scenes.world import Scene
from lionjax.data.sentences import NO_DATA, SlotData, has_marks

log = logging.getLogger(__name__)

TRUTH_CACHE_BYTES = 8192  # approximate memory of a scene's ground truth
LEFT_RIGHT_PATTERN = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class MixtureComponent:
    """One task of one source in a mixture: its number of examples and its sampling weight.

    `box_format`: overrides the processor's. `template`: see `PromptFormat.kind`. `shots`: number of in-context
    examples of the same task, each with its image. `mixture_index`: index of the mixture entry it belongs to. `group`:
    see `Mix`.
    """

    source_index: int
    task: str
    num_examples: int
    weight: float
    box_format: str = ""
    template: str = ""
    shots: int = 0
    mixture_index: int = 0
    group: str = ""

    def add_format_hint(self, example: Example) -> Example:
        """The example with a hint in its question that names the box format, if the component overrides it."""
        if not self.box_format:
            return example
        return replace(example, question=f"{example.question} {BOX_FORMAT_HINTS[self.box_format]}")


class MixtureDataset:
    """One split of all data sources, with processor and image cache. Pickles as its config."""

    def __init__(self, data: DataConfig, split: str):
        self.data, self.split = data, split
        self.processor = Processor(data.processor)
        self.datasets: list[OpenDataset] = [
            open_split(source, split, data.processor.max_pixels) for source in data.sources
        ]
        if data.on_bad_record == "raise":  # at the start of a run, and not when the row is drawn
            problems = itertools.chain.from_iterable(dataset.row_problems() for dataset in self.datasets)
            if (problem := next(problems, None)) is not None:
                raise UserError(problem)
        # Record ids count through all sources, so that an id is unique.
        self.record_offsets = np.cumsum([0, *map(len, self.datasets)])
        self.image_cache: dict[int, tuple[np.ndarray, Any, Letterbox]] = {}
        self.sam_image_cache: dict[int, dict[str, np.ndarray]] = {}
        self.record_cache: dict[int, tuple[Any, Any]] = {}
        self.free_cache_bytes = data.image_cache_mib * 2**20
        self.random_augmentation = data.crop_scale != (1.0, 1.0) or data.hflip

    def __reduce__(self):
        return MixtureDataset, (self.data, self.split)

    def components(self, entry: Mix | str, weight: float = 1.0) -> list[MixtureComponent]:
        """The components of a mixture entry (or its words, see `Mix.from_words`): its task in each source that has it.

        Their weights sum to the entry's, in proportion to their sizes. Raises UserError for an unknown task or suffix.
        """
        mix = Mix.from_words(entry, weight) if isinstance(entry, str) else entry
        source, task = mix.source, mix.task
        settings = {"box_format": mix.boxes, "template": mix.template, "shots": mix.shots, "group": mix.group}
        matches = [
            (k, dataset.task_sizes[task])
            for k, dataset in enumerate(self.datasets)
            if source in ("", self.data.sources[k].name) and task in dataset.task_sizes
        ]
        if not matches:
            available = {s.name: "|".join(o.task_sizes) for s, o in zip(self.data.sources, self.datasets)}
            choices = "; ".join(f"{source}/{tasks}" for source, tasks in available.items())
            raise UserError(f"no data source has the task {mix.spec!r}; choose one of {choices}")
        if task == "res" and self.split == "train":
            matches = [(k, max(1, round(size * self.data.mask_fraction))) for k, size in matches]
        total_size = sum(size for _, size in matches)
        return [MixtureComponent(k, task, size, mix.weight * size / total_size, **settings) for k, size in matches]

    def record_name(self, record_id: int) -> str:
        """The name of a record, such as "coco/0001.jpg", by its id in `Batch.record_B`."""
        k = int(np.searchsorted(self.record_offsets, record_id, side="right")) - 1
        return f"{self.data.sources[k].name}/{self.datasets[k].record_name(record_id - int(self.record_offsets[k]))}"

    def load_record(self, source_index: int, record_index: int) -> tuple[Any, Any]:
        """(original image, ground truth) of a record, for several evaluations; cached up to `image_cache_mib`."""
        record_id = int(self.record_offsets[source_index]) + record_index
        if record_id in self.record_cache:
            return self.record_cache[record_id]
        record = image, _ = self.datasets[source_index].load_record(record_index)
        size = TRUTH_CACHE_BYTES + images.image_bytes(image)
        if size <= self.free_cache_bytes:
            self.free_cache_bytes -= size
            self.record_cache[record_id] = record
        return record

    def load_cached(self, source_index: int, record_index: int) -> tuple[np.ndarray, Any, Letterbox]:
        """(pixels at the model's size, ground truth, letterbox) of a record; cached up to `image_cache_mib`."""
        record_id = int(self.record_offsets[source_index]) + record_index
        if record_id not in self.image_cache:
            image, truth = self.datasets[source_index].load_record(record_index)
            pixels = self.processor.load_pixels(image)
            image_letterbox = self.processor.get_letterbox(image)
            size = pixels.nbytes + TRUTH_CACHE_BYTES
            if size > self.free_cache_bytes:
                return pixels, truth, image_letterbox
            self.free_cache_bytes -= size
            self.image_cache[record_id] = pixels, truth, image_letterbox
        return self.image_cache[record_id]

    def encode_example(
        self, component: MixtureComponent, index: int, rng: np.random.Generator, with_masks: bool = False
    ) -> dict[str, np.ndarray]:
        """One example as arrays (see `Processor.encode_example`), with SAM image and masks if `with_masks`.

        Raises UserError for a bad record.
        """
        dataset, data = self.datasets[component.source_index], self.data
        record = dataset.record_index(component.task, index)
        if self.random_augmentation:
            image, truth = dataset.load_record(record)
            example = dataset.make_example(component.task, index, truth, rng, data.tag_noise)
            example = with_image_boxes(example, truth)
            if data.augmentation == "image_only":
                image, flipped = augment_image_only(image, truth, data, rng)
                crop = images.FULL_IMAGE
            else:
                example, crop, flipped = augment(example, truth, data, rng)
            image_letterbox = self.processor.get_letterbox(image, crop)
            pixels = self.processor.load_pixels(image, crop)
            pixels = pixels[:, ::-1] if flipped else pixels
        else:
            pixels, truth, image_letterbox = self.load_cached(component.source_index, record)
            example = dataset.make_example(component.task, index, truth, rng, data.tag_noise)
            if not self.processor.config.pad_to_square:
                example = with_image_boxes(example, truth)
        example = component.add_format_hint(example)
        if self._is_mask_format(component):
            example = with_mask_answer(example, rng)
        prompt_format = prompt_format_for(component, truth, example)
        if component.template == "told":
            example = prepend_scene_text(example, truth, rng)
        if component.shots:
            shot_images, turns = self.sample_shots(component, index, rng)
            prompt_format = PromptFormat("", turns, True, padded_boxes=example.padded_boxes)
            pixels = self.processor.stack_images([*shot_images, pixels])
        else:
            more_pixels = [self.load_cached(component.source_index, number)[0] for number in example.more_records]
            if more_pixels and len(more_pixels) >= self.processor.config.max_images:
                max_images = self.processor.config.max_images
                raise UserError(
                    f"{dataset.record_name(record)} is shown with {len(more_pixels)} more images, but "
                    f"processor.max_images is {max_images}; set it to {len(more_pixels) + 1} or more"
                )
            pixels = self.processor.stack_images([pixels, *more_pixels])
        # Task "tags" never gets tags in its prompt: they are the answer.
        without_tags = rng.random() < data.tag_dropout or component.task == "tags"
        tags = () if without_tags else example.tags
        answer = None if self.processor.config.detects_phrases else example.answer
        texts = (example.question, tags, answer, example.category)
        boxes = (*example.question_boxes, *example.boxes)
        box_format = component.box_format or None
        found = self._load_regions(component, record, example)
        context = self.processor.spatial_context(found[0]) if found and not without_tags else ""
        arguments = (boxes, image_letterbox, box_format, prompt_format, context, slot_data_of(dataset, record, example))
        row = self.processor.encode_example(pixels, *texts, *arguments)
        row |= self.processor.encode_detection(example.question, example.boxes, example.box_names)
        row |= self.processor.encode_regions(found, example.answer, rng, dataset.record_name(record))
        row["record"] = np.int32(self.record_offsets[component.source_index] + record)
        row["part"] = np.int32(component.mixture_index)
        return row | self._encode_masks(component, record, example) if with_masks else row

    def _load_regions(self, component: MixtureComponent, record: int, example: Example) -> list[ImageRegions | None]:
        """What a refiner found in each image of an example; empty for a model that reads no regions."""
        if not self.processor.config.region_width:
            return []
        if component.shots:
            raise UserError(f"the mixture entry {component.task!r} has shots, which a model that reads regions lacks")
        dataset = self.datasets[component.source_index]
        return [dataset.load_regions(number) for number in (record, *example.more_records)]

    def sample_shots(
        self, component: MixtureComponent, index: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], tuple[tuple[str, str], ...]]:
        """(pixels, (question, answer) pairs) of randomly drawn other examples of a component.

        Boxes in the pairs are fractions of what the model sees: of the padded square with `pad_to_square`.
        """
        dataset, shot_images, turns = self.datasets[component.source_index], [], []
        while len(turns) < component.shots:
            shot_index = int(rng.integers(component.num_examples))
            if shot_index == index and component.num_examples > 1:
                continue
            record = dataset.record_index(component.task, shot_index)
            pixels, truth, square = self.load_cached(component.source_index, record)
            example = dataset.make_example(component.task, shot_index, truth, rng, self.data.tag_noise)
            example = with_image_boxes(example, truth)
            shot_images.append(pixels)
            turns.append(padded_turn(example, square))
        return shot_images, tuple(turns)

    def _is_mask_format(self, component: MixtureComponent) -> bool:
        return (component.box_format or self.processor.config.box_format) == "masks"

    def _encode_masks(self, component: MixtureComponent, record_index: int, example: Example) -> dict[str, np.ndarray]:
        """SAM's image, bool masks (K, side, side) and validity (K,).

        Answers of `MASK_TASKS` have masks; with box format "masks" all whose boxes are those of their targets.
        """
        record_id, side = (
            int(self.record_offsets[component.source_index]) + record_index,
            self.processor.config.sam_image_size,
        )
        if record_id not in self.sam_image_cache:
            arrays = self.processor.load_sam_pixels(self.datasets[component.source_index].load_record(record_index)[0])
            size = sum(array.nbytes for array in arrays.values())
            if size <= self.free_cache_bytes:
                self.free_cache_bytes -= size
                self.sam_image_cache[record_id] = arrays
        sam_arrays = self.sam_image_cache.get(record_id) or arrays
        max_boxes, num_question_boxes = self.processor.config.max_boxes, len(example.question_boxes)
        mask_KHW, mask_valid_K = np.zeros((max_boxes, side, side), bool), np.zeros(max_boxes, np.int32)
        has_masks = self._is_mask_format(component) and len(example.targets) == len(example.boxes) > 0
        if component.task in MASK_TASKS or has_masks:
            true_masks = self.datasets[component.source_index].masks(record_index, example.targets)[
                : max_boxes - num_question_boxes
            ]
            for k, mask_HW in enumerate(true_masks, num_question_boxes):
                mask_KHW[k], mask_valid_K[k] = letterbox.letterbox_mask(mask_HW, side, self.processor.sam_corner), 1
        return sam_arrays | {"masks": mask_KHW, "masks_mask": mask_valid_K}


def prompt_format_for(component: MixtureComponent, truth: Any, example: Example) -> PromptFormat:
    """The prompt format of a component's example; text-only if its record has no image."""
    if example.image_marks and component.template != "plain":
        return PromptFormat("", example.history, image_marks=True, padded_boxes=example.padded_boxes)
    if example.history and not example.image_marks and has_marks(example.history[0][0]):  # a sentence with slots
        return PromptFormat("", example.history)
    info = image_info_of(truth)
    text_only = info is not None and not info.name
    return PromptFormat("told" if text_only else component.template, padded_boxes=example.padded_boxes)


def padded_turn(example: Example, square: Letterbox) -> tuple[str, str]:
    """(question, answer) of an in-context example, with boxes as fractions of its image's padded square."""
    boxes = (*example.question_boxes, *example.boxes)
    return letterbox.pad_boxes(example.question, square, boxes), letterbox.pad_boxes(example.answer, square, boxes)


def slot_data_of(dataset: OpenDataset, record_index: int, example: Example) -> SlotData:
    """What the slots in an example's question hold."""
    if not example.states and not example.slot_objects:
        return NO_DATA
    masks = dataset.masks(record_index, example.slot_objects) if example.slot_objects else ()
    return SlotData(example.states, masks)


def image_info_of(truth: Any) -> ImageInfo | None:
    """The image info in a record's ground truth; None for a scene."""
    info = truth.image_info if isinstance(truth, RecordTruth) else truth
    return info if isinstance(info, ImageInfo) else None


def with_image_boxes(example: Example, truth: Any) -> Example:
    """The example with boxes in its texts as fractions of the image, if they are fractions of its padded square.

    Their exact coordinates become `question_boxes` and `boxes`. With several images the texts stay as they are, because
    nothing says which image a box is in.
    """
    info = image_info_of(truth)
    if not example.padded_boxes or info is None or example.more_records:
        return example
    square = letterbox.Letterbox(int(info.width), int(info.height))
    texts = [text for turn in example.history for text in turn]
    (*texts, question), boxes = zip(*(letterbox.unpad_boxes(text, square) for text in (*texts, example.question)))
    answer, answer_boxes = letterbox.unpad_boxes(example.answer, square)
    return replace(
        example,
        question=question,
        answer=answer,
        answers=tuple(letterbox.unpad_boxes(text, square)[0] for text in example.answers),
        history=tuple(zip(texts[::2], texts[1::2])),
        question_boxes=tuple(itertools.chain(*boxes)),
        boxes=tuple(answer_boxes),
        padded_boxes=False,
    )


def prepend_scene_text(example: Example, truth: Any, rng: np.random.Generator) -> Example:
    """The example with its scene described in text before the question. Raises UserError if it is not a scene."""
    if not isinstance(truth, Scene):
        raise UserError(
            "the suffix @told needs a scene, which has a text description; remove @told from tasks of other sources"
        )
    return replace(example, question=f"{scene_to_text(truth, rng, with_boxes=False)}. {example.question}")


def open_mixture(data: DataConfig, split: str) -> MixtureDataset:
    """A split of all data sources; cached and shared by stages and evaluations until a source file changes."""
    stamps = tuple(stamp for source in data.sources for stamp in _file_stamps(source))
    return _open_mixture_cached(data, split, stamps)


@functools.lru_cache(maxsize=4)
def _open_mixture_cached(data: DataConfig, split: str, stamps: tuple) -> MixtureDataset:
    return MixtureDataset(data, split)


def _file_stamps(source: Any) -> Iterator[tuple[str, int, int]]:
    """(path, modification time, bytes) of each file and folder in a source's fields, and of files in its `folder`."""
    for field in fields(source):
        value = getattr(source, field.name)
        if not isinstance(value, str) or not value or not Path(value).exists():
            continue
        files = Path(value).iterdir() if field.name == "folder" and Path(value).is_dir() else ()
        for path in (Path(value), *sorted(files)):
            stat = path.stat()
            yield str(path), stat.st_mtime_ns, stat.st_size


def augment(example: Example, truth: Any, data: DataConfig, rng: np.random.Generator) -> tuple[Example, Box, bool]:
    """(example, crop in 0..1, flipped) for a random crop and horizontal flip, with boxes and their texts moved along.

    Only captions and examples with boxes are cropped: other questions may be about what the crop removes.
    """
    boxes = (*example.question_boxes, *example.boxes)
    is_photo = not isinstance(truth, Scene)
    crops = is_photo and data.crop_scale != (1.0, 1.0) and (bool(boxes) or example.task == "caption")
    crop = images.bbox_safe_random_crop(boxes, rng, data.crop_scale) if crops else images.FULL_IMAGE
    texts = " ".join((example.question, *example.answers))
    flipped = is_photo and data.hflip and not LEFT_RIGHT_PATTERN.search(texts) and bool(rng.random() < 0.5)
    moved = {box: images.crop_and_flip_box(box, crop, flipped) for box in boxes}
    moved_texts = {box_to_text(old): box_to_text(new) for old, new in moved.items()}
    question, answer = (
        re.sub(r"\[[\d.,]+\]", lambda match: moved_texts.get(match[0], match[0]), text)
        for text in (example.question, example.answer)
    )
    changed_texts = {"question": question, "answer": answer}
    question_boxes, answer_boxes = (
        tuple(moved[box] for box in group) for group in (example.question_boxes, example.boxes)
    )
    return replace(example, question_boxes=question_boxes, boxes=answer_boxes, **changed_texts), crop, flipped


def augment_image_only(image: Any, truth: Any, data: DataConfig, rng: np.random.Generator) -> tuple[Any, bool]:
    """(image, flipped): torchvision's RandomResizedCrop and RandomHorizontalFlip, as in LION's published training code.

    Boxes and texts are not moved along, which makes boxes and sides wrong: only for comparison with that code.
    """
    if isinstance(truth, Scene):
        return image, False
    image = images.to_pil_image(image, max_pixels=data.processor.max_pixels)
    if data.crop_scale != (1.0, 1.0):
        image = image.crop(images.random_crop(*image.size, rng, data.crop_scale))
    return image, data.hflip and bool(rng.random() < 0.5)
