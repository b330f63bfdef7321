# SPDX-License-Identifier: Apache-2.0
"""A tiny NExT-Chat and its batches."""

import dataclasses

import numpy as np
import text_batches
from text_batches import padded

from lionjax.core.types import Batch
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.vit import CLIP_VIT_L
from lionjax.models.vlm.nextchat import NextChat

IMAGE, TRIGGER, LOCATION, END = 40, 41, 42, 2
IDS = {"image_token_id": IMAGE, "trigger_token_id": TRIGGER, "box_token_id": LOCATION}

TINY = NextChat(
    vision=dataclasses.replace(
        CLIP_VIT_L, image_size=16, patch_size=8, width=8, depth=2, num_heads=2, mlp_dim=12, activation="gelu"
    ),
    language=DecoderConfig(vocab_size=44, width=16, depth=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24),
    sam=SamConfig(
        *(32, 8, 8, 2, 2, 12, 2, (1,), 8),  # the image encoder, in the order of its fields
        mask_input_channels=4,
        decoder_num_heads=2,
        decoder_mlp_dim=8,
        iou_head_mlp_dim=8,
    ),
    box_mlp_dim=12,
    num_mask_prompt_tokens=2,
    box_scale=32.0,
    max_boxes=5,
    **IDS,
)


def batch_of(prompts, answers=None, boxes=None, sam=True) -> Batch:
    """Prompts (after four image tokens) and answers as lists of ids; boxes as lists of four numbers for each row."""
    rows, random = len(prompts), np.random.default_rng(0)

    boxes = boxes or [[]] * rows
    most = max(1, *map(len, boxes))
    box, real = np.zeros((rows, most, 4), np.float32), np.zeros((rows, most), bool)
    for row, given in enumerate(boxes):
        box[row, : len(given)], real[row, : len(given)] = np.reshape(given, (-1, 4)), True
    pictures = random.standard_normal((rows, 32, 32, 3)).astype(np.float32)
    return text_batches.batch_of(
        pictures[:, ::2, ::2],
        padded([[1, *[IMAGE] * 4, *prompt] for prompt in prompts]),
        padded(answers or [[]] * rows),
        boxes_BK4=box,
        boxes_mask_BK=real,
        masks_BKHW=random.random((rows, box.shape[1], 32, 32)) < 0.5,
        sam_image_BHWC=pictures if sam else None,
    )
