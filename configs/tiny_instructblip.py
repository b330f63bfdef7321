# SPDX-License-Identifier: Apache-2.0
"""InstructBLIP on synthetic scenes (arXiv 2305.06500): tiny_blip2.py with a Q-Former that reads the question."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

blip2 = runpy.run_path(str(Path(__file__).with_name("tiny_blip2.py")))


def get_config() -> Experiment:
    """The experiment."""
    return blip2["get_config"](
        "tiny_instructblip",
        dataclasses.replace(blip2["QFORMER"], use_text_input=True),
        (*blip2["llava"]["BACKBONES"], blip2["WORDS"]),
    )
