# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 on synthetic scenes: tiny_llava.py with a Q-Former and both backbones frozen.

With a Q-Former that reads the question it is InstructBLIP (tiny_instructblip.py).
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.connectors.qformer import TINY_QFORMER, QFormerConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
BETWEEN = ("qformer", "vision_norm", "projector")
QFORMER = dataclasses.replace(TINY_QFORMER, num_query_tokens=16, use_text_input=False)

# The original Q-Former is initialized from BERT, this one with the embeddings of the tiny T5.
WORDS = ("qformer/words", "shipped:tiny_t5.safetensors#language/embedding")


def get_config(name: str = "tiny_blip2", qformer: QFormerConfig = QFORMER, weights=llava["BACKBONES"]) -> Experiment:
    """The experiment."""
    model = dataclasses.replace(llava["SYSTEM"], qformer=qformer, keep_class_token=True, vision_norm_eps=1e-5)
    return llava["experiment"](
        name, model, (llava["stage"]("between", 800, BETWEEN, llava["WORDS"], optimizer="muon"),), weights
    )
