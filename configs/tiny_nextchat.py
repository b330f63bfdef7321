# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat on synthetic scenes: trains on a laptop, a small decoder from scratch with the frozen tiny ViT and SAM.

The three stages of configs/nextchat_7b.py. With `--data.processor.box_format digits` (as Shikra) or `bins` (location
tokens, as Kosmos-2) the same model writes boxes as text instead of embeddings. In the mixtures, `rec@digits` and
`rec@bins` do so for one task, so that one run compares all three formats.
"""

import dataclasses

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.nextchat import NextChat

WORDS_AND_BOXES = ("language", "projector", "locations")
MASKS = ("mask_prompts", "sam/decoder")
PRETRAIN = (
    Mix("rec", 3.0),
    Mix("rec", 0.5, boxes="digits"),
    Mix("rec", 0.5, boxes="bins"),
    Mix("reg", 2.0),
    Mix("box_vqa", 1.0),
    Mix("grounded", 1.0),
    Mix("caption", 1.0),
    Mix("vqa", 3.0),
)
INSTRUCT = (*PRETRAIN, Mix("existence", 1.0), Mix("relation", 0.5), Mix("conversation", 0.5))
VOCAB_SIZE, BINS = (
    1024,
    32,
)  # of the tiny tokenizer; location tokens per side of the grid, with ids after the vocabulary
TOKEN_IDS = {"image_token_id": 21, "trigger_token_id": 19, "box_token_id": 20}

SYSTEM = NextChat(
    vision=TINY_VIT,
    language=dataclasses.replace(
        TINY_DECODER, vocab_size=VOCAB_SIZE + BINS**2, mlp_dim=384, rope_theta=10_000.0, tie_embeddings=False
    ),
    sam=TINY_SAM,
    feature_layer=-1,
    box_mlp_dim=256,
    num_mask_prompt_tokens=2,
    box_scale=float(TINY_SAM.image_size),
    max_boxes=6,
    **TOKEN_IDS,
)
PROCESSOR = ProcessorConfig(
    image_size=TINY_VIT.image_size,
    **{"max_prompt_tokens": 136, "max_question_tokens": 1, "max_target_tokens": 40},
    use_tags=False,
    pad_to_square=True,
    prompt_template="{image} {question}",
    num_image_tokens=TINY_VIT.num_patches,
    box_format="embeddings",
    location_bins_per_side=BINS,
    max_boxes=6,
    sam_image_size=TINY_SAM.image_size,
)


def get_config() -> Experiment:
    """The experiment."""
    shared = {"batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01, "clip_norm": 1.0}
    return Experiment(
        name="tiny_nextchat",
        model=SYSTEM,
        data=DataConfig(sources=(Scenes(sizes=(3000, 300, 400), image_size=192),), processor=PROCESSOR),
        stages=(
            Stage("pretrain", 600, WORDS_AND_BOXES, PRETRAIN, **shared),
            Stage("instruct", 300, WORDS_AND_BOXES, INSTRUCT, **shared),
            Stage("masks", 200, MASKS, (Mix("res", 1.0),), model_overrides=(("objective", "masks"),), **shared),
        ),
        run=RunConfig(log_every=20, save_every=200, max_to_keep=2, frozen_dtype="float32", cache_features=True),
        weights=(Weights("vision", "shipped:tiny_vit.safetensors"), Weights("sam", "shipped:tiny_sam.safetensors")),
    )
