# SPDX-License-Identifier: Apache-2.0
"""An mPLUG-Owl on scenes: tiny_llava.py with an abstractor between; first the eyes learn, then a LoRA on q and v."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.bridges.latents import AbstractorConfig
from lionjax.config import Experiment
from lionjax.layers import LoraConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
EYES = ("vision", "vision_norm", "latents", "projector", "last_word")


def get_config() -> Experiment:
    """The whole run."""
    system = llava["SYSTEM"]
    system = dataclasses.replace(
        system,
        language=dataclasses.replace(system.language, lora=LoraConfig(8, 32.0)),
        latents=AbstractorConfig(128, 2, 4, 256, 16, dropout=0.0),
        class_token=True, vision_eps=1e-6, projector_depth=1, closing=True,
    )  # fmt: skip
    stages = (
        llava["stage"]("eyes", 400, EYES, rate=5e-4),
        llava["stage"]("instruct", 400, (".*/lora_[ab]",)),
    )
    return llava["experiment"]("tiny_mplug_owl", system, stages)
