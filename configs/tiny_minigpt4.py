# SPDX-License-Identifier: Apache-2.0
"""MiniGPT-4 on synthetic scenes: ViT and Q-Former of a trained tiny_blip2.py, and a linear projector that is trained.

Plain captions, then questions in MiniGPT-4's template. Needs the weights of that run:

    lionjax train configs/tiny_blip2.py --workdir runs/tiny_blip2
    lionjax convert runs/tiny_blip2 runs/tiny_blip2_jax --to jax
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Weights

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
blip2 = runpy.run_path(str(Path(__file__).with_name("tiny_blip2.py")))
BLIP2_WEIGHTS = "runs/tiny_blip2_jax/params.safetensors"
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(blip2["get_config"]().model, image_token_id=IMAGE_TOKEN)
    stages = (
        llava["stage"]("align", 150, ("projector",), (Mix("caption", 1.0, template="plain"),), 3e-3),
        llava["stage"]("describe", 150, ("projector",), llava["WORDS"], 1e-3),
    )
    weights = (*llava["BACKBONES"], Weights("qformer", BLIP2_WEIGHTS), Weights("vision_norm", BLIP2_WEIGHTS))
    return llava["experiment"](
        "tiny_minigpt4",
        model,
        stages,
        weights,
        max_prompt_tokens=48,
        prompt_template="###Human: <Img>{image}</Img> {question} ###Assistant:",
    )
