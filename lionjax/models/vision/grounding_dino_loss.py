# SPDX-License-Identifier: Apache-2.0
"""Training loss of Grounding DINO (arXiv 2303.05499): queries matched to boxes, then contrast with the text and boxes.

In each decoder layer, and for the encoder's proposals, every true box is matched to one query (Hungarian matching, as
in DETR, arXiv 2005.12872). A matched query is positive for the tokens that name its box; the sigmoid focal loss of all
queries and tokens, the L1 loss and the GIoU loss of the matched boxes are divided by the number of true boxes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from lionjax.core.errors import check_ranges
from lionjax.core.types import Array, Metrics, UserError, pytree_dataclass
from lionjax.nn.losses import generalized_iou


@dataclasses.dataclass(frozen=True)
class DetectionLossConfig:
    """Costs of the matching and weights of the losses, in the order class, L1, GIoU; the defaults are the paper's.

    transformers has costs (1, 5, 2) and weights (2, 5, 2). `alpha`, `gamma`: of the focal loss and its cost. Raises
    UserError for numbers out of range.
    """

    costs: tuple[float, float, float] = (2.0, 5.0, 2.0)
    weights: tuple[float, float, float] = (1.0, 5.0, 2.0)
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self):
        check_ranges(self, "loss.", costs=">= 0", weights=">= 0", alpha=">= 0 and <= 1", gamma=">= 0")


@pytree_dataclass
class DetectionTargets:
    """True boxes of a batch and the tokens that name each."""

    box_BK4: Array  # float32, x0 y0 x1 y1 in 0..1
    valid_BK: Array  # bool, the real boxes
    token_BKL: Array  # bool, the tokens of the text that name each box


def center_to_corners(box_BK4) -> jax.Array:
    """Boxes (x0, y0, x1, y1) from (center x, center y, width, height)."""
    center, half = box_BK4[..., :2], box_BK4[..., 2:] / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def detection_loss(
    config: DetectionLossConfig, logits_TBQL: Array, box_TBQ4: Array, text_mask_BL: Array, targets: DetectionTargets
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the losses of T layers, and metrics; `weight` is the number of true boxes, at least 1.

    Logits, and boxes as center and size in 0..1, of each decoder layer, and of the encoder's proposals if they are
    trained. The metrics `loss_class`, `loss_box`, `loss_giou` are means over the layers.
    `text_mask_BL`: tokens outside it are in no loss, whatever their logits. Raises UserError for more boxes than
    queries.
    """
    logits_TBQL, box_TBQ4 = logits_TBQL.astype(jnp.float32), box_TBQ4.astype(jnp.float32)
    num_queries, max_boxes = logits_TBQL.shape[2], targets.box_BK4.shape[1]
    if max_boxes > num_queries:
        raise UserError(
            f"an example may have {max_boxes} boxes, but the detector has {num_queries} queries; "
            f"lower processor.max_boxes to {num_queries} or raise the detector's num_queries"
        )
    text_mask_BL = text_mask_BL.astype(bool)
    logits_TBQL = jnp.where(text_mask_BL[:, None], logits_TBQL, 0.0)
    match_row = jax.vmap(lambda *row: match_queries(config, *row))
    match = jax.vmap(lambda logits_BQL, box_BQ4: match_row(logits_BQL, box_BQ4, text_mask_BL, targets))
    query_TBK = match(*jax.lax.stop_gradient((logits_TBQL, box_TBQ4)))
    valid_BK = targets.valid_BK.astype(jnp.float32)
    one_hot_TBKQ = jax.nn.one_hot(query_TBK, num_queries) * valid_BK[..., None]
    token_BKL = targets.token_BKL.astype(jnp.float32)
    positive_TBQL = jnp.einsum("tbkq,bkl->tbql", one_hot_TBKQ, token_BKL)
    focal_TBQL = focal_loss(logits_TBQL, positive_TBQL, config) * text_mask_BL[:, None]
    matched_TBK4 = jnp.take_along_axis(box_TBQ4, query_TBK[..., None], axis=2)
    corners_TBK4 = center_to_corners(matched_TBK4)
    giou_TBK = (1 - generalized_iou(corners_TBK4, targets.box_BK4)) * valid_BK
    l1_TBK = jnp.abs(matched_TBK4 - corners_to_center(targets.box_BK4)).sum(-1) * valid_BK
    count = jnp.maximum(valid_BK.sum(), 1)
    terms = [term.sum() / count for term in (focal_TBQL, l1_TBK, giou_TBK)]
    loss = sum(weight * term for weight, term in zip(config.weights, terms))
    names = ("loss_class", "loss_box", "loss_giou")
    return loss, {"weight": count, **{name: term / len(logits_TBQL) for name, term in zip(names, terms)}}


def match_queries(
    config: DetectionLossConfig, logits_QL: Array, box_Q4: Array, text_mask_L: Array, targets: DetectionTargets
) -> jax.Array:
    """The query (K,) of each box of one example, so that the sum of their costs is least; no query twice.

    Boxes outside `targets.valid_BK` (here without a batch axis) get queries that no other box needs.
    """
    prob_QL = jax.nn.sigmoid(logits_QL)
    negative_QL = (1 - config.alpha) * prob_QL**config.gamma * -jnp.log(1 - prob_QL + 1e-8)
    positive_QL = config.alpha * (1 - prob_QL) ** config.gamma * -jnp.log(prob_QL + 1e-8)
    token_KL = targets.token_BKL.astype(jnp.float32) * text_mask_L
    token_KL = token_KL / jnp.maximum(token_KL.sum(-1, keepdims=True), 1)
    class_QK = (positive_QL - negative_QL) @ token_KL.T
    l1_QK = jnp.abs(box_Q4[:, None] - corners_to_center(targets.box_BK4)).sum(-1)
    giou_QK = generalized_iou(center_to_corners(box_Q4)[:, None], targets.box_BK4)
    costs = (class_QK, l1_QK, -giou_QK)
    cost_QK = sum(weight * cost for weight, cost in zip(config.costs, costs))
    cost_QK = jnp.where(targets.valid_BK.astype(bool), jnp.nan_to_num(cost_QK, nan=1e6, posinf=1e6, neginf=1e6), 0.0)
    query_K, box_K = optax.assignment.hungarian_algorithm(cost_QK)
    return jnp.zeros_like(query_K).at[box_K].set(query_K)


def corners_to_center(box_BK4) -> jax.Array:
    """Boxes (center x, center y, width, height) from (x0, y0, x1, y1)."""
    low, high = box_BK4[..., :2], box_BK4[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def focal_loss(logits, positive, config: DetectionLossConfig) -> jax.Array:
    """Sigmoid focal loss (arXiv 1708.02002) of each logit; `positive`: 1 where the class holds, else 0."""
    prob = jax.nn.sigmoid(logits)
    nll = optax.sigmoid_binary_cross_entropy(logits, positive)
    wrong = prob + positive * (1 - 2 * prob)  # 1 - probability of the true side
    return (positive * config.alpha + (1 - positive) * (1 - config.alpha)) * wrong**config.gamma * nll
