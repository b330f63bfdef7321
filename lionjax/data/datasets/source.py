# SPDX-License-Identifier: Apache-2.0
"""Where records come from. A source is a small config; opened on a split, it gives records and asks about them.

A record is a picture with its truth. The pipeline and the evaluation see nothing but the five verbs of `Opened`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.scenes import tasks, world

SPLITS = world.SPLITS


class OpenDataset(Protocol):
    """One split of a source. `sizes`: how many examples it has of each task; `len` of it: how many records."""

    task_sizes: dict[str, int]

    def __len__(self) -> int: ...

    def record_index(self, task: str, index: int) -> int:
        """The number of the record that an example is about."""

    def record_name(self, record_index: int) -> str:
        """What to call a record when it is bad."""

    def load_record(self, record_index: int) -> tuple[Any, Any]:
        """A record's picture (anything that `Processor.pixels` takes) and its truth. The slow part."""

    def make_example(
        self, task: str, index: int, truth: Any, rng: np.random.Generator, tag_noise: float
    ) -> tasks.Example:
        """An example in words, with a wording drawn."""

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        """(K, height, width) bool: the regions that `Example.targets` numbers."""


def open_split(source: Any, split: str, max_pixels: int) -> OpenDataset:
    """One split of a source; UserError for an unknown split and for a source without records in it."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    opened = source.open(split, max_pixels)
    if not len(opened) or not opened.task_sizes:
        raise UserError(f"the source {source.name!r} has no records in its split {split!r}; give it some")
    return opened
