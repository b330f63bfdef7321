# SPDX-License-Identifier: Apache-2.0
"""Frozen on synthetic scenes (arXiv 2106.13884): two prefix tokens from mean-pooled patches; trains the ViT."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(llava["SYSTEM"], num_prefix_tokens=2, image_token_id=IMAGE_TOKEN)
    stages = (llava["stage"]("eyes", 900, ("vision", "projector"), llava["WORDS"], 5e-4),)
    return llava["experiment"]("tiny_frozen", model, stages, prompt_template="{image} {question}")
