# SPDX-License-Identifier: Apache-2.0
"""Scenes as records with random access, generated on the fly without files.

A record is {"id": str, "image": PNG bytes, "truth": JSON of the scene}. `tfds_builder` writes the same records to
ArrayRecord files.
"""

from __future__ import annotations

import io
import operator
from dataclasses import dataclass

from lionjax.core.types import UserError
from lionjax.data.scenes import world
from lionjax.data.scenes.world import Scene


def encode_png(image) -> bytes:
    """A uint8 RGB image (H, W, 3) as PNG bytes, with compression level 1 for speed."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def scene_record(scene: Scene, image_size: int) -> dict[str, str | bytes]:
    """The record of a scene: {"id", "image", "truth"}."""
    return {"id": scene.id, "image": encode_png(scene.render(image_size)), "truth": scene.to_json()}


@dataclass(frozen=True)
class SceneSource:
    """The first `num_scenes` scenes of a split, rendered on access: a Grain data source that pickles small.

    Raises UserError for a size out of range and for an unknown split.
    """

    split: str
    num_scenes: int
    seed: int = 0
    image_size: int = 128

    def __post_init__(self):
        if self.num_scenes < 1 or self.image_size < 16:
            raise UserError(
                f"scenes need num_scenes >= 1 and image_size >= 16, but num_scenes is {self.num_scenes} "
                f"and image_size is {self.image_size}; change sizes or image_size of the scenes"
            )
        if self.split not in world.SPLITS:
            raise UserError(world.unknown_split_message(self.split))

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        position = operator.index(index)
        if not 0 <= position < self.num_scenes:
            raise IndexError(f"scene index {position} is outside 0 to {self.num_scenes - 1}")
        return scene_record(self.scene(position), self.image_size)

    def scene(self, index: int) -> Scene:
        """The scene without its image."""
        return world.sample_scene(self.split, index, self.seed)
