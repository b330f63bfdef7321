# SPDX-License-Identifier: Apache-2.0
"""InstructBLIP with Vicuna-7B-v1.1: instructblip_flant5xl.py with a decoder-only model and its batch size."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.visual_prefix import INSTRUCTBLIP_VICUNA_7B

smaller = runpy.run_path(str(Path(__file__).with_name("instructblip_flant5xl.py")))["get_config"]


def get_config() -> Experiment:
    """The schedule of instructblip_flant5xl.py."""
    return smaller(INSTRUCTBLIP_VICUNA_7B, "instructblip_vicuna7b", "vicuna_7b_v1_1", 128)
