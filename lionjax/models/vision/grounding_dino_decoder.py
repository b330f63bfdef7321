# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO's query selection by the text and its decoder, which refines boxes (arXiv 2303.05499, 3.3 and 3.4)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import with_logical_constraint
from lionjax.core.types import Params, pytree_dataclass
from lionjax.models.vision.grounding_dino_encoder import (
    GroundingDinoConfig,
    attend_with_positions,
    feed_forward,
    make_attention,
    norm,
    xavier,
)
from lionjax.nn import layers
from lionjax.nn.attention import key_padding_mask
from lionjax.nn.deformable_attention import DeformableAttention, Shapes
from lionjax.nn.positions import interleaved_sinusoids

PROPOSAL_SIDE = 0.05  # of the proposals of the first level, in parts of the image; it doubles from level to level
PROPOSAL_RANGE = (1, 99)  # hundredths between which the coordinates of a proposal must lie


def inverse_sigmoid(x, eps: float):
    """log(x / (1 - x)), with x and 1 - x at least `eps`, as in the original."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))


def contrastive_logits(state_BQD, text_BLD, text_mask_BL):
    """Products (B, Q, L) of states and text in float32; -inf where the text mask is 0."""
    logits_BQL = jnp.einsum("BQD,BLD->BQL", state_BQD, text_BLD, preferred_element_type=jnp.float32)
    return jnp.where(text_mask_BL[:, None], logits_BQL, -jnp.inf)


def proposal_boxes(center_BP2, shapes: Shapes):
    """Boxes (B, P, 4), cx cy w h, around the centers of all positions; larger ones on coarser levels."""
    sides = [
        np.full((height * width, 2), PROPOSAL_SIDE * 2**level, np.float32)
        for level, (height, width) in enumerate(shapes)
    ]
    side_BP2 = jnp.broadcast_to(np.concatenate(sides), center_BP2.shape)
    return jnp.concatenate([center_BP2, side_BP2], axis=-1)


def valid_proposals(shapes: Shapes, size_BT2):
    """Whether the proposal of each position is valid: (B, P) bool, for the valid sizes `size_BT2` of the levels.

    The center (i + 0.5) / n is compared with 0.01 and 0.99 as integers. Some lie on the border, such as 0.5 / 50, and
    XLA may round a quotient to the other side of it, which would choose other queries.
    """
    low, high = PROPOSAL_RANGE
    valid = []
    for level, (height, width) in enumerate(shapes):
        y, x = np.divmod(np.arange(height * width, dtype=np.int32), width)
        center_P2 = 100 * np.stack([x, y], axis=-1) + 50
        size_B12 = size_BT2[:, level, None].astype(jnp.int32)
        inside_BP = ((center_P2 > low * size_B12) & (center_P2 < high * size_B12)).all(-1)
        valid.append(inside_BP & (low < 100 * PROPOSAL_SIDE * 2**level < high))
    return jnp.concatenate(valid, axis=1)


@pytree_dataclass
class Selection:
    """The queries of the decoder: the positions of the highest score in order, and their boxes cx cy w h.

    `box_BQ4` and `logits_BQL` carry gradients. A proposal that is not valid has the box (1, 1, 1, 1).
    """

    score_BP: jax.Array
    index_BQ: jax.Array
    box_BQ4: jax.Array
    logits_BQL: jax.Array


class QuerySelection(nn.Module):
    """The `num_queries` positions of the image that fit some token of the text best.

    `valid_BP`: positions with a valid proposal; the others are read as zeros and can be chosen too, as in the original.
    """

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, image_BPD, text_BLD, text_mask_BL, proposal_BP4, valid_BP) -> Selection:
        c = self.c
        state_BPD = jnp.where(valid_BP[..., None], image_BPD, 0)
        dense = layers.Dense(c.width, c.width, ("embed", None), kernel_init=xavier, name="dense")
        state_BPD = norm(c, "norm")(dense(state_BPD))
        score_BP = contrastive_logits(state_BPD, text_BLD, text_mask_BL).max(-1)
        _, index_BQ = jax.lax.top_k(score_BP, c.num_queries)
        state_BQD = layers.take_positions(state_BPD, index_BQ)
        proposal_BQ4 = layers.take_positions(proposal_BP4, index_BQ)
        is_valid_BQ1 = layers.take_positions(valid_BP, index_BQ)[..., None]
        proposal_BQ4 = jnp.where(is_valid_BQ1, proposal_BQ4, 0.5)
        delta_BQ4 = box_head("boxes", c)(state_BQD).astype(jnp.float32)
        box_BQ4 = jax.nn.sigmoid(delta_BQ4 + jnp.log(proposal_BQ4 / (1 - proposal_BQ4)))
        box_BQ4 = jnp.where(is_valid_BQ1, box_BQ4, 1.0)
        return Selection(score_BP, index_BQ, box_BQ4, contrastive_logits(state_BQD, text_BLD, text_mask_BL))


def box_head(name: str | None, c: GroundingDinoConfig) -> layers.StackedMLP:
    """The MLP (..., D) -> (..., 4) that moves a box, in logits."""
    return layers.StackedMLP((c.width, c.width, c.width, 4), zero_init_output=True, name=name)


def position_head(name: str | None, c: GroundingDinoConfig) -> layers.StackedMLP:
    """The MLP (..., 2 D) -> (..., D) from encodings of boxes to positions of queries."""
    return layers.StackedMLP((2 * c.width, c.width, c.width), name=name)


def encode_boxes(box_BQ4, width: int):
    """Sinusoidal encodings (B, Q, 2 D) of boxes, in the order y, x, w, h."""
    yxwh = [box_BQ4[..., n] for n in (1, 0, 2, 3)]
    return jnp.concatenate([interleaved_sinusoids(x, width // 2) for x in yxwh], axis=-1)


@pytree_dataclass
class DecoderInputs:
    """What all layers of the decoder share; the parameters of both heads are those of one module for all layers."""

    image_BPD: jax.Array
    valid_BP: jax.Array
    text_BLD: jax.Array
    text_mask_BL: jax.Array
    ratio_BT2: jax.Array
    box_params: Params
    position_params: Params
    shapes: Shapes = dataclasses.field(metadata={"static": True})


class DecoderLayer(nn.Module):
    """Self-attention, attention to the text, deformable attention to the image, feed-forward; then a refined box.

    The carry is (states, boxes); the output is the same, with boxes that carry gradients.
    """

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, carry, key, shared: DecoderInputs):
        c, keys = self.c, layers.split_key(key, 4)
        x_BQD, box_BQ4 = carry

        def add(norm_name, change_BQD, key):
            return norm(c, norm_name)(x_BQD + layers.dropout(change_BQD, c.dropout, key))

        reference_BQT4 = box_BQ4[:, :, None] * jnp.tile(shared.ratio_BT2, (1, 1, 2))[:, None]
        encoded_BQD = encode_boxes(reference_BQT4[:, :, 0], c.width).astype(x_BQD.dtype)
        position_BQD = position_head(None, c).apply({"params": shared.position_params}, encoded_BQD)
        x_BQD = add("norm2", attend_with_positions(c, c.num_heads, "attention", x_BQD, position_BQD), keys[0])
        to_text = make_attention(c, c.num_heads, "to_text")
        mask = key_padding_mask(shared.text_mask_BL)
        x_BQD = add("text_norm", to_text(x_BQD + position_BQD, shared.text_BLD, mask), keys[1])
        to_image = DeformableAttention(c.width, c.num_heads, c.num_levels, c.num_points, name="to_image")
        change_BQD = to_image(x_BQD + position_BQD, shared.image_BPD, reference_BQT4, shared.shapes, shared.valid_BP)
        x_BQD = add("norm1", change_BQD, keys[2])
        x_BQD = feed_forward(c, c.mlp_dim, x_BQD, "norm3", keys[3])
        delta_BQ4 = box_head(None, c).apply({"params": shared.box_params}, x_BQD).astype(jnp.float32)
        new_box_BQ4 = jax.nn.sigmoid(delta_BQ4 + inverse_sigmoid(box_BQ4, c.inverse_sigmoid_eps))
        x_BQD = with_logical_constraint(x_BQD, "batch", "length", "act_embed")
        return (x_BQD, jax.lax.stop_gradient(new_box_BQ4)), (x_BQD, new_box_BQ4)
