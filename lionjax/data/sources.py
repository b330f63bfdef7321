# SPDX-License-Identifier: Apache-2.0
"""Where records come from. A source is a small config; opened on a split, it gives records and asks about them.

A record is a picture with its truth. The pipeline and the evaluation see nothing but the five verbs of `Opened`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lionjax.data import scenes, tasks
from lionjax.data.annotations import Reader, read_json
from lionjax.data.scene_source import SceneSource
from lionjax.data.table import Photo, Row, Table
from lionjax.interfaces import UserError

SPLITS = scenes.SPLITS


class Opened(Protocol):
    """One split of a source. `sizes`: how many examples it has of each task; `len` of it: how many records."""

    sizes: dict[str, int]

    def __len__(self) -> int: ...

    def record(self, task: str, index: int) -> int:
        """The number of the record that an example is about."""

    def name(self, record: int) -> str:
        """What to call a record when it is bad."""

    def read(self, record: int) -> tuple[Any, Any]:
        """A record's picture (anything that `Processor.pixels` takes) and its truth. The slow part."""

    def ask(self, task: str, index: int, truth: Any, rng: np.random.Generator, tag_noise: float) -> tasks.Example:
        """An example in words, with a wording drawn."""

    def masks(self, record: int, regions: tuple[int, ...]) -> np.ndarray:
        """(K, height, width) bool: the regions that `Example.targets` numbers."""


@dataclass(frozen=True)
class Scenes:
    """The embedded scenes: `sizes` of train, validation and held-out ones, drawn when first asked for.

    With `folder`, those that `lionjax data build scenes` wrote there are read instead.
    """

    sizes: tuple[int, int, int] = (3000, 500, 500)
    pixels: int = 128
    seed: int = 0
    folder: str = ""
    name: str = "scenes"

    def open(self, split: str, max_pixels: int) -> OpenedScenes:
        return OpenedScenes(self, split)


class OpenedScenes:
    """One split of the scenes; every scene gives one example of every task, and another at every visit."""

    def __init__(self, config: Scenes, split: str):
        size = config.sizes[SPLITS.index(split)]
        self.source = SceneSource(split, max(size, 1), config.seed, config.pixels)
        self.built = None
        if config.folder:
            from lionjax.data.scene_builder import BuiltScenes

            try:
                self.built = BuiltScenes(config.folder, split)
            except Exception as error:  # TFDS has many ways to say that a folder is not one of its own
                raise UserError(
                    f"{config.folder} holds no scenes that can be read ({error}); "
                    "write them with `lionjax data build scenes`"
                ) from error
        self.count = size if self.built is None else len(self.built)
        self.sizes = dict.fromkeys(tasks.TASKS, self.count)

    def __len__(self) -> int:
        return self.count

    def record(self, task: str, index: int) -> int:
        return index

    def name(self, record: int) -> str:
        return f"{self.source.split}-{self.source.seed}-{record:06d}"

    def read(self, record: int):
        if self.built is None:
            scene = self.source.scene(record)
            return scene.render(self.source.pixels), scene
        stored = self.built[record]
        return stored["image"], scenes.Scene.from_json(stored["truth"])

    def ask(self, task: str, index: int, truth, rng, tag_noise: float) -> tasks.Example:
        return tasks.converse(task, truth, rng, tag_noise)

    def masks(self, record: int, regions: tuple[int, ...]) -> np.ndarray:
        scene = self.source.scene(record) if self.built is None else self.read(record)[1]
        return scene.masks(self.source.pixels)[list(regions)]


@dataclass(frozen=True)
class EasyVqa:
    """The easy-VQA package: 5,000 pictures of one shape each, and 48,248 questions. Its test set is held out.

    `kinds`: of the questions, `yesno`, `color` and `shape`.
    """

    name: str = "easy_vqa"
    kinds: tuple[str, ...] = ("yesno", "color", "shape")

    def __post_init__(self):
        if unknown := set(self.kinds) - {"yesno", "color", "shape"}:
            raise UserError(f"easy-VQA has no kind {sorted(unknown)[0]!r}; there are yesno, color and shape")

    def open(self, split: str, max_pixels: int) -> Table:
        import importlib.util

        found = importlib.util.find_spec("easy_vqa")
        if found is None or not found.origin:
            raise UserError("easy-VQA is not installed; run `pip install easy-vqa`")
        folder = Path(found.origin).parent / "data" / ("test" if split == "heldout" else "train")
        reader = Reader(folder / "images")
        for question, answer, key in read_json(folder / "questions.json"):
            validation = split != "heldout" and key % 20 == 0
            kind = "color" if "color" in question else "shape"
            kind = "yesno" if answer in ("yes", "no") else kind
            if validation == (split == "validation") and kind in self.kinds:
                number = reader.photo(key, Photo(f"{key}.png"))
                reader.row("vqa", Row(number, (answer,), question, kind=kind))
        return reader.table(max_pixels)


def open_split(source: Any, split: str, max_pixels: int) -> Opened:
    """One split of a source; UserError for an unknown split and for a source without records in it."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    opened = source.open(split, max_pixels)
    if not len(opened) or not opened.sizes:
        raise UserError(f"the source {source.name!r} has no records in its split {split!r}; give it some")
    return opened
