# SPDX-License-Identifier: Apache-2.0
"""tiny_lionjax.py on photographs: a folder in COCO's format, and easy-VQA.

    lionjax train configs/tiny_lionjax_photos.py --workdir runs/photos --data.sources.0.folder MY_COCO_FOLDER

Shows that photographs of any shape run through all four stages with boxes and masks; it is not meant for use.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa

scenes = runpy.run_path(str(Path(__file__).with_name("tiny_lionjax.py")))["get_config"]

TASKS = ("vqa", "caption", "existence", "tags", "rec", "reg", "res")  # that these sources have


def get_config() -> Experiment:
    """The schedule of tiny_lionjax.py with other data, without the tasks that only scenes have."""
    base = scenes()
    stages = tuple(
        dataclasses.replace(stage, mixture=tuple((task, weight) for task, weight in stage.mixture if task in TASKS))
        for stage in base.stages
    )
    sources = (Coco("data/coco", heldout_fraction=0.2), EasyVqa())
    data = dataclasses.replace(base.data, sources=sources, tag_noise=0.1, mask_fraction=1.0)
    return dataclasses.replace(base, name="tiny_lionjax_photos", data=data, stages=stages)
