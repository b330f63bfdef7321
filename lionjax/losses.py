# SPDX-License-Identifier: Apache-2.0
"""Losses that systems are trained with. Everything is summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lionjax.interfaces import Metrics


def token_cross_entropy(logits_BMV, target_BM, loss_mask_BM) -> tuple[jax.Array, Metrics]:
    """Mean over learned tokens of -log p(target); metrics: weight (tokens), token_accuracy.

    A batch without a learned token has loss 0, not NaN.
    """
    logits_BMV = logits_BMV.astype(jnp.float32)
    mask_BM = loss_mask_BM.astype(jnp.float32)
    chosen_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    nats_BM = jax.nn.logsumexp(logits_BMV, axis=-1) - chosen_BM
    tokens = mask_BM.sum()
    right_BM = (logits_BMV.argmax(-1) == target_BM) * mask_BM
    mean = 1 / jnp.maximum(tokens, 1)
    return (nats_BM * mask_BM).sum() * mean, {"weight": tokens, "token_accuracy": right_BM.sum() * mean}
