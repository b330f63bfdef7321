# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 13B: llava15_7b.py with Vicuna-13B-v1.5."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.visual_prefix import LLAVA_15_13B

smaller = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))["get_config"]


def get_config() -> Experiment:
    """The schedule of llava15_7b.py."""
    return smaller(LLAVA_15_13B, "llava15_13b", "vicuna_13b")
