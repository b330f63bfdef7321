# SPDX-License-Identifier: Apache-2.0
"""Losses that systems are trained with. Everything is summed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lionjax.core.types import Metrics


def token_cross_entropy(logits_BMV, target_BM, loss_mask_BM) -> tuple[jax.Array, Metrics]:
    """Mean over learned tokens of -log p(target); metrics: weight (tokens), token_accuracy.

    A batch without a learned token has loss 0, not NaN.
    """
    return label_smoothed_cross_entropy(logits_BMV, target_BM, loss_mask_BM, 0.0)


def label_smoothed_cross_entropy(
    logits_BMV, target_BM, loss_mask_BM, label_smoothing: float
) -> tuple[jax.Array, Metrics]:
    """`token_cross_entropy` where a share `smoothing` of each label is spread evenly over all classes."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    mask_BM = loss_mask_BM.astype(jnp.float32)
    chosen_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    if label_smoothing:
        chosen_BM = (1 - label_smoothing) * chosen_BM + label_smoothing * logits_BMV.mean(axis=-1)
    nats_BM = jax.nn.logsumexp(logits_BMV, axis=-1) - chosen_BM
    tokens = mask_BM.sum()
    right_BM = (logits_BMV.argmax(-1) == target_BM) * mask_BM
    mean = 1 / jnp.maximum(tokens, 1)
    return (nats_BM * mask_BM).sum() * mean, {"weight": tokens, "token_accuracy": right_BM.sum() * mean}


def sequence_nll(logits_BMV, target_BM, loss_mask_BM) -> jax.Array:
    """-log p of each row's answer, summed over its tokens: (B,). What candidates are ranked by (BLIP-2)."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    chosen_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits_BMV, axis=-1) - chosen_BM) * loss_mask_BM).sum(axis=1)


def per_dataset_cross_entropy(
    logits_BMV, target_BM, loss_mask_BM, dataset_B, dataset_weights: tuple[float, ...]
) -> tuple[jax.Array, Metrics]:
    """The sum over data sets of a weight times the mean over their tokens (Flamingo, arXiv 2204.14198, section 2.4).

    `part_B` numbers each row's data set, from 0; a data set without a row adds nothing.
    """
    mask_BM = loss_mask_BM.astype(jnp.float32)
    nats_B = sequence_nll(logits_BMV, target_BM, mask_BM)
    of_part_BN = (dataset_B[:, None] == jnp.arange(len(dataset_weights))).astype(jnp.float32)
    tokens_N = mask_BM.sum(axis=1) @ of_part_BN
    mean_N = (nats_B @ of_part_BN) / jnp.maximum(tokens_N, 1)
    right_BM = (logits_BMV.argmax(-1) == target_BM) * mask_BM
    tokens = mask_BM.sum()
    return (mean_N * jnp.asarray(dataset_weights)).sum(), {
        "weight": tokens,
        "token_accuracy": right_BM.sum() / jnp.maximum(tokens, 1),
    }


def masked_mean(value_BK, valid_BK) -> jax.Array:
    """Mean over the real entries, and over any axes behind them; 0 when nothing is real."""
    value_BK = value_BK.astype(jnp.float32)
    behind = value_BK.ndim - valid_BK.ndim
    real = valid_BK.astype(bool).reshape(*valid_BK.shape, *(1,) * behind)
    size = math.prod(value_BK.shape[valid_BK.ndim :])
    return jnp.where(real, value_BK, 0).sum() / (jnp.maximum(valid_BK.astype(jnp.float32).sum(), 1) * size)


def iou(box_a_BK4, box_b_BK4) -> jax.Array:
    """Intersection over union of boxes x0 y0 x1 y1: (B, K)."""
    return _iou_and_hull_penalty(box_a_BK4, box_b_BK4)[0]


def generalized_iou(box_a_BK4, box_b_BK4) -> jax.Array:
    """GIoU (arXiv 1902.09630) of boxes x0 y0 x1 y1, in -1..1: (B, K).

    A box that is reversed or flat has no area but keeps its corners: the hull around both pulls in what lies outside.
    """
    overlap, void = _iou_and_hull_penalty(box_a_BK4, box_b_BK4)
    return overlap - void


def _iou_and_hull_penalty(box_a_BK4, box_b_BK4) -> tuple[jax.Array, jax.Array]:
    """The shares of the union that both cover, and of the hull that neither covers."""
    low = jnp.minimum(box_a_BK4, box_b_BK4)
    high = jnp.maximum(box_a_BK4, box_b_BK4)

    def area(side_BK2):
        side_BK2 = jnp.maximum(side_BK2, 0)
        return side_BK2[..., 0] * side_BK2[..., 1]

    both = area(low[..., 2:] - high[..., :2])
    either = area(box_a_BK4[..., 2:] - box_a_BK4[..., :2]) + area(box_b_BK4[..., 2:] - box_b_BK4[..., :2]) - both
    hull = area(jnp.maximum(high[..., 2:], high[..., :2]) - jnp.minimum(low[..., 2:], low[..., :2]))
    # Above the square of the smallest box that a float32 can tell in 0..1; below it a ratio says nothing.
    tiny = 1e-12
    return both / jnp.maximum(either, tiny), (hull - either) / jnp.maximum(hull, tiny)


def giou_loss(predicted_BK4, target_BK4, valid_BK, released_code: bool = False) -> jax.Array:
    """Mean of 1 - GIoU over real boxes. `original`: NExT-Chat's, which leaves out predictions that are reversed."""
    if released_code:
        valid_BK = valid_BK.astype(bool) & (predicted_BK4[..., 2:] >= predicted_BK4[..., :2]).all(-1)
    return masked_mean(1 - generalized_iou(predicted_BK4, target_BK4), valid_BK)


def mask_losses(
    logits_BKhw, iou_BK, mask_BKHW, valid_BK, released_code: bool = False, upsample_fn: Callable = lambda x: x
) -> dict[str, jax.Array]:
    """Focal, dice and IoU losses of predicted masks against true ones; SAM weighs them 20 : 1 : 1.

    As intended: the focal loss of each pixel (0.8, gamma 2), dice smoothed by 1, and the squared error of the
    predicted IoU, each a mean over real masks. `original`: NExT-Chat's code, where the number of masks in the batch
    stands for both constants, the focal loss is that of a mask's mean cross entropy, masks begin at a logit of 0.5, and
    focal and dice are sums over masks. `enlarge` brings logits to the size of the true masks. A k at which no row of
    the batch has a real mask costs nothing.
    """
    count = jnp.maximum(valid_BK.astype(jnp.float32).sum(), 1)

    def one(given):
        *prediction, mask_BHW, real_B = given
        return jax.lax.cond(
            real_B.any(),
            lambda x, iou, y: _per_mask_losses(upsample_fn(x), iou, y, count, released_code),
            lambda x, iou, y: (jnp.zeros(iou.shape),) * 3,
            *(*prediction, mask_BHW),
        )

    places = (logits_BKhw, iou_BK.astype(jnp.float32), mask_BKHW, valid_BK.astype(bool))
    by_place = jax.lax.map(jax.checkpoint(one), tuple(x.swapaxes(0, 1) for x in places))
    focal, dice, iou_error = (masked_mean(x.swapaxes(0, 1), valid_BK) for x in by_place)
    scale = count if released_code else 1.0
    return {"focal": focal * scale, "dice": dice * scale, "iou": iou_error}


def _per_mask_losses(logits_BHW, iou_B, mask_BHW, num_masks, released_code: bool):
    """Focal loss, dice loss and squared error of the IoU of each mask, in float32."""
    x, y = logits_BHW.astype(jnp.float32), mask_BHW.astype(jnp.float32)
    share, pixels = jax.nn.sigmoid(x), (-2, -1)
    nats = jax.nn.softplus(x) - x * y
    alpha, smooth = (num_masks, num_masks) if released_code else (0.8, 1.0)
    seen = (x >= 0.5 if released_code else x > 0).astype(jnp.float32)
    both = (seen * y).sum(pixels)
    iou_error = jnp.square(iou_B - both / (seen.sum(pixels) + y.sum(pixels) - both + 1e-7))
    dice = 1 - (2 * (share * y).sum(pixels) + smooth) / (share.sum(pixels) + y.sum(pixels) + smooth)
    if released_code:
        nats = nats.mean(pixels)
    focal = alpha * jnp.square(1 - jnp.exp(-nats)) * nats
    return focal if released_code else focal.mean(pixels), dice, iou_error


def asymmetric_loss(logits_BV, target_BV, gamma_neg: float = 7.0, clip: float = 0.05) -> jax.Array:
    """The asymmetric loss of taggers (arXiv 2009.14119) as RAM sets it, summed over all tags of all samples.

    Tags that are absent and known to be so hardly count: 1 - p is raised by `clip`, and its logarithm weighed by what
    is missing to 1, to the power of `negative`. No gradient goes through that weight.
    """
    target_BV = target_BV.astype(bool)
    there_BV = jax.nn.sigmoid(logits_BV.astype(jnp.float32))
    absent_BV = jnp.minimum(1 - there_BV + clip, 1)
    weight_BV = jax.lax.stop_gradient(1 - absent_BV) ** gamma_neg
    logs_BV = jnp.log(jnp.maximum(jnp.where(target_BV, there_BV, absent_BV), 1e-8))
    return -(jnp.where(target_BV, 1, weight_BV) * logs_BV).sum()
