# SPDX-License-Identifier: Apache-2.0
"""Losses of given answers: each with its prompt, or several candidates behind one prompt, which is read once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lionjax.core.types import VLM, Array, Batch, Params
from lionjax.nn.kv_cache import repeat_rows
from lionjax.nn.losses import sequence_nll


@functools.partial(jax.jit, static_argnames=("model",))
def target_nll(model: VLM, params: Params, batch: Batch):
    """-log p of the given answers, summed over their tokens: (B,)."""
    return sequence_nll(model.logits(params, batch), batch.target_BM, batch.loss_mask_BM)


@functools.partial(jax.jit, static_argnames=("model",))
def candidate_nll(model: VLM, params: Params, batch: Batch, target_BKM: Array, loss_mask_BKM: Array) -> Array:
    """-log p (B, K) of K candidates for each prompt, summed over their tokens where `loss_mask_BKM` is 1.

    The prompt is read once; the candidates' tokens are read one by one against its cache, as beams are.
    """
    rows, num_candidates, length = target_BKM.shape
    logits_BV, cache = model.prefill(params, batch, length - 1)
    cache = repeat_rows(cache, num_candidates)
    target_MR = target_BKM.reshape(-1, length).T
    mask_MR = loss_mask_BKM.reshape(-1, length).T

    def loss_of(logits_RV, token_R, mask_R):
        logits_RV = logits_RV.astype(jnp.float32)
        chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits_RV, axis=-1) - chosen_R) * mask_R

    def step(cache, inputs):
        read_R, token_R, mask_R = inputs
        logits_RV, cache = model.extend(params, read_R, cache)
        return cache, loss_of(logits_RV, token_R, mask_R)

    first_R = loss_of(jnp.repeat(logits_BV, num_candidates, axis=0), target_MR[0], mask_MR[0])
    _, rest_MR = jax.lax.scan(step, cache, (target_MR[:-1], target_MR[1:], mask_MR[1:]))
    return (first_R + rest_MR.sum(axis=0)).reshape(rows, num_candidates)
