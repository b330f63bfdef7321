# SPDX-License-Identifier: Apache-2.0
"""LION on synthetic scenes: trains in minutes on a laptop, with the tiny frozen backbones that ship with the project.

The three stages of configs/lion_flant5xl.py with other sizes, steps and learning rates.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, RunConfig, Weights
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.connectors.qformer import TINY_QFORMER, AggregatorConfig
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.lion import Lion
from lionjax.nn.adapters import AdapterConfig

lion = runpy.run_path(str(Path(__file__).with_name("lion_flant5xl.py")))
IMAGE_LEVEL = (Mix("vqa", 5.0), Mix("existence", 2.0), Mix("relation", 1.0), Mix("caption", 1.5), Mix("tags", 0.5))
REGION_LEVEL = (Mix("rec", 3.0), Mix("reg", 1.0))
SHARED = {
    "batch_size": 32,
    "learning_rate": 5e-4,  # half of the first stage's: the aggregator is initialized as identity
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}

SYSTEM = Lion(
    vision=TINY_VIT,
    qformer=TINY_QFORMER,
    aggregator=AggregatorConfig(
        query_layer=5, context_layers=(3, 1), width=128, num_heads=4, mlp_dim=256, dropout=0.0, projector_mlp_dim=256
    ),
    language=dataclasses.replace(TINY_T5, adapters=AdapterConfig(32)),
    soft_prompt_token_id=3,
    identity_init_scale=2.5,  # the shipped ViT is aligned with the shipped T5's embeddings
)
DATA = DataConfig(
    sources=(Scenes(sizes=(3000, 300, 400), image_size=192),),
    processor=ProcessorConfig(image_size=112, max_prompt_tokens=72, max_question_tokens=28, max_target_tokens=40),
    tag_noise=0.1,
    tag_dropout=0.5,
)
RUN = RunConfig(log_every=20, save_every=200, max_to_keep=2, frozen_dtype="float32", cache_features=True)


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="tiny_lion",
        model=SYSTEM,
        data=DATA,
        stages=lion["stages"]((300, 400, 400), IMAGE_LEVEL, REGION_LEVEL, SHARED, image_rate=1e-3),
        run=RUN,
        weights=(Weights("vision", "shipped:tiny_vit.safetensors"), Weights("language", "shipped:tiny_t5.safetensors")),
    )
