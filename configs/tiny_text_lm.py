# SPDX-License-Identifier: Apache-2.0
"""A small decoder alone, trained on captions of synthetic scenes: what ZeroCap and MAGIC guide by a CLIP.

It never sees an image. SimCTG's loss (arXiv 2202.06417) spreads its states apart, which contrastive search wants.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vlm.text_lm import TextLM


def get_config() -> Experiment:
    """The experiment."""
    model = TextLM(dataclasses.replace(TINY_DECODER, mlp_dim=256), contrastive_margin=0.5)
    rates = {"learning_rate": 3e-3, "warmup_steps": 20, "weight_decay": 0.01}
    return Experiment(
        name="tiny_text_lm",
        model=model,
        data=DataConfig(
            sources=(Scenes(sizes=(6000, 300, 400), image_size=16),),  # images are not read
            processor=ProcessorConfig(
                image_size=1, max_prompt_tokens=24, max_question_tokens=1, max_target_tokens=64, use_tags=False
            ),
        ),
        stages=(Stage("captions", 400, (".*",), (Mix("caption"),), 32, optimizer="muon", **rates),),
        run=RunConfig(log_every=20, save_every=200, max_to_keep=2, frozen_dtype="float32"),
        generation=GenerationDefaults(max_new_tokens=64),
    )
