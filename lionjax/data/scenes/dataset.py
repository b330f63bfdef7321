# SPDX-License-Identifier: Apache-2.0
"""The synthetic scenes as a data source: every task of the project from one exact scene description."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets.source import SPLITS
from lionjax.data.scenes import tasks, world
from lionjax.data.scenes.source import SceneSource


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
            from lionjax.data.scenes.tfds_builder import BuiltScenes

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
        return stored["image"], world.Scene.from_json(stored["truth"])

    def ask(self, task: str, index: int, truth, rng, tag_noise: float) -> tasks.Example:
        return tasks.converse(task, truth, rng, tag_noise)

    def masks(self, record: int, regions: tuple[int, ...]) -> np.ndarray:
        scene = self.source.scene(record) if self.built is None else self.read(record)[1]
        return scene.masks(self.source.pixels)[list(regions)]
