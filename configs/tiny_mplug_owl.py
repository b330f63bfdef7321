# SPDX-License-Identifier: Apache-2.0
"""An mPLUG-Owl on scenes: tiny_llava.py with an abstractor between; first the eyes learn, then a LoRA on q and v.

Captions are learned alone at first; to the second stage's questions some are added of scenes that are told in words,
not shown.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.connectors.perceiver import AbstractorConfig
from lionjax.nn.lora import LoraConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer
TALK = (*llava["WORDS"], ("vqa@told", 1.0))
EYES = ("vision", "vision_norm", "latents", "projector", "last_word")


def get_config() -> Experiment:
    """The whole run."""
    system = llava["SYSTEM"]
    system = dataclasses.replace(
        system,
        language=dataclasses.replace(system.language, lora=LoraConfig(8, 32.0, 0.05)),
        resampler=AbstractorConfig(128, 2, 4, 256, 16, dropout=0.0),
        keep_class_token=True,
        vision_norm_eps=1e-6,
        add_image_end_token=True,
        image_token_id=IMAGE_TOKEN,
        prepend_image=False,
    )
    eyes = llava["stage"]("eyes", 700, EYES, (*llava["WORDS"][:2], ("caption@plain", 1.5)), 1.5e-3)
    stages = (
        # The tower speaks in the language model's words already, which it would forget at the abstractor's rate.
        dataclasses.replace(eyes, lr_multipliers=(("vision", 0.1),)),
        llava["stage"]("instruct", 100, (".*/lora_[ab]",), TALK),
    )
    return llava["experiment"](
        "tiny_mplug_owl", system, stages, prompt_length=64, image_token=IMAGE_TOKEN, template="{image} {question}"
    )
