# SPDX-License-Identifier: Apache-2.0
"""The first LLaVA, 7B: CLIP ViT-L/14 at 224 pixels, one linear, Vicuna-7B (arXiv 2304.08485).

llava15_7b.py with the first one's batches and rates: 595 thousand captions once, 158 thousand instructions three times.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.visual_prefix import LLAVA_7B

later = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))
stage = later["stage"]


def get_config() -> Experiment:
    """The whole run. The picture's token stands behind Vicuna's 32000 words and needs no row of its own."""
    stages = (
        stage("align", 4_650, 128, 2e-3, ("projector",), later["CAPTIONS"]),
        stage("instruct", 3_700, 128, 2e-5, ("projector", "language"), later["INSTRUCTIONS"]),
    )
    system = dataclasses.replace(LLAVA_7B, image_token_id=LLAVA_7B.language.vocab_size)
    return later["get_config"](system, "llava_7b", "vicuna_7b", stages)
