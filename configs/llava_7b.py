# SPDX-License-Identifier: Apache-2.0
"""The first LLaVA, 7B: CLIP ViT-L/14 at 224 pixels, a linear projector, Vicuna-7B (arXiv 2304.08485).

llava15_7b.py with its batch sizes, rates and files: 595,000 captions for one epoch, 158,000 instructions for three.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.data.datasets.conversations import Conversations
from lionjax.models.vlm.visual_prefix import LLAVA_7B

llava15 = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))
stage = llava15["stage"]
SOURCES = (
    Conversations(
        "data/llava/LLaVA-CC3M-Pretrain-595K/chat.json", "data/llava/LLaVA-CC3M-Pretrain-595K", name="captions"
    ),
    Conversations("data/llava/llava_instruct_158k.json", "data/coco", name="instructions"),
)


def get_config() -> Experiment:
    """The experiment. The image token is id 32000, after Vicuna's vocabulary, and has no embedding."""
    stages = (
        stage("align", 4_650, 128, 2e-3, ("projector",), llava15["CAPTIONS"]),
        stage("instruct", 3_700, 128, 2e-5, ("projector", "language"), llava15["INSTRUCTIONS"]),
    )
    system = dataclasses.replace(LLAVA_7B, image_token_id=LLAVA_7B.language.vocab_size)
    return llava15["get_config"](system, "llava_7b", "vicuna_7b", stages, SOURCES)
