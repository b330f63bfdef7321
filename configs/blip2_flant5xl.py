# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 with FlanT5-XL (arXiv 2301.12597): blip2_opt27b.py with an encoder-decoder and the paper's batch size."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.visual_prefix import BLIP2_FLAN_T5_XL

base = runpy.run_path(str(Path(__file__).with_name("blip2_opt27b.py")))


def get_config() -> Experiment:
    """The experiment."""
    stages = (dataclasses.replace(base["CAPTIONS"], batch_size=1520),)
    return base["get_config"](BLIP2_FLAN_T5_XL, "blip2_flant5xl", "flan_t5_xl", stages)
