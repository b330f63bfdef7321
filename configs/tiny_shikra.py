# SPDX-License-Identifier: Apache-2.0
"""A Shikra on scenes: tiny_llava.py with one linear, trained with the language model at once; boxes are digits."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.config import Experiment

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The whole run."""
    system = dataclasses.replace(llava["SYSTEM"], projector_depth=1)
    stages = (llava["stage"]("speak", 800, ("projector", "language"), rate=5e-4),)
    return llava["experiment"]("tiny_shikra", system, stages)
