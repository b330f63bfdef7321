# SPDX-License-Identifier: Apache-2.0
"""tiny_lion.py on photographs: a folder in COCO's format, and easy-VQA.

    lionjax train configs/tiny_lion_photos.py --workdir runs/photos --data.sources.0.folder MY_COCO_FOLDER

The frozen backbones were pretrained on synthetic scenes only, so this shows that real data runs through all three
stages and what a model of this size reaches; it is not meant for use.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa

scenes = runpy.run_path(str(Path(__file__).with_name("tiny_lion.py")))["get_config"]

IMAGE_LEVEL = (Mix("vqa", 4.0), Mix("caption", 1.0), Mix("existence", 1.0), Mix("tags", 0.5))
REGION_LEVEL = (Mix("rec", 2.0), Mix("reg", 1.0))


def get_config() -> Experiment:
    """The schedule of tiny_lion.py with other data."""
    base = scenes()
    mixtures = (IMAGE_LEVEL, REGION_LEVEL, IMAGE_LEVEL + REGION_LEVEL)
    stages = tuple(
        dataclasses.replace(stage, mixture=mixture) for stage, mixture in zip(base.stages, mixtures, strict=True)
    )
    sources = (Coco("data/coco", heldout_fraction=0.2), EasyVqa())
    data = dataclasses.replace(base.data, sources=sources, tag_noise=0.1)
    return dataclasses.replace(base, name="tiny_lion_photos", data=data, stages=stages)
