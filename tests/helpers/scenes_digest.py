# SPDX-License-Identifier: Apache-2.0
"""A digest of the scenes that every process must make alike."""

import hashlib

from lionjax.data.scenes import world as scenes
from lionjax.data.scenes.world import sample_scene


def digest_of_nine() -> str:
    nine = [sample_scene(split, index) for split in scenes.SPLITS for index in (0, 1, 977)]
    truth = "\n".join(scene.to_json() for scene in nine)
    return hashlib.sha256(truth.encode()).hexdigest()
