# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo 9B: CLIP ViT-L/14, MPT-7B, gated cross-attention before every fourth layer (arXiv 2308.01390).

Trains the resampler, the gated cross-attention and the embeddings of the new tokens. Needs the parts that `lionjax
convert --system flamingo` makes from CLIP and MPT. Learning rates, batch size (128 LAION pairs and 128 MMC4 pages) and
lengths (pages of at most 256 tokens and 6 images) are those of the released code. Its shards are read as a list of
image and caption, and as pages in the form of conversations: each round is `<image>` and the text after it. The loss of
LAION has 1/5 of the weight of MMC4's, as in the paper.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B, Flamingo

TRAINABLE = ("resampler", "language/groups/cross", "language/embedding")
SOURCES = (
    KarpathyCaptions("data/laion/captions.json", "data/laion/images", name="laion"),
    Conversations("data/mmc4/pages.jsonl", "data/mmc4/images", name="mmc4"),
)
MIXTURE = (Mix("caption", 1.0, source="laion", template="plain"), Mix("conversation", 1.0, source="mmc4"))

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config(
    system: Flamingo = OPENFLAMINGO_9B, name: str = "openflamingo_9b", language: str = "mpt_7b"
) -> Experiment:
    """The experiment; the arguments select another size."""
    pairs = Stage(
        "pairs",
        60_000,
        TRAINABLE,
        MIXTURE,
        256,
        learning_rate=1e-4,
        warmup_steps=5000,
        warmup_learning_rate=0.0,
        end_learning_rate=1e-4,
        weight_decay=0.1,
    )
    ends = {"shot_end": "<|endofchunk|>", "answer_end": "<|endofchunk|>", "caption_end": "<|endofchunk|>"}
    lengths = {"max_prompt_tokens": 64, "max_target_tokens": 256, "max_images": 6}
    processor = llava["chat_processor"](
        language, "{image} {question}", followup_template="{question}", **ends, **lengths
    )
    return llava["experiment"](
        name,
        llava["full_size"](system, dataset_loss_weights=(0.2, 1.0)),
        processor,
        (pairs,),
        {"vision": "clip_vit_l_224", "language": name},
        SOURCES,
        generation=GenerationDefaults(num_beams=3, max_new_tokens=20),
    )
