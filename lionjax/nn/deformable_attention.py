# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): each query samples a few points of each level.

A level is a feature map; the levels lie one after the other on one axis, each row-major. Points are x, y in 0..1 of the
map, whose pixels are squares: the center of the first one is at half a pixel. Sampling is bilinear and 0 outside.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import with_logical_constraint
from lionjax.core.weight_map import WeightMapping
from lionjax.nn.layers import Dense, dense_weight_map

Shapes = tuple[tuple[int, int], ...]  # (height, width) of each level
xavier = nn.initializers.xavier_uniform()


def sample_levels(value_BSNH, shapes: Shapes, point_BQNTK2, weight_BQNTK):
    """Weighted sums (B, Q, N, H) of bilinear samples of all levels, in the dtype of the values.

    `value_BSNH`: S positions of all T levels. Each query has for each head N and level T the points K, and a weight for
    each.
    """
    samples = corner_samples(shapes, point_BQNTK2.astype(jnp.float32), weight_BQNTK.astype(jnp.float32))
    return jax.vmap(jax.vmap(weighted_rows, in_axes=1, out_axes=1))(value_BSNH, *samples)


def corner_samples(shapes: Shapes, point_BQNTK2, weight_BQNTK):
    """Positions and weights, each (B, Q, N, J), of the 2 x 2 values around all points: J = 4 T K.

    A position outside its level is moved inside and has the weight 0.
    """
    size_T12 = np.array([(width, height) for height, width in shapes], np.int32)[:, None]
    start_T1 = np.cumsum([0, *(height * width for height, width in shapes[:-1])], dtype=np.int32)[:, None]
    pixel_BQNTK2 = point_BQNTK2 * size_T12 - 0.5
    first_BQNTK2 = jnp.floor(pixel_BQNTK2)
    part_BQNTK2 = pixel_BQNTK2 - first_BQNTK2
    index, weight = [], []
    for corner in np.ndindex(2, 2):
        position = first_BQNTK2.astype(jnp.int32) + np.array(corner, np.int32)
        inside = ((position >= 0) & (position < size_T12)).all(-1)
        x, y = jnp.moveaxis(jnp.clip(position, 0, size_T12 - 1), -1, 0)
        index.append(start_T1 + y * size_T12[..., 0] + x)
        share = jnp.where(np.array(corner, bool), part_BQNTK2, 1 - part_BQNTK2).prod(-1)
        weight.append(jnp.where(inside, share * weight_BQNTK, 0))
    return tuple(jnp.stack(x, axis=-1).reshape(*point_BQNTK2.shape[:3], -1) for x in (index, weight))


@jax.custom_vjp
def weighted_rows(value_SH, index_QJ, weight_QJ):
    """Sums (Q, H) over J of the rows of `value_SH` at the indices, weighted; the sum is in float32.

    A sum of J gathers is one fused loop in XLA, which does not store the rows: on a CPU it takes a quarter of the time
    of one gather of all rows. Its gradient adds to the values by one scatter, where automatic differentiation has J.
    """
    rows = (value_SH.at[index_QJ[:, j]].get(mode="promise_in_bounds") for j in range(index_QJ.shape[1]))
    total_QH = sum(weight_QJ[:, j, None] * row_QH.astype(jnp.float32) for j, row_QH in enumerate(rows))
    return total_QH.astype(value_SH.dtype)


def _weighted_rows_forward(value_SH, index_QJ, weight_QJ):
    return weighted_rows(value_SH, index_QJ, weight_QJ), (value_SH, index_QJ, weight_QJ)


def _weighted_rows_backward(inputs, gradient_QH):
    value_SH, index_QJ, weight_QJ = inputs
    gradient_QH = gradient_QH.astype(jnp.float32)
    added_NH = (weight_QJ[..., None] * gradient_QH[:, None]).reshape(-1, gradient_QH.shape[-1])
    value_gradient = jnp.zeros(value_SH.shape, jnp.float32).at[index_QJ.reshape(-1)]
    value_gradient = value_gradient.add(added_NH, mode="promise_in_bounds").astype(value_SH.dtype)
    rows = (value_SH.at[index_QJ[:, j]].get(mode="promise_in_bounds") for j in range(index_QJ.shape[1]))
    weight_gradient = jnp.stack([(row_QH.astype(jnp.float32) * gradient_QH).sum(-1) for row_QH in rows], axis=-1)
    return value_gradient, None, weight_gradient


weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def offset_init(num_heads: int, num_levels: int, num_points: int):
    """Initializer of the offsets' bias: head n looks into direction n of a circle, point k at distance k + 1."""
    angle = np.arange(num_heads) * (2 * math.pi / num_heads)
    direction_N2 = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction_N2 /= np.abs(direction_N2).max(-1, keepdims=True)
    distance_K1 = np.arange(1, num_points + 1)[:, None]
    offset = np.tile((direction_N2[:, None] * distance_K1)[:, None], (1, num_levels, 1, 1))
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(offset.reshape(shape), dtype)


class DeformableAttention(nn.Module):
    """Output (B, Q, D) of queries (B, Q, D) that sample `num_points` points of each level of a source (B, S, D).

    `reference_BQT`: for each query and level a point (x, y), then offsets are in pixels of the level, or a box
    (cx, cy, w, h), then offsets are in parts of half the box divided by `num_points`. Positions where `valid_BS` is
    False have the value 0. Weights are softmax probabilities over the points of all levels.
    """

    width: int
    num_heads: int
    num_levels: int
    num_points: int

    @nn.compact
    def __call__(self, query_BQD, source_BSD, reference_BQT, shapes: Shapes, valid_BS):
        batch, length, _ = query_BQD.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points

        def dense(name, features, **init):
            return Dense(self.width, features, ("embed", "heads"), name=name, **init)

        zeros = nn.initializers.zeros
        value_BSD = dense("value", self.width, kernel_init=xavier)(source_BSD)
        value_BSD = jnp.where(valid_BS[..., None], value_BSD, 0)
        bias_init = offset_init(heads, levels, points)
        offset = dense("offsets", heads * levels * points * 2, kernel_init=zeros, bias_init=bias_init)(query_BQD)
        offset_BQNTK2 = offset.reshape(batch, length, heads, levels, points, 2).astype(jnp.float32)
        score = dense("weights", heads * levels * points, kernel_init=zeros)(query_BQD)
        score_BQND = score.reshape(batch, length, heads, levels * points).astype(jnp.float32)
        weight_BQNTK = jax.nn.softmax(score_BQND, axis=-1).reshape(batch, length, heads, levels, points)
        reference = reference_BQT[:, :, None, :, None].astype(jnp.float32)
        if reference.shape[-1] == 2:
            scale = np.array([(1 / w, 1 / h) for h, w in shapes], np.float32)[:, None]
        else:
            scale = reference[..., 2:] * (0.5 / points)
        point_BQNTK2 = reference[..., :2] + offset_BQNTK2 * scale
        value_BSNH = value_BSD.reshape(batch, -1, heads, self.width // heads)
        out_BQNH = sample_levels(value_BSNH, shapes, point_BQNTK2, weight_BQNTK)
        out = Dense(self.width, self.width, ("heads", "embed"), kernel_init=xavier, name="out")
        return with_logical_constraint(out(out_BQNH.reshape(batch, length, -1)), "batch", "length", "act_embed")


def weight_map() -> tuple[WeightMapping, ...]:
    """Mappings from Deformable DETR's module, whose names Grounding DINO has in all its releases."""
    names = {"value_proj": "value", "sampling_offsets": "offsets", "attention_weights": "weights", "output_proj": "out"}
    return tuple(mapping for torch, flax in names.items() for mapping in dense_weight_map(torch, flax))
