# SPDX-License-Identifier: Apache-2.0
"""MiniGPT-4 7B: BLIP-2's ViT and Q-Former, a linear projector, Vicuna-7B; trains the projector (arXiv 2304.10592).

Captions, then a few thousand long descriptions. Needs the public weights, converted once with `lionjax convert`; ViT,
Q-Former and norm are those of BLIP-2. Learning rates, batch sizes and steps are those of the released code.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import MINIGPT4_7B

CAPTIONS = (Mix("caption", 1.0),)
PLAIN_CAPTIONS = (Mix("caption", 1.0, template="plain"),)
BLIP2 = "weights/blip2_flant5xxl/params.safetensors"


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="minigpt4_7b",
        model=dataclasses.replace(
            MINIGPT4_7B,
            vision=dataclasses.replace(MINIGPT4_7B.vision, remat="full"),
            language=dataclasses.replace(MINIGPT4_7B.language, remat="full"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            sources=(Coco("data/coco"),),
            processor=ProcessorConfig(
                tokenizer="weights/vicuna_7b",
                max_question_tokens=1,
                max_target_tokens=160,
                use_tags=False,
                prompt_template="###Human: <Img>{image}</Img> {question} ###Assistant:",
                followup_template="###Human: {question} ###Assistant:",
                caption_end="\n",
                answer_end="###",
            ),
        ),
        stages=(
            Stage(
                "align",
                20_000,
                ("projector",),
                PLAIN_CAPTIONS,
                256,
                learning_rate=1e-4,
                warmup_steps=5000,
                warmup_learning_rate=1e-6,
                end_learning_rate=8e-5,
                weight_decay=0.05,
            ),
            Stage(
                "describe",
                1000,
                ("projector",),
                CAPTIONS,
                12,
                learning_rate=3e-5,
                warmup_steps=200,
                warmup_learning_rate=1e-6,
                end_learning_rate=1e-5,
                weight_decay=0.05,
            ),
        ),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", BLIP2),
            Weights("vision_norm", BLIP2),
            Weights("qformer", BLIP2),
            Weights("language", "weights/vicuna_7b/params.safetensors"),
        ),
        generation=GenerationDefaults(repetition_penalty=1.05, max_new_tokens=300),
    )
