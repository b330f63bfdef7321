# SPDX-License-Identifier: Apache-2.0
"""Samples for evaluation: the questions of a task in a fixed order, with their original images."""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lionjax.core.errors import RetryError
from lionjax.core.types import UserError
from lionjax.data.chat import DEFAULT_FORMAT, PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import OpenDataset
from lionjax.data.mixture import (
    MixtureComponent,
    MixtureDataset,
    open_mixture,
    prepend_scene_text,
    prompt_format_for,
    slot_data_of,
    with_image_boxes,
)
from lionjax.data.prefetch import map_ahead
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes.tasks import MASK_TASKS, Example
from lionjax.data.sentences import SlotData

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One example for evaluation: text, original image, and the masks of its targets.

    `padded_example`: the same with boxes as fractions of the padded square, where the file has them so.
    """

    example: Example
    image: Any
    record_id: int
    name: str
    dataset: OpenDataset
    record_index: int
    box_format: str = ""  # overrides the processor's box format if not empty
    prompt_format: PromptFormat = DEFAULT_FORMAT
    more_images: tuple[Any, ...] = ()
    padded_example: Example | None = None
    position: int = 0  # in the order of the questions

    def masks(self) -> np.ndarray:
        """bool (K, height, width): the masks of the regions in `example.targets`."""
        return self.dataset.masks(self.record_index, self.example.targets)

    def slot_data(self) -> SlotData:
        """What the slots in the question hold."""
        return slot_data_of(self.dataset, self.record_index, self.example)

    def load_regions(self) -> list[ImageRegions | None]:
        """What a refiner found in each of the example's images."""
        return [self.dataset.load_regions(number) for number in (self.record_index, *self.example.more_records)]


def examples(
    data: DataConfig,
    task: str,
    split: str = "heldout",
    limit: int | None = None,
    seed: int = 0,
    by_record: bool = False,
    on_skip: Callable[[str, UserError], None] | None = None,
    num_threads: int = 0,
    num_workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Sample]:
    """Yields at most `limit` examples of a task ("vqa", or "coco/vqa" of one source), in an order fixed by `seed`.

    Wordings depend on the seed and the example's index, so a smaller limit gives a prefix of the same questions. A bad
    record raises UserError, or is skipped with one warning if `data.on_bad_record` is "replace"; `on_skip` is called
    for each example that this leaves out, with the record's name. `by_record`: the examples of a record follow each
    other, so that it is read once; `Sample.position` is the place in the order without it. `num_threads`: read so many
    records ahead at once, twice as many in all; `num_workers`: in so many processes instead. Raises RetryError if one
    of them ends. `part` (index, count): only the examples of every `count`-th record, or example without `by_record`.
    """
    mixture = open_mixture(data, split)
    chosen = choose_examples(mixture, task, limit, seed)
    if by_record:
        first_of_record: dict[tuple[int, int], int] = {}
        for position, (component, index, _) in enumerate(chosen):
            first_of_record.setdefault(_record_of(mixture, component, index), position)
        order = sorted(range(len(chosen)), key=lambda k: (first_of_record[_record_of(mixture, *chosen[k][:2])], k))
    else:
        order = range(len(chosen))
    groups = [
        (record, list(positions))
        for record, positions in itertools.groupby(order, lambda k: _record_of(mixture, *chosen[k][:2]))
    ][part[0] :: part[1]]
    problems: dict[str, UserError] = {}
    for (source_index, record_index), positions, load in _load_ahead(mixture, groups, num_threads, num_workers):
        name = mixture.record_name(int(mixture.record_offsets[source_index]) + record_index)
        for position in positions:
            component, index, number = chosen[position]
            try:
                if name in problems:
                    raise problems[name]
                rng = np.random.default_rng([seed, 1, zlib.crc32(component.task.encode()), number])
                sample = make_sample(mixture, component, index, load(), rng)
            except UserError as error:
                if data.on_bad_record == "raise" or isinstance(error, RetryError):
                    raise
                if name not in problems:
                    log.warning("skipped: %s", error)
                problems[name] = error
                if on_skip is not None:
                    on_skip(name, error)
                continue
            yield replace(sample, position=position)


def _load_ahead(
    mixture: MixtureDataset, groups, num_threads: int, num_workers: int
) -> Iterator[tuple[Any, list[int], Callable]]:
    """Yields (record, positions of its examples, a function that gives the record or raises UserError)."""
    records = [record for record, _ in groups]
    if not num_threads and not num_workers:
        for group in groups:
            yield *group, functools.cache(functools.partial(_load_record, mixture, group[0]))
        return
    pool: Executor = ThreadPoolExecutor(num_threads or 1)
    load = functools.partial(_load_record, mixture)
    if num_workers:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
        pool = ProcessPoolExecutor(num_workers, context, _open_in_worker, (mixture,))
        load = _load_in_worker
    for group, future in zip(groups, map_ahead(load, records, pool, 2 * (num_workers or num_threads))):
        yield *group, functools.partial(_result, future)


def _load_record(mixture: MixtureDataset, record: tuple[int, int]) -> tuple[Any, Any]:
    """(image, truth) of a record, by the index of its source and its own."""
    return mixture.load_record(*record)


_of_worker: list[MixtureDataset] = []  # what a process that reads records has opened


def _open_in_worker(mixture: MixtureDataset) -> None:
    _of_worker[:] = [mixture]


def _load_in_worker(record: tuple[int, int]) -> tuple[Any, Any]:
    return _load_record(_of_worker[0], record)


def _result(future) -> tuple[Any, Any]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RetryError(
            "a process that reads images ended, perhaps for lack of memory; give fewer with --workers"
        ) from error


def choose_examples(
    mixture: MixtureDataset, task: str, limit: int | None = None, seed: int = 0
) -> list[tuple[MixtureComponent, int, int]]:
    """(component, index of the example, its number among all) of at most `limit` examples of a task, shuffled."""
    pairs = [(part, index) for part in mixture.components(task) for index in range(part.num_examples)]
    return [(*pairs[k], int(k)) for k in np.random.default_rng([seed, 0]).permutation(len(pairs))[:limit]]


def _record_of(mixture: MixtureDataset, component: MixtureComponent, index: int) -> tuple[int, int]:
    """(source, record) that an example is about."""
    dataset = mixture.datasets[component.source_index]
    return component.source_index, dataset.record_index(component.task, index)


def make_sample(
    mixture: MixtureDataset, component: MixtureComponent, index: int, record: tuple[Any, Any], rng: np.random.Generator
) -> Sample:
    """One example of a component as a Sample, from its loaded record (image, truth)."""
    dataset = mixture.datasets[component.source_index]
    record_index, (image, truth) = dataset.record_index(component.task, index), record
    example = dataset.make_example(component.task, index, truth, rng, mixture.data.tag_noise)
    padded_example = component.add_format_hint(example) if example.padded_boxes else None
    example = component.add_format_hint(with_image_boxes(example, truth))
    prompt_format = prompt_format_for(component, truth, example)
    more_images = tuple(dataset.load_record(number)[0] for number in example.more_records)
    if component.template == "told":
        example = prepend_scene_text(example, truth, rng)
    if component.task in MASK_TASKS and example.targets:
        dataset.masks(record_index, example.targets)  # a bad mask is a bad record, also in evaluation
    record_id = int(mixture.record_offsets[component.source_index]) + record_index
    return Sample(
        example,
        image,
        record_id,
        mixture.record_name(record_id),
        dataset,
        record_index,
        component.box_format,
        prompt_format,
        more_images,
        padded_example,
    )
