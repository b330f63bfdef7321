# SPDX-License-Identifier: Apache-2.0
"""Masks at a token of the answer, without boxes: LISA's embedding-as-mask (arXiv 2308.00692, section 3.1).

Wherever a text has the mask token, [SEG], the hidden state that predicts it is the embedding of a mask. It is projected
to one prompt of SAM's mask decoder.
"""

from __future__ import annotations

import jax.numpy as jnp

from lionjax.core.types import Batch
from lionjax.models.heads import region
from lionjax.models.vision import sam_decoder
from lionjax.nn import losses
from lionjax.nn.layers import take_positions


def gather_mask_states(is_token_BL, before_BLD, count: int):
    """States (B, K, D) that predict the first `count` tokens marked in each row, and their mask (B, K).

    `before_BLD`: the state that predicts each token.
    """
    position_BK, valid_BK = region.first_k_positions(is_token_BL, count)
    return take_positions(before_BLD, position_BK), valid_BK


def mask_token_losses(batch: Batch, logits_BKhw, valid_BK, image_size: int, dice_scale: float) -> dict:
    """Cross entropy of the pixels and Dice loss at the size of the true masks (see `losses.bce_dice_losses`).

    `image_size`: side of SAM's input.
    """
    side = batch.masks_BKHW.shape[-2:]
    inner_B2 = batch.sam_size_B2
    if inner_B2 is None:
        inner_B2 = jnp.full((len(valid_BK), 2), image_size)
    outer_B2 = inner_B2 if batch.mask_size_B2 is None else batch.mask_size_B2
    row_BH1, column_B1W = (jnp.arange(side[axis]) < outer_B2[:, axis, None] for axis in (0, 1))

    def enlarge(logits_Bhw):
        return sam_decoder.image_mask_logits(logits_Bhw[:, None], image_size, inner_B2, outer_B2, side)[:, 0]

    pixel_BHW = row_BH1[:, :, None] & column_B1W[:, None]
    return losses.bce_dice_losses(logits_BKhw, batch.masks_BKHW, valid_BK, pixel_BHW, dice_scale, enlarge)


def keep_state(state_BD, kept: dict) -> dict:
    """`kept` with the last state, in the slot of the next mask: that of a mask token, if one follows.

    `kept`: states (1, B, K, D) and the number of mask tokens (1, B) read so far. States beyond K are dropped.
    """
    is_slot_BK = jnp.arange(kept["state"].shape[2]) == kept["count"][0][:, None]
    state = jnp.where(is_slot_BK[None, ..., None], state_BD[None, :, None], kept["state"])
    return {"state": state, "count": kept["count"]}
