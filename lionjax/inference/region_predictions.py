# SPDX-License-Identifier: Apache-2.0
"""Compiled predictions of boxes and masks: at the tokens of given answers, and of what generated answers kept."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lionjax.core.types import VLM, Batch, Params


@functools.partial(jax.jit, static_argnames=("model",))
def predict_boxes(model: VLM, params: Params, batch: Batch):
    """Boxes (B, K, 4) at the triggers of the given answers, and which are real."""
    box_BK4, _, real_BK = model.predict_boxes(params, batch)
    return box_BK4, real_BK


@functools.partial(jax.jit, static_argnames=("model",))
def predict_mask_logits(model: VLM, params: Params, batch: Batch, aux_outputs, count_B):
    """Mask logits (B, K, h, w) of the first `count_B` places that answers kept."""
    asked_BK = jnp.arange(aux_outputs["state"].shape[1]) < count_B[:, None]
    return model.predict_masks(params, batch, aux_outputs.get("box"), aux_outputs["state"], asked_BK)[0]
