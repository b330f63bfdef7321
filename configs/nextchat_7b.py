# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat-7B: CLIP ViT-L/14-336, Vicuna-7B-v1.5 and SAM ViT-H in the paper's three stages (arXiv 2311.04498).

Text and boxes, then instructions, then masks with everything frozen but the mask prompts and SAM's decoder. Needs the
public weights, converted once with `lionjax convert`; Vicuna's with the five added tokens. Steps, learning rate, batch
size, rows of at most 4096 tokens and annotation files are those of the released code: Shikra's, and its own of masks.
Mixture weights: in the first stage about proportional to the files' sizes, as the released code concatenates them; in
the second, half instructions (Shikra-RD and a third of LLaVA's) and half five equal streams.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.models.vision.sam_encoder import SAM_VIT_H
from lionjax.models.vision.vit import CLIP_VIT_L
from lionjax.models.vlm.nextchat import NextChat

shikra = runpy.run_path(str(Path(__file__).with_name("shikra_7b.py")))
llava = shikra["llava"]
WORDS_AND_BOXES = ("language", "projector", "locations")
MASKS = ("mask_prompts", "sam/decoder")
PRETRAIN = (
    Mix("rec", 3.0, source="refcoco"),
    Mix("reg", 3.0, source="refcoco"),
    Mix("vqa", 4.0, source="vqav2"),
    Mix("caption", 4.0, source="captions"),
    Mix("rec", 3.5, source="genome"),
    Mix("reg", 2.0, source="genome"),
    Mix("grounded", 1.5, source="flickr"),
    Mix("conversation", 2.0, source="vcr"),
    Mix("box_vqa", 2.0, source="visual7w"),
)
INSTRUCT = (
    Mix("conversation", 4.5, source="llava"),
    Mix("conversation", 0.25, source="shikra_rd"),
    Mix("conversation", 0.25, source="shikra_rd_more"),
    *shikra["QUESTIONS"],
    Mix("caption", 0.7, source="captions"),
    Mix("reg", 0.3, source="genome"),
)
ROW_TOKENS, PROMPT_TOKENS = 4096, 1024  # the prompt's with those of the image
SOURCES = (
    *(source for source in shikra["SHIKRA_FILES"] if source.name != "point_local"),
    shikra["LLAVA"],
    ShikraJsonl("data/nextchat/res3.jsonl", "data/coco/train2014", name="masks"),
)


def stage(name: str, steps: int, trainable: tuple[str, ...], mixture: tuple, **fields) -> Stage:
    """A stage at 2e-5 with LLaVA's schedule."""
    return llava["stage"](name, steps, 64, 2e-5, trainable, mixture, **fields)


def get_config() -> Experiment:
    """The experiment."""
    processor = llava["chat_processor"](
        "vicuna_7b_nextchat",
        "nextchat",
        image_size=336,
        pad_to_square=True,
        num_image_tokens=CLIP_VIT_L.num_patches,
        box_format="embeddings",
        max_boxes=8,
        sam_image_size=SAM_VIT_H.image_size,
        **llava["row_lengths"](0, ROW_TOKENS, PROMPT_TOKENS),
    )
    stages = (
        stage("pretrain", 65_000, WORDS_AND_BOXES, PRETRAIN),
        stage("instruct", 4_950, WORDS_AND_BOXES, INSTRUCT),
        stage("masks", 5_950, MASKS, (Mix("res", 1.0, source="masks"),), model_overrides=(("objective", "masks"),)),
    )
    weights = {"vision": "clip_vit_l_336", "language": "vicuna_7b_nextchat", "sam": "sam_vit_h"}
    return llava["experiment"]("nextchat_7b", llava["full_size"](NextChat()), processor, stages, weights, SOURCES)
