# SPDX-License-Identifier: Apache-2.0
"""BLIP-2's first stage on synthetic scenes: trains the Q-Former with ITC, ITM and captioning (arXiv 2301.12597)."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.blip2_stage1 import Blip2Stage1

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
blip2 = runpy.run_path(str(Path(__file__).with_name("tiny_blip2.py")))


def get_config() -> Experiment:
    """The experiment."""
    model = Blip2Stage1(
        TINY_VIT,
        dataclasses.replace(blip2["QFORMER"], use_text_input=True),
        embed_dim=64,
        cls_token_id=4,
        decoder_start_token_id=5,
    )
    stages = (llava["stage"]("represent", 600, ("(?!vision/).*",), (Mix("caption", 1.0),), 1.5e-3, optimizer="muon"),)
    weights = (llava["BACKBONES"][0], blip2["WORDS"])
    return llava["experiment"]("tiny_blip2_first", model, stages, weights)
