# SPDX-License-Identifier: Apache-2.0
"""The data source interface: a source is a config whose `open(split, max_pixels)` returns an `OpenDataset`.

A record is an image with its ground truth; an example is one question about a record. The pipeline and the evaluation
use only the methods of `OpenDataset`. A source may also name its files and folders with `paths()`, for `data.check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes import tasks, world

SPLITS = world.SPLITS


class OpenDataset(Protocol):
    """One split of a source. `task_sizes`: number of examples of each task; `len`: number of records."""

    task_sizes: dict[str, int]
    has_splits: bool  # False: all splits are the same records

    def __len__(self) -> int: ...

    def row_problems(self) -> Iterator[str]:
        """Why rows of the source's files cannot be used; examples of these rows raise UserError."""

    def record_index(self, task: str, index: int) -> int:
        """Index of the record of an example."""

    def record_name(self, record_index: int) -> str:
        """Name of a record for logs and reports."""

    def load_record(self, record_index: int) -> tuple[Any, Any]:
        """(image, ground truth) of a record; the image is of any type that `Processor.load_pixels` accepts. Slow."""

    def make_example(
        self, task: str, index: int, truth: Any, rng: np.random.Generator, tag_noise: float
    ) -> tasks.Example:
        """A text example with a drawn question template."""

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        """bool (K, height, width): the masks of regions by their indices in `Example.targets`."""

    def load_regions(self, record_index: int) -> ImageRegions | None:
        """What a refiner found in a record's image, if `lionjax data build --refiner` kept it."""


def has_splits(source: Any, dataset: OpenDataset) -> bool:
    """Whether the splits of a source are different records; a `heldout_fraction` of 0 holds nothing out.

    A source with `OWN_SPLITS` has those of its file, whatever its `heldout_fraction`.
    """
    own_splits = getattr(source, "OWN_SPLITS", False)
    return (own_splits or getattr(source, "heldout_fraction", 1) != 0) and dataset.has_splits


def open_split(source: Any, split: str, max_pixels: int) -> OpenDataset:
    """One split of a source. Raises UserError for an unknown split, and for one without records."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    dataset = source.open(split, max_pixels)
    if not len(dataset) or not dataset.task_sizes:
        raise UserError(
            f"the source {source.name!r} has no records in its split {split!r}; add records or choose another split"
        )
    return dataset
