# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl on synthetic scenes: tiny_llava.py with an abstractor; trains ViT and abstractor, then a LoRA on q and v.

The second stage also has text-only questions, with the scene described in the prompt.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.models.connectors.perceiver import AbstractorConfig
from lionjax.nn.lora import LoraConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer
INSTRUCTIONS = (*llava["WORDS"], Mix("vqa", 1.0, template="told"))
VISION = ("vision", "vision_norm", "latents", "projector", "last_word")


def get_config() -> Experiment:
    """The experiment."""
    model = llava["SYSTEM"]
    model = dataclasses.replace(
        model,
        language=dataclasses.replace(model.language, lora=LoraConfig(8, 32.0, 0.05)),
        resampler=AbstractorConfig(128, 2, 4, 256, 16, dropout=0.0),
        keep_class_token=True,
        vision_norm_eps=1e-6,
        add_image_end_token=True,
        image_token_id=IMAGE_TOKEN,
        prepend_image=False,
    )
    vision = llava["stage"]("eyes", 700, VISION, (*llava["WORDS"][:2], Mix("caption", 1.5, template="plain")), 1.5e-3)
    stages = (
        # The ViT is aligned with the T5's embeddings already, and would lose that at the abstractor's learning rate.
        dataclasses.replace(vision, lr_multipliers=(("vision", 0.1),)),
        llava["stage"]("instruct", 100, (".*/lora_[ab]",), INSTRUCTIONS),
    )
    return llava["experiment"](
        "tiny_mplug_owl", model, stages, max_prompt_tokens=64, prompt_template="{image} {question}"
    )
