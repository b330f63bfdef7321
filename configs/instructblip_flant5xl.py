# SPDX-License-Identifier: Apache-2.0
"""InstructBLIP with FlanT5-XL: a BLIP-2 whose Q-Former reads the instruction, tuned on instructions (arXiv 2305.06500).

The parts of blip2_flant5xl.py with one stage that trains the Q-Former and the projector.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.models.vlm.visual_prefix import INSTRUCTBLIP_FLAN_T5_XL, VisualPrefixLM

blip2 = runpy.run_path(str(Path(__file__).with_name("blip2_opt27b.py")))
INSTRUCTIONS = (Mix("caption", 1.0), Mix("vqa", 2.0), Mix("existence", 0.5))


def get_config(
    system: VisualPrefixLM = INSTRUCTBLIP_FLAN_T5_XL,
    name: str = "instructblip_flant5xl",
    language: str = "flan_t5_xl",
    batch_size: int = 192,
) -> Experiment:
    """The experiment; the arguments select another language model."""
    stage = Stage(
        "instruct",
        60_000,
        blip2["BETWEEN"],
        INSTRUCTIONS,
        batch_size,
        learning_rate=1e-5,
        warmup_steps=1000,
        warmup_learning_rate=1e-8,
        weight_decay=0.05,
    )
    generation = GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256)
    return blip2["get_config"](system, name, language, (stage,), generation)
