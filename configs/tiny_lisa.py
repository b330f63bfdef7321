# SPDX-License-Identifier: Apache-2.0
"""LISA on synthetic scenes: the tiny T5 with the frozen tiny ViT and SAM, whose mask decoder is trained.

First referring segmentation, captions with a mask for each object, and questions with words for answers; then also
questions whose object must be inferred.
"""

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.lisa import Lisa

TRAINABLE = ("language", "projector", "mask_prompts", "sam/decoder")
REFERRING = (Mix("res", 5.0), Mix("grounded", 1.0), Mix("vqa", 2.0))
REASONING = (Mix("reason", 5.0), Mix("res", 3.0), Mix("grounded", 1.0), Mix("vqa", 1.0))
MASK_TOKEN = "<extra_id_5>"  # a token of the tiny tokenizer that nothing else uses
SYSTEM = Lisa(
    vision=TINY_VIT,
    language=TINY_T5,
    sam=TINY_SAM,
    feature_layer=-1,
    image_token_id=21,
    mask_token_id=8,
    max_masks=6,
    identity_init_scale=0.08,  # the shipped ViT is aligned with the shipped T5, and its features are 31 times as large
)
PROCESSOR = ProcessorConfig(
    image_size=TINY_VIT.image_size,
    **{"max_prompt_tokens": 96, "max_question_tokens": 1, "max_target_tokens": 32},
    use_tags=False,
    prompt_template="{image} {question}",
    followup_template="{question}",
    num_image_tokens=TINY_VIT.num_patches,
    box_format="masks",
    mask_token=MASK_TOKEN,
    max_boxes=6,
    sam_image_size=TINY_SAM.image_size,
    sam_padding="corner",
)


def get_config() -> Experiment:
    """The experiment."""
    shared = {"batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 30, "weight_decay": 0.01, "clip_norm": 1.0}
    shared["lr_multipliers"] = (("language", 0.7),)
    return Experiment(
        name="tiny_lisa",
        model=SYSTEM,
        data=DataConfig(sources=(Scenes(sizes=(3000, 300, 400), image_size=TINY_VIT.image_size),), processor=PROCESSOR),
        stages=(
            Stage("referring", 430, TRAINABLE, REFERRING, **shared),
            Stage("reasoning", 430, TRAINABLE, REASONING, **shared),
        ),
        run=RunConfig(log_every=20, save_every=100, max_to_keep=2, frozen_dtype="float32", cache_features=True),
        weights=(
            Weights("vision", "shipped:tiny_vit.safetensors"),
            Weights("language", "shipped:tiny_t5.safetensors"),
            Weights("sam", "shipped:tiny_sam.safetensors"),
        ),
    )
