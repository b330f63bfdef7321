# SPDX-License-Identifier: Apache-2.0
"""MiniGPT-4 7B: BLIP-2's ViT and Q-Former, a linear projector, Vicuna-7B; trains the projector (arXiv 2304.10592).

Captions, then a few thousand long descriptions. Needs the public weights, converted once with `lionjax convert`; ViT,
Q-Former and norm are those of BLIP-2. Learning rates, batch sizes and steps are those of the released code.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import MINIGPT4_7B

CAPTIONS = (Mix("caption", 1.0),)
PLAIN_CAPTIONS = (Mix("caption", 1.0, template="plain"),)
BLIP2 = "blip2_flant5xxl"

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config() -> Experiment:
    """The experiment."""
    processor = llava["chat_processor"](
        "vicuna_7b", "minigpt4", ProcessorConfig.max_prompt_tokens, max_target_tokens=160
    )
    shared = {"warmup_learning_rate": 1e-6, "weight_decay": 0.05}
    align = {"learning_rate": 1e-4, "end_learning_rate": 8e-5, "warmup_steps": 5000}
    describe = {"learning_rate": 3e-5, "end_learning_rate": 1e-5, "warmup_steps": 200}
    return llava["experiment"](
        "minigpt4_7b",
        llava["full_size"](MINIGPT4_7B),
        processor,
        (
            Stage("align", 20_000, ("projector",), PLAIN_CAPTIONS, 256, **align, **shared),
            Stage("describe", 1000, ("projector",), CAPTIONS, 12, **describe, **shared),
        ),
        {"vision": BLIP2, "vision_norm": BLIP2, "qformer": BLIP2, "language": "vicuna_7b"},
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        generation=GenerationDefaults(repetition_penalty=1.05, max_new_tokens=300),
    )
