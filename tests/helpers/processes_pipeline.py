# SPDX-License-Identifier: Apache-2.0
"""A config for `lionjax train`: a small LLaVA on scenes that lie in a folder as ArrayRecord (SMALL_SCENES)."""

import os

from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

SIDE, PATCH_TOKEN = 28, 21  # <im_patch> of the tiny tokenizer


def get_config():
    """Read by the real Grain pipeline, over as many processes as there are."""
    text = {"prompt_length": 32, "question_length": 1, "target_length": 8, "tags": False, "reader": "decoder"}
    return Experiment(
        name="small",
        model=VisualPrefixLM(
            ViTConfig(SIDE, 14, 16, 2, 2, 24),
            DecoderConfig(1024, 16, 1, 2, 2, 8, 24, pad_token_id=0, bos_token_id=1, eos_token_id=1),
            image_token_id=PATCH_TOKEN,
        ),
        data=DataConfig(
            sources=(Scenes((12, 4, 12), image_size=56, folder=os.environ["SMALL_SCENES"]),),
            processor=ProcessorConfig(
                image_size=SIDE, prompt_template="USER: {image} {question} ASSISTANT:", image_token=PATCH_TOKEN, **text
            ),
        ),
        stages=(Stage("one", 4, ("projector", "language"), (("vqa", 1.0),), 8, learning_rate=1e-2, warmup_steps=1),),
        run=RunConfig(log_every=1, save_every=2, frozen_dtype="float32", evaluate_limit=0),
        mesh=MeshConfig(-1, 1, 1),
    )
