# SPDX-License-Identifier: Apache-2.0
"""Shikra 7B: the parts of the first LLaVA, boxes written as digits (arXiv 2306.15195).

Trains projector and language model together from the first step on. Needs the public weights, converted once with
`lionjax convert`; Vicuna's with three added image tokens. Learning rate, batch size and steps are those of the released
code; its annotation files are replaced by similar tasks.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import SHIKRA_7B

PRETRAIN = (Mix("rec", 3.0), Mix("reg", 2.0), Mix("caption", 2.0), Mix("vqa", 2.0))
INSTRUCTIONS = (Mix("vqa", 2.0), Mix("caption", 1.0), Mix("existence", 0.5), Mix("rec", 1.0), Mix("reg", 0.5))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image} {question} ASSISTANT:"
)


def stage(name: str, steps: int, mixture: tuple) -> Stage:
    """A stage at 2e-5 with 3% warm-up and no weight decay."""
    return Stage(
        name,
        steps,
        ("projector", "language"),
        mixture,
        64,
        learning_rate=2e-5,
        warmup_steps=round(0.03 * steps),
        warmup_learning_rate=0.0,
        weight_decay=0.0,
    )


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="shikra_7b",
        model=dataclasses.replace(
            SHIKRA_7B,
            vision=dataclasses.replace(SHIKRA_7B.vision, remat="full"),
            language=dataclasses.replace(SHIKRA_7B.language, remat="full"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            sources=(Coco("data/coco"), RefCoco("data/refcoco/train.json", "data/coco/images")),
            processor=ProcessorConfig(
                tokenizer="weights/vicuna_7b",
                max_question_tokens=1,
                max_prompt_tokens=512,
                use_tags=False,
                pad_to_square=True,
                prompt_template=VICUNA,
                num_image_tokens=1,
            ),
        ),
        stages=(stage("places", 100_000, PRETRAIN), stage("instruct", 20_000, INSTRUCTIONS)),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", "weights/clip_vit_l_224/params.safetensors"),
            Weights("language", "weights/vicuna_7b/params.safetensors"),
        ),
        generation=GenerationDefaults(max_new_tokens=256),
    )
