# SPDX-License-Identifier: Apache-2.0
"""A Frozen on scenes: two words of the mean of all patches; the tower learns, the language model does not."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.config import Experiment

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The whole run."""
    system = dataclasses.replace(llava["SYSTEM"], projector_depth=1, words=2)
    stages = (llava["stage"]("eyes", 400, ("vision", "projector"), llava["WORDS"], 5e-4),)
    return llava["experiment"]("tiny_frozen", system, stages)
