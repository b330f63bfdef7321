# SPDX-License-Identifier: Apache-2.0
"""LISA-7B: LLaVA-7B with CLIP ViT-L/14 at 224 pixels, and SAM ViT-H with its mask decoder (arXiv 2308.00692).

Trains LoRA of rank 8 on queries and values, the word table and head, the [SEG] projector and SAM's mask decoder, on a
9:3:3:1 mixture of semantic segmentation, referring segmentation, conversations and ReasonSeg. Batch, rate, steps,
schedule, loss weights and files are those of the released code, without Mapillary, whose labels are no class numbers.
Each question is a row of its own; the released code asks up to three about an image. Needs the public weights,
converted once with `lionjax convert`; LLaVA's (its first version, v1-1) with the tokens [SEG], <im_start> and <im_end>.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.label_maps import LabelMaps
from lionjax.data.datasets.reason_seg import ReasonSeg
from lionjax.data.datasets.refer import Refer
from lionjax.data.image_fit import ImageFit
from lionjax.models.vision.sam_encoder import SAM_VIT_H
from lionjax.models.vlm.lisa import LISA_7B, Lisa
from lionjax.nn.lora import LoraConfig

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))
LORA = LoraConfig(rank=8, alpha=16.0, dropout=0.05, target_modules=("q", "v"))
TRAINABLE = ("language/.*/lora_[ab]", "language/embedding", "language/head", "mask_prompts", "sam/decoder")
SEMANTIC = (
    LabelMaps("data/ade20k/images", "data/ade20k/annotations", "data/ade20k/classes.json", name="ade20k"),
    LabelMaps(
        "data/coco/train2017", "data/cocostuff/train2017", "data/cocostuff/classes.txt", 0, "-", name="cocostuff"
    ),
    Coco("data/coco", captions_file="", instances_file="paco_lvis_v1_train.json", image_dir=".", name="paco"),
    Coco("data/pascal_part", captions_file="", instances_file="train.json", image_dir="JPEGImages", name="pascal_part"),
)
REFERRING = (
    Refer("data/refer/refclef", "data/refer/saiapr_tc-12", name="refclef"),
    Refer("data/refer/refcoco", "data/coco/train2014", name="refcoco"),
    Refer("data/refer/refcoco+", "data/coco/train2014", name="refcoco+"),
    Refer("data/refer/refcocog", "data/coco/train2014", "refs(umd).p", name="refcocog"),
)
INSTRUCTIONS = Conversations("data/llava/llava_instruct_150k.json", "data/coco", name="llava")
REASONING = ReasonSeg("data/reason_seg", "data/reason_seg", name="reason_seg")
MIXTURE = (
    *(Mix("res", 9 / len(SEMANTIC), source=source.name) for source in SEMANTIC),
    *(Mix("res", 3 / len(REFERRING), source=source.name) for source in REFERRING),
    Mix("conversation", 3.0, source=INSTRUCTIONS.name),
    Mix("res", 1.0, source=REASONING.name),
)
ROW_TOKENS, PROMPT_TOKENS = 512, 384  # the prompt's with those of the image


def get_config(model: Lisa = LISA_7B, name: str = "lisa_7b", language: str = "llava_lightning_7b") -> Experiment:
    """The experiment; the arguments select another size."""
    side = model.vision.image_size
    processor = llava["chat_processor"](
        language,
        "lisa",
        image_size=side,
        image_fit=ImageFit("shortest_edge"),
        num_image_tokens=model.vision.num_patches,
        box_format="masks",
        max_boxes=3,
        sam_image_size=SAM_VIT_H.image_size,
        sam_padding="corner",
        **llava["row_lengths"](0, ROW_TOKENS, PROMPT_TOKENS),
    )
    schedule = {"learning_rate": 3e-4, "warmup_steps": 100, "warmup_learning_rate": 0.0, "decay": "linear"}
    # 2 rows on each of 8 devices, accumulated 10 times.
    stage = Stage(
        "masks", 5_000, TRAINABLE, MIXTURE, 160, 10, **schedule, weight_decay=0.0, betas=(0.9, 0.95), clip_norm=1.0
    )
    model = llava["full_size"](model)
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, lora=LORA))
    weights = {"vision": f"clip_vit_l_{side}", "language": language, "projector": language, "sam": "sam_vit_h"}
    sources = (*SEMANTIC, *REFERRING, INSTRUCTIONS, REASONING)
    answer = GenerationDefaults(max_new_tokens=ROW_TOKENS - PROMPT_TOKENS)
    return llava["experiment"](name, model, processor, (stage,), weights, sources, generation=answer)
