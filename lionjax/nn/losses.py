# SPDX-License-Identifier: Apache-2.0
"""Training losses: token cross entropy, image-text contrast, boxes (GIoU), masks (focal, Dice), tags (asymmetric loss).

All in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lionjax.core.types import Metrics


def token_cross_entropy(logits_BMV, target_BM, loss_mask_BM) -> tuple[jax.Array, Metrics]:
    """Mean of -log p(target) over the tokens in `loss_mask_BM`; metrics: weight (number of tokens), token_accuracy.

    A batch without such a token has loss 0, not NaN.
    """
    return label_smoothed_cross_entropy(logits_BMV, target_BM, loss_mask_BM, 0.0)


def label_smoothed_cross_entropy(
    logits_BMV, target_BM, loss_mask_BM, label_smoothing: float
) -> tuple[jax.Array, Metrics]:
    """`token_cross_entropy` with a fraction `label_smoothing` of each label spread uniformly over all classes."""
    return mean_over_tokens(*token_sums(logits_BMV, target_BM, loss_mask_BM, label_smoothing))


def token_sums(logits_BMV, target_BM, loss_mask_BM, label_smoothing: float = 0.0) -> tuple[jax.Array, ...]:
    """Sum of -log p(target), number of likeliest tokens that are the target, and number of tokens in `loss_mask_BM`."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    mask_BM = loss_mask_BM.astype(jnp.float32)
    target_logit_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target_logit_BM = (1 - label_smoothing) * target_logit_BM + label_smoothing * logits_BMV.mean(axis=-1)
    nll_BM = jax.nn.logsumexp(logits_BMV, axis=-1) - target_logit_BM
    correct_BM = (logits_BMV.argmax(-1) == target_BM) * mask_BM
    return (nll_BM * mask_BM).sum(), correct_BM.sum(), mask_BM.sum()


def mean_over_tokens(nll, correct, tokens) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of `token_cross_entropy` from the sums of `token_sums`."""
    mean = 1 / jnp.maximum(tokens, 1)
    return nll * mean, {"weight": tokens, "token_accuracy": correct * mean}


def sequence_nll(logits_BMV, target_BM, loss_mask_BM) -> jax.Array:
    """-log p of the answer of each row (B,), summed over its tokens; used to rank candidate answers (BLIP-2)."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    target_logit_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits_BMV, axis=-1) - target_logit_BM) * loss_mask_BM).sum(axis=1)


def per_dataset_cross_entropy(
    logits_BMV, target_BM, loss_mask_BM, dataset_B, dataset_weights: tuple[float, ...]
) -> tuple[jax.Array, Metrics]:
    """Weighted sum over datasets of their mean token loss (Flamingo, arXiv 2204.14198, section 2.4), and metrics.

    `dataset_B`: index of the dataset of each row, from 0. A dataset without a row adds 0.
    """
    mask_BM = loss_mask_BM.astype(jnp.float32)
    nll_B = sequence_nll(logits_BMV, target_BM, mask_BM)
    one_hot_BN = (dataset_B[:, None] == jnp.arange(len(dataset_weights))).astype(jnp.float32)
    tokens_N = mask_BM.sum(axis=1) @ one_hot_BN
    mean_N = (nll_B @ one_hot_BN) / jnp.maximum(tokens_N, 1)
    correct_BM = (logits_BMV.argmax(-1) == target_BM) * mask_BM
    tokens = mask_BM.sum()
    return (mean_N * jnp.asarray(dataset_weights)).sum(), {
        "weight": tokens,
        "token_accuracy": correct_BM.sum() / jnp.maximum(tokens, 1),
    }


def image_text_contrast(image_to_text_BB, text_to_image_BB, label_smoothing: float = 0.0) -> jax.Array:
    """Contrastive loss (InfoNCE, as in CLIP, arXiv 2103.00020) of B images and their B texts: cross entropy both ways.

    The logits are those of each image with all texts, and of each text with all images, the own ones on the diagonal.
    """
    own_B = jnp.arange(len(image_to_text_BB))
    losses = (
        label_smoothed_cross_entropy(logits_BB, own_B, jnp.ones_like(own_B), label_smoothing)[0]
        for logits_BB in (image_to_text_BB, text_to_image_BB)
    )
    return sum(loss / 2 for loss in losses)


def sigmoid_contrast(logits_BB) -> jax.Array:
    """Sigmoid contrastive loss (SigLIP, arXiv 2303.15343) of B image-text pairs: log-sigmoids of all pairs, per image.

    Pairs on the diagonal belong together; the sum over the texts of an image is averaged over the images.
    """
    logits_BB = logits_BB.astype(jnp.float32)
    sign_BB = 2 * jnp.eye(len(logits_BB)) - 1
    return -jax.nn.log_sigmoid(sign_BB * logits_BB).sum(axis=1).mean()


def masked_mean(value_BK, valid_BK) -> jax.Array:
    """Mean of the valid entries (B, K), over their trailing axes too; 0 if none is valid."""
    value_BK = value_BK.astype(jnp.float32)
    trailing = value_BK.ndim - valid_BK.ndim
    valid = valid_BK.astype(bool).reshape(*valid_BK.shape, *(1,) * trailing)
    size = math.prod(value_BK.shape[valid_BK.ndim :])
    return jnp.where(valid, value_BK, 0).sum() / (jnp.maximum(valid_BK.astype(jnp.float32).sum(), 1) * size)


def iou(box_a_BK4, box_b_BK4) -> jax.Array:
    """Intersection over union (B, K) of boxes (x0, y0, x1, y1)."""
    return _iou_and_hull_penalty(box_a_BK4, box_b_BK4)[0]


def generalized_iou(box_a_BK4, box_b_BK4) -> jax.Array:
    """GIoU (arXiv 1902.09630) of boxes (x0, y0, x1, y1): (B, K) in -1..1.

    A reversed or flat box has area 0, but the hull spans its corners, so that it still has a gradient.
    """
    overlap, penalty = _iou_and_hull_penalty(box_a_BK4, box_b_BK4)
    return overlap - penalty


def _iou_and_hull_penalty(box_a_BK4, box_b_BK4) -> tuple[jax.Array, jax.Array]:
    """IoU, and the fraction of the hull (smallest enclosing box) outside the union."""
    low = jnp.minimum(box_a_BK4, box_b_BK4)
    high = jnp.maximum(box_a_BK4, box_b_BK4)

    def area(side_BK2):
        side_BK2 = jnp.maximum(side_BK2, 0)
        return side_BK2[..., 0] * side_BK2[..., 1]

    intersection = area(low[..., 2:] - high[..., :2])
    areas = area(box_a_BK4[..., 2:] - box_a_BK4[..., :2]) + area(box_b_BK4[..., 2:] - box_b_BK4[..., :2])
    union = areas - intersection
    hull = area(jnp.maximum(high[..., 2:], high[..., :2]) - jnp.minimum(low[..., 2:], low[..., :2]))
    # Areas below the square of float32's resolution in 0..1 are rounding errors, and so are their ratios.
    min_area = 1e-12
    return intersection / jnp.maximum(union, min_area), (hull - union) / jnp.maximum(hull, min_area)


def giou_loss(predicted_BK4, target_BK4, valid_BK, released_code: bool = False) -> jax.Array:
    """Mean of 1 - GIoU over the valid boxes. `released_code`: without reversed predictions, as in NExT-Chat's code."""
    if released_code:
        valid_BK = valid_BK.astype(bool) & (predicted_BK4[..., 2:] >= predicted_BK4[..., :2]).all(-1)
    return masked_mean(1 - generalized_iou(predicted_BK4, target_BK4), valid_BK)


def mask_losses(
    logits_BKhw, iou_BK, mask_BKHW, valid_BK, released_code: bool = False, upsample_fn: Callable = lambda x: x
) -> dict[str, jax.Array]:
    """Focal, Dice and IoU losses of predicted masks (B, K, h, w) against true masks; SAM weights them 20 : 1 : 1.

    In the paper: focal loss per pixel (alpha 0.8, gamma 2), Dice smoothed by 1, and squared error of the predicted IoU,
    each a mean over the valid masks. `released_code`: as NExT-Chat's code, where alpha and the smoothing are the number
    of masks in the batch, the focal loss is that of the mean cross entropy of a mask, masks are thresholded at a logit
    of 0.5, and focal and Dice are sums over masks. `upsample_fn` resizes logits to the size of the true masks. An index
    k without a valid mask in the batch is not computed.
    """
    count = jnp.maximum(valid_BK.astype(jnp.float32).sum(), 1)

    def per_mask(x_BHW, iou_B, mask_BHW):
        return _per_mask_losses(upsample_fn(x_BHW), iou_B, mask_BHW, count, released_code)

    arrays = (logits_BKhw, iou_BK.astype(jnp.float32), mask_BKHW)
    focal, dice, iou_error = _mean_over_masks(per_mask, arrays, valid_BK, 3)
    scale = count if released_code else 1.0
    return {"focal": focal * scale, "dice": dice * scale, "iou": iou_error}


def bce_dice_losses(
    logits_BKhw, mask_BKHW, valid_BK, pixel_BHW, dice_scale: float = 1000.0, upsample_fn: Callable = lambda x: x
) -> dict[str, jax.Array]:
    """Cross entropy of the pixels and Dice loss of predicted masks against true masks, as in LISA (arXiv 2308.00692).

    Both are means over all valid masks of the batch: of the mean over a mask's pixels, and of
    1 - (2 sum(p t) / s + e) / ((sum(p) + sum(t)) / s + e) with s = `dice_scale`, e = 1e-6. `pixel_BHW`: 1 on the pixels
    of the image. `upsample_fn` and what is not computed: as in `mask_losses`.
    """

    def per_mask(x_BHW, mask_BHW):
        x_BHW, mask_BHW = upsample_fn(x_BHW).astype(jnp.float32), mask_BHW.astype(jnp.float32)
        is_pixel_BHW, pixels = pixel_BHW.astype(jnp.float32), (-2, -1)
        nll_BHW = (jax.nn.softplus(x_BHW) - x_BHW * mask_BHW) * is_pixel_BHW
        probs_BHW, mask_BHW = jax.nn.sigmoid(x_BHW) * is_pixel_BHW, mask_BHW * is_pixel_BHW
        overlap_B = 2 * (probs_BHW / dice_scale * mask_BHW).sum(pixels) + 1e-6
        total_B = (probs_BHW / dice_scale).sum(pixels) + (mask_BHW / dice_scale).sum(pixels) + 1e-6
        return nll_BHW.sum(pixels) / jnp.maximum(is_pixel_BHW.sum(pixels), 1), 1 - overlap_B / total_B

    bce, dice = _mean_over_masks(per_mask, (logits_BKhw, mask_BKHW), valid_BK, 2)
    return {"bce": bce, "dice": dice}


def _mean_over_masks(per_mask: Callable, arrays: tuple, valid_BK, num_terms: int) -> tuple[jax.Array, ...]:
    """Means over the valid masks of the terms (B,) that `per_mask` gives for each index k of arrays (B, K, ...).

    An index k without a valid mask in the batch is not computed.
    """

    def terms_at_index(inputs):
        *inputs, valid_B = inputs
        zeros = (jnp.zeros(valid_B.shape),) * num_terms
        return jax.lax.cond(valid_B.any(), per_mask, lambda *_: zeros, *inputs)

    inputs = (*arrays, valid_BK.astype(bool))
    terms = jax.lax.map(jax.checkpoint(terms_at_index), tuple(x.swapaxes(0, 1) for x in inputs))
    return tuple(masked_mean(x.swapaxes(0, 1), valid_BK) for x in terms)


def _per_mask_losses(logits_BHW, iou_B, mask_BHW, num_masks, released_code: bool):
    """Focal loss, Dice loss and squared error of the IoU of each mask (B,), in float32."""
    x, y = logits_BHW.astype(jnp.float32), mask_BHW.astype(jnp.float32)
    probs, pixels = jax.nn.sigmoid(x), (-2, -1)
    nll = jax.nn.softplus(x) - x * y
    alpha, smooth = (num_masks, num_masks) if released_code else (0.8, 1.0)
    predicted = (x >= 0.5 if released_code else x > 0).astype(jnp.float32)
    intersection = (predicted * y).sum(pixels)
    iou_error = jnp.square(iou_B - intersection / (predicted.sum(pixels) + y.sum(pixels) - intersection + 1e-7))
    dice = 1 - (2 * (probs * y).sum(pixels) + smooth) / (probs.sum(pixels) + y.sum(pixels) + smooth)
    if released_code:
        nll = nll.mean(pixels)
    focal = alpha * jnp.square(1 - jnp.exp(-nll)) * nll
    return focal if released_code else focal.mean(pixels), dice, iou_error


def asymmetric_loss(logits_BV, target_BV, gamma_neg: float = 7.0, clip: float = 0.05) -> jax.Array:
    """Asymmetric loss (arXiv 2009.14119) with RAM's settings, summed over all tags of all samples.

    Easy negatives are down-weighted: with q = min(1 - p + `clip`, 1), a negative tag costs -(1 - q)^`gamma_neg` log q.
    No gradient flows through the weight.
    """
    target_BV = target_BV.astype(bool)
    positive_BV = jax.nn.sigmoid(logits_BV.astype(jnp.float32))
    negative_BV = jnp.minimum(1 - positive_BV + clip, 1)
    weight_BV = jax.lax.stop_gradient(1 - negative_BV) ** gamma_neg
    log_probs_BV = jnp.log(jnp.maximum(jnp.where(target_BV, positive_BV, negative_BV), 1e-8))
    return -(jnp.where(target_BV, 1, weight_BV) * log_probs_BV).sum()


def contrastive_token_loss(state_BLD, mask_BL, margin: float):
    """SimCTG's loss (arXiv 2202.06417): how much pairs of tokens of one text are more alike than 1 - `margin`.

    The mean of max(0, margin - 1 + cosine) over all ordered pairs of different tokens of the same text, in the whole
    batch; `mask_BL` is 1 on real tokens. Batches without a pair give 0.
    """
    state_BLD = state_BLD.astype(jnp.float32)
    unit_BLD = state_BLD / jnp.linalg.norm(state_BLD, axis=-1, keepdims=True)
    cosine_BLL = jnp.einsum("BLD,BMD->BLM", unit_BLD, unit_BLD)
    mask_BL = mask_BL.astype(bool)
    pair_BLL = mask_BL[:, :, None] & mask_BL[:, None] & ~jnp.eye(mask_BL.shape[1], dtype=bool)
    loss_BLL = jnp.where(pair_BLL, jnp.maximum(0.0, margin - 1 + cosine_BLL), 0.0)
    return loss_BLL.sum() / jnp.maximum(pair_BLL.sum(), 1)
