# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo 9B: CLIP ViT-L/14, MPT-7B, gated cross-attention before every fourth layer (arXiv 2308.01390).

Trains the resampler, the gated cross-attention and the embeddings of the new tokens. Needs the parts that `lionjax
convert --system flamingo` makes from CLIP and MPT. Learning rates are those of the released code; each of its datasets
(LAION pairs, MMC4 pages) is replaced by a task. The loss of LAION has 1/5 of the weight of MMC4's, as in the paper.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B, Flamingo

TRAINABLE = ("resampler", "language/groups/cross", "language/embedding")


def get_config(
    system: Flamingo = OPENFLAMINGO_9B, name: str = "openflamingo_9b", language: str = "mpt_7b"
) -> Experiment:
    """The experiment; the arguments select another size."""
    pairs = Stage(
        "pairs",
        60_000,
        TRAINABLE,
        (Mix("caption", 1.0), Mix("vqa", 1.0)),
        128,
        learning_rate=1e-4,
        warmup_steps=5000,
        warmup_learning_rate=0.0,
        end_learning_rate=1e-4,
        weight_decay=0.1,
    )
    return Experiment(
        name=name,
        model=dataclasses.replace(
            system,
            dataset_loss_weights=(0.2, 1.0),
            vision=dataclasses.replace(system.vision, remat="full"),
            language=dataclasses.replace(system.language, remat="full"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            sources=(Coco("data/coco"),),
            processor=ProcessorConfig(
                tokenizer=f"weights/{language}",
                max_question_tokens=1,
                max_prompt_tokens=256,
                max_target_tokens=32,
                use_tags=False,
                prompt_template="{image} {question}",
            ),
        ),
        stages=(pairs,),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", "weights/clip_vit_l_224/params.safetensors"),
            Weights("language", f"weights/{name}/params.safetensors"),
        ),
        generation=GenerationDefaults(num_beams=3, max_new_tokens=20),
    )
