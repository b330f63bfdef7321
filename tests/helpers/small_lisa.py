# SPDX-License-Identifier: Apache-2.0
"""A tiny LISA: NExT-Chat's tiny parts, with a mask token and no boxes."""

import dataclasses

import small_nextchat
import text_batches

from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.lisa import Lisa

PROCESSOR = ProcessorConfig(  # of the tiny tokenizer, whose <extra_id_5> nothing else uses
    image_size=16,
    **{"max_prompt_tokens": 60, "max_question_tokens": 1, "max_target_tokens": 16},
    use_tags=False,
    reader="decoder",
    prompt_template="{image} {question}",
    followup_template="{question}",
    num_image_tokens=4,
    box_format="masks",
    mask_token="<extra_id_5>",
    max_boxes=3,
    sam_image_size=32,
    sam_padding="corner",
)
SEG = 8  # its id
MASK = small_nextchat.TRIGGER
TINY = Lisa(
    vision=small_nextchat.TINY.vision,
    language=small_nextchat.TINY.language,
    sam=small_nextchat.TINY.sam,
    image_token_id=-200,
    mask_token_id=MASK,
    max_masks=3,
)


def batch_of(prompts, answers=None, sam=True):
    """As `small_nextchat.batch_of`, with the placeholder of LISA for the image."""
    batch = small_nextchat.batch_of(prompts, answers, sam=sam)
    prompt_BL, mask_BL = text_batches.padded([[1, *[-200] * 4, *prompt] for prompt in prompts])
    return dataclasses.replace(batch, prompt_BL=prompt_BL, prompt_mask_BL=mask_BL, boxes_BK4=None, boxes_mask_BK=None)
