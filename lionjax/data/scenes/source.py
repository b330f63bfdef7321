# SPDX-License-Identifier: Apache-2.0
"""Scenes as records, drawn when asked for: random access without a file on disk.

A record is {"id": str, "image": PNG bytes, "truth": JSON of the scene}. `scene_builder` writes the same
records to ArrayRecord files.
"""

from __future__ import annotations

import io
import operator
from dataclasses import dataclass

from lionjax.core.types import UserError
from lionjax.data.scenes import world
from lionjax.data.scenes.world import Scene


def png(image) -> bytes:
    """A uint8 RGB picture (H, W, 3) as PNG; compressed little, as it is read far more often than sent."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def record(scene: Scene, pixels: int) -> dict[str, str | bytes]:
    return {"id": scene.id, "image": png(scene.render(pixels)), "truth": scene.to_json()}


@dataclass(frozen=True)
class SceneSource:
    """The first `size` scenes of a split, each rendered anew at every access; fits Grain and pickles small."""

    split: str
    size: int
    seed: int = 0
    pixels: int = 128

    def __post_init__(self):
        if self.size < 1 or self.pixels < 16:
            raise UserError(
                f"scenes need size >= 1 and pixels >= 16, but size is {self.size} and pixels "
                f"{self.pixels}; change the data section of the config"
            )
        if self.split not in world.SPLITS:
            raise UserError(world.unknown_split(self.split))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        place = operator.index(index)
        if not 0 <= place < self.size:
            raise IndexError(f"there are scenes 0 to {self.size - 1}, not {place}")
        return record(self.scene(place), self.pixels)

    def scene(self, index: int) -> Scene:
        """The scene alone, without its picture."""
        return world.sample(self.split, index, self.seed)
