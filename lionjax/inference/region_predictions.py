# SPDX-License-Identifier: Apache-2.0
"""Compiled predictions of boxes and masks: at the tokens of given answers, and of what generated answers kept."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import VLM, Batch, Params
from lionjax.data.letterbox import Letterbox
from lionjax.inference.generate import GenerateOutput
from lionjax.inference.slots import with_pooled_features
from lionjax.models.vision.sam_decoder import postprocess_masks


@functools.partial(jax.jit, static_argnames=("model",))
def predict_boxes(model: VLM, params: Params, batch: Batch, image_B=None, pool: Any = None):
    """Boxes (B, K, 4) at the triggers of the given answers, and which are real.

    `pool`: features of images (see `image_pool`), of which row b has those at
    `image_B[b]`; without it the batch's images are read.
    """
    batch = with_pooled_features(batch, image_B, pool)
    box_BK4, _, real_BK = model.predict_boxes(params, batch)
    return box_BK4, real_BK


@functools.partial(jax.jit, static_argnames=("model",))
def predict_mask_logits(model: VLM, params: Params, batch: Batch, aux_outputs, count_B):
    """Mask logits (B, K, h, w) of the first `count_B` places that answers kept."""
    asked_BK = jnp.arange(aux_outputs["state"].shape[1]) < count_B[:, None]
    return model.predict_masks(params, batch, aux_outputs.get("box"), aux_outputs["state"], asked_BK)[0]


def count_masks(
    mask_token: int | None, location_token: int | None, prompt_BL, prompt_mask_BL, output: GenerateOutput
) -> np.ndarray:
    """How many masks each answer has (B,), at most as many as states were kept; 0 where the system keeps none.

    `mask_token`: the token of prompts and answers that is itself a place, or None; `location_token`: the token in
    answers behind which a box was decoded.
    """
    if output.aux_outputs is None:
        return np.zeros(len(output.ids_BM), int)
    num_states = output.aux_outputs["state"].shape[1]
    if mask_token is None:  # a trigger at the very end has no place behind it
        return np.minimum((output.ids_BM == location_token).sum(axis=1), num_states)
    in_prompt_B = ((prompt_BL == mask_token) & np.asarray(prompt_mask_BL).astype(bool)).sum(axis=1)
    return np.minimum(in_prompt_B + (output.ids_BM == mask_token).sum(axis=1), num_states)


def masks_in_images(logits_BKHW, count_B, image_sizes, pixels: int, corner: bool) -> list[np.ndarray]:
    """The masks (K, height, width) of each answer's places in its image of (width, height).

    `pixels`: the side of SAM's square; `corner`: whether the image lies in its upper left corner, not in its center.
    """
    masks = []
    for logits_KHW, count, (width, height) in zip(logits_BKHW, count_B, image_sizes):
        inside = Letterbox(width, height, corner).pixel_rect(pixels)
        masks.append(postprocess_masks(logits_KHW[:count], pixels, inside, (height, width)) > 0)
    return masks
