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


def encode_png(image) -> bytes:
    """A uint8 RGB picture (H, W, 3) as PNG; compressed little, as it is read far more often than sent."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def scene_record(scene: Scene, image_size: int) -> dict[str, str | bytes]:
    return {"id": scene.id, "image": encode_png(scene.render(image_size)), "truth": scene.to_json()}


@dataclass(frozen=True)
class SceneSource:
    """The first `size` scenes of a split, each rendered anew at every access; fits Grain and pickles small."""

    split: str
    num_scenes: int
    seed: int = 0
    image_size: int = 128

    def __post_init__(self):
        if self.num_scenes < 1 or self.image_size < 16:
            raise UserError(
                f"scenes need size >= 1 and pixels >= 16, but size is {self.num_scenes} and pixels "
                f"{self.image_size}; change the data section of the config"
            )
        if self.split not in world.SPLITS:
            raise UserError(world.unknown_split_message(self.split))

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        place = operator.index(index)
        if not 0 <= place < self.num_scenes:
            raise IndexError(f"there are scenes 0 to {self.num_scenes - 1}, not {place}")
        return scene_record(self.scene(place), self.image_size)

    def scene(self, index: int) -> Scene:
        """The scene alone, without its picture."""
        return world.sample_scene(self.split, index, self.seed)
