# SPDX-License-Identifier: Apache-2.0
"""Shikra 7B: the parts of the first LLaVA, boxes written as digits (arXiv 2306.15195).

Trains projector and language model together from the first step on. Needs the public weights, converted once with
`lionjax convert`; Vicuna's with three added image tokens. Learning rate, batch size and steps are those of the released
code; its annotation files are replaced by similar tasks.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.models.vlm.visual_prefix import SHIKRA_7B

PRETRAIN = (Mix("rec", 3.0), Mix("reg", 2.0), Mix("caption", 2.0), Mix("vqa", 2.0))
INSTRUCTIONS = (Mix("vqa", 2.0), Mix("caption", 1.0), Mix("existence", 0.5), Mix("rec", 1.0), Mix("reg", 0.5))

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def stage(name: str, steps: int, mixture: tuple) -> Stage:
    """A stage at 2e-5 that trains projector and language model."""
    return llava["stage"](name, steps, 64, 2e-5, ("projector", "language"), mixture)


def get_config() -> Experiment:
    """The experiment."""
    processor = llava["chat_processor"]("vicuna_7b", "shikra", 512, pad_to_square=True)
    return llava["experiment"](
        "shikra_7b",
        llava["full_size"](SHIKRA_7B),
        processor,
        (stage("places", 100_000, PRETRAIN), stage("instruct", 20_000, INSTRUCTIONS)),
        {"vision": "clip_vit_l_224", "language": "vicuna_7b"},
        (Coco("data/coco"), RefCoco("data/refcoco/train.json", "data/coco/images")),
        generation=GenerationDefaults(max_new_tokens=256),
    )
