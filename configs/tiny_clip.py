# SPDX-License-Identifier: Apache-2.0
"""CLIP at a tiny size (arXiv 2103.00020), trained on captions of synthetic scenes: it finds a scene by its caption.

The image tower starts from the shipped tiny ViT, whose patch embedding stays as it is. `python -m
benchmarks.frozen_lms` trains it and measures retrieval.
"""

import dataclasses

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.tokenizer import TINY_VOCAB_SIZE
from lionjax.models.language.clip_text import ClipTextConfig
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.clip import Clip

TEXT_TOKENS = 64
TEXT = ClipTextConfig(
    vocab_size=TINY_VOCAB_SIZE,
    max_positions=TEXT_TOKENS,
    width=128,
    depth=3,
    num_heads=4,
    mlp_dim=384,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)


def get_config() -> Experiment:
    """The experiment."""
    model = Clip(dataclasses.replace(TINY_VIT, post_layernorm=True), TEXT, embed_dim=64, max_logit_scale=100.0)
    rates = {"learning_rate": 2e-3, "warmup_steps": 30, "weight_decay": 0.05}
    stage = Stage("contrast", 180, ("(?!vision/patch/).*",), (Mix("caption"),), 64, optimizer="muon", **rates)
    processor = ProcessorConfig(
        image_size=TINY_VIT.image_size,
        max_prompt_tokens=24,
        max_question_tokens=24,
        max_target_tokens=TEXT_TOKENS,
        use_tags=False,
    )
    return Experiment(
        name="tiny_clip",
        model=model,
        data=DataConfig(sources=(Scenes(sizes=(6000, 300, 400), image_size=TINY_VIT.image_size),), processor=processor),
        stages=(stage,),
        run=RunConfig(log_every=20, save_every=60, max_to_keep=2, frozen_dtype="float32"),
        weights=(Weights("vision", "shipped:tiny_vit.safetensors"),),
    )
