# SPDX-License-Identifier: Apache-2.0
"""A Shikra on scenes: tiny_llava.py, whose linear is trained with the language model at once; boxes are digits."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The whole run."""
    mixture = (("rec", 5.0), ("reg", 1.0), ("vqa", 3.0), ("caption", 1.0))
    stages = (llava["stage"]("speak", 300, ("projector", "language"), mixture, 7e-4, 24),)
    return llava["experiment"]("tiny_shikra", llava["SYSTEM"], stages, prompt_length=72)
