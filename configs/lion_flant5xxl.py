# SPDX-License-Identifier: Apache-2.0
"""LION-12B: lion_flant5xl.py with FlanT5-XXL."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.language.t5 import FLAN_T5_XXL

smaller = runpy.run_path(str(Path(__file__).with_name("lion_flant5xl.py")))["get_config"]


def get_config() -> Experiment:
    """The schedule of lion_flant5xl.py with InstructBLIP's batch size for FlanT5-XXL."""
    return smaller(FLAN_T5_XXL, "flan_t5_xxl", 64)
