# SPDX-License-Identifier: Apache-2.0
"""A MiniGPT-4 on scenes: eyes and Q-Former of a tiny_blip2.py that has learned, and one linear, all that trains.

Captions alone first, then questions in its template. Wants that run in our names first:

    lionjax train configs/tiny_blip2.py --workdir runs/tiny_blip2
    lionjax convert runs/tiny_blip2 runs/tiny_blip2_jax --to jax
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
blip2 = runpy.run_path(str(Path(__file__).with_name("tiny_blip2.py")))
EYES = "runs/tiny_blip2_jax/params.safetensors"
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The whole run."""
    system = dataclasses.replace(blip2["get_config"]().system, image_token_id=IMAGE_TOKEN)
    stages = (
        llava["stage"]("align", 150, ("projector",), (("caption@plain", 1.0),), 3e-3),
        llava["stage"]("describe", 150, ("projector",), llava["WORDS"], 1e-3),
    )
    weights = (*llava["BACKBONES"], ("qformer", EYES), ("vision_norm", EYES))
    return llava["experiment"](
        "tiny_minigpt4",
        system,
        stages,
        weights,
        image_token=IMAGE_TOKEN,
        prompt_length=48,
        template="###Human: <Img>{image}</Img> {question} ###Assistant:",
    )
