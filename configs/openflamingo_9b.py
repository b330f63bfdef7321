# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo 9B: CLIP ViT-L/14, MPT-7B, and a look at the pictures before every fourth layer (arXiv 2308.01390).

Only the resampler, the gated looks and the rows of the new words learn. Wants the parts that `lionjax convert --system
flamingo` makes of CLIP and MPT. Rates are the release's; its data (pairs of LAION, pages of MMC4) are not here, and a
task stands for each of them. LAION's loss counts a fifth of MMC4's, as in the training that the release describes.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, RunConfig, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B, Flamingo

LEARNED = ("resampler", "language/groups/cross", "language/embedding")


def get_config(
    system: Flamingo = OPENFLAMINGO_9B, name: str = "openflamingo_9b", language: str = "mpt_7b"
) -> Experiment:
    """The whole run; another size may be put in."""
    pairs = Stage(
        "pairs",
        60_000,
        LEARNED,
        (("caption", 1.0), ("vqa", 1.0)),
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
                reader="decoder",
                prompt_template="{image} {question}",
                image_token=system.image_token_id,
            ),
        ),
        stages=(pairs,),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            ("vision", "weights/clip_vit_l_224/params.safetensors"),
            ("language", f"weights/{name}/params.safetensors"),
        ),
        generation=GenerationDefaults(num_beams=3, max_new_tokens=20),
    )
