# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo 9B: CLIP ViT-L/14, MPT-7B, gated cross-attention before every fourth layer (arXiv 2308.01390).

Trains the resampler, the gated cross-attention and the embeddings of the new tokens. Needs the parts that `lionjax
convert --system flamingo` makes from CLIP and MPT. Learning rates are those of the released code; each of its datasets
(LAION pairs, MMC4 pages) is replaced by a task. The loss of LAION has 1/5 of the weight of MMC4's, as in the paper.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage
from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B, Flamingo

TRAINABLE = ("resampler", "language/groups/cross", "language/embedding")

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


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
    processor = llava["chat_processor"](language, "{image} {question}", max_target_tokens=32)
    return llava["experiment"](
        name,
        llava["full_size"](system, dataset_loss_weights=(0.2, 1.0)),
        processor,
        (pairs,),
        {"vision": "clip_vit_l_224", "language": name},
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        generation=GenerationDefaults(num_beams=3, max_new_tokens=20),
    )
