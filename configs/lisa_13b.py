# SPDX-License-Identifier: Apache-2.0
"""LISA-13B: lisa_7b.py with LLaVA-13B."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.lisa import LISA_13B

smaller = runpy.run_path(str(Path(__file__).with_name("lisa_7b.py")))["get_config"]


def get_config() -> Experiment:
    """The schedule of lisa_7b.py."""
    return smaller(LISA_13B, "lisa_13b", "llava_lightning_13b")
