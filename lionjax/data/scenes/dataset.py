# SPDX-License-Identifier: Apache-2.0
"""The synthetic scenes as a data source with exact ground truth for every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lionjax.core.errors import check_ranges
from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets.source import SPLITS
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes import tasks, world
from lionjax.data.scenes.source import SceneSource


@renamed_fields(pixels="image_size")
@dataclass(frozen=True)
class Scenes:
    """Synthetic scenes. `sizes`: number of train, validation and heldout scenes; `image_size`: pixels per side.

    Scenes are rendered on access, or read from `folder` if `lionjax data build scenes` wrote them there. `open` raises
    UserError for a folder that cannot be read.
    """

    sizes: tuple[int, int, int] = (3000, 500, 500)
    image_size: int = 128
    seed: int = 0
    folder: str = ""
    name: str = "scenes"

    def __post_init__(self):
        check_ranges(self, f"source {self.name!r}: ", sizes=">= 0", image_size=">= 1", seed=f">= 0 and < {2**32}")

    def open(self, split: str, max_pixels: int) -> OpenScenes:
        return OpenScenes(self, split)


class OpenScenes:
    """One split of the scenes. Every scene has one example per task, which is drawn anew on every access."""

    has_splits = True

    def __init__(self, config: Scenes, split: str):
        num_scenes = config.sizes[SPLITS.index(split)]
        self.source = SceneSource(split, max(num_scenes, 1), config.seed, config.image_size)
        self.stored_scenes = None
        if config.folder:
            from lionjax.data.scenes.tfds_builder import StoredScenes

            try:
                self.stored_scenes = StoredScenes(config.folder, split)
            except Exception as error:  # TFDS raises many types of errors for a foreign folder
                raise UserError(
                    f"{config.folder} has no readable scenes ({error}); write them with `lionjax data build scenes`"
                ) from error
        self.num_scenes = num_scenes if self.stored_scenes is None else len(self.stored_scenes)
        self.task_sizes = dict.fromkeys(tasks.TASKS, self.num_scenes)

    def __len__(self) -> int:
        return self.num_scenes

    def row_problems(self) -> Iterator[str]:
        return iter(())

    def record_index(self, task: str, index: int) -> int:
        return index

    def record_name(self, record_index: int) -> str:
        return f"{self.source.split}-{self.source.seed}-{record_index:06d}"

    def load_record(self, record_index: int):
        if self.stored_scenes is None:
            scene = self.source.scene(record_index)
            return scene.render(self.source.image_size), scene
        record = self.stored_scenes[record_index]
        return record["image"], world.Scene.from_json(record["truth"])

    def make_example(self, task: str, index: int, truth, rng, tag_noise: float) -> tasks.Example:
        return tasks.make_example(task, truth, rng, tag_noise)

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        scene = self.source.scene(record_index) if self.stored_scenes is None else self.load_record(record_index)[1]
        return scene.masks(self.source.image_size)[list(regions)]

    def load_regions(self, record_index: int) -> ImageRegions | None:
        return None if self.stored_scenes is None else ImageRegions.from_record(self.stored_scenes[record_index])
