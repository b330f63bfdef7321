# SPDX-License-Identifier: Apache-2.0
"""Shikra on synthetic scenes (arXiv 2306.15195): tiny_llava.py in one stage, boxes written as digits."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The experiment."""
    mixture = (Mix("rec", 5.0), Mix("reg", 1.0), Mix("vqa", 3.0), Mix("caption", 1.0))
    stages = (llava["stage"]("speak", 300, ("projector", "language"), mixture, 7e-4, 24),)
    return llava["experiment"]("tiny_shikra", llava["SYSTEM"], stages, max_prompt_tokens=72)
