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
    each. A position is stored with its right and lower neighbors, so that one sample is one gathered row of 4 H values.
    """
    sums = []
    start = 0
    for level, (height, width) in enumerate(shapes):
        value_BSND = value_BSNH[:, start : start + height * width]
        start += height * width
        table_BNSD = _corner_table(value_BSND, height, width)
        index_BNL, corner_weight_BNLC = _corners(
            point_BQNTK2[:, :, :, level], weight_BQNTK[:, :, :, level], height, width
        )
        sums.append(_weighted_rows(table_BNSD, index_BNL, corner_weight_BNLC, point_BQNTK2.shape[4]))
    return sum(sums).transpose(0, 2, 1, 3)


def _corner_table(value_BSNH, height: int, width: int):
    """(B, N, (height + 1) * (width + 1), 4 H): the 2 x 2 values from each position on, from (-1, -1); 0 outside."""
    batch, _, heads, head = value_BSNH.shape
    map_BNHWD = value_BSNH.reshape(batch, height, width, heads, head).transpose(0, 3, 1, 2, 4)
    map_BNHWD = jnp.pad(map_BNHWD, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    corners = [map_BNHWD[:, :, y : y + height + 1, x : x + width + 1] for y in range(2) for x in range(2)]
    return jnp.concatenate(corners, axis=-1).reshape(batch, heads, (height + 1) * (width + 1), 4 * head)


def _corners(point_BQNK2, weight_BQNK, height: int, width: int):
    """Rows (B, N, Q * K) of the corner table of one level, and the weights (B, N, Q * K, 4) of the corners."""
    pixel_BQNK2 = point_BQNK2.astype(jnp.float32) * np.array([width, height], np.float32) - 0.5
    first_BQNK2 = jnp.floor(pixel_BQNK2)
    x, y = jnp.moveaxis(pixel_BQNK2 - first_BQNK2, -1, 0)
    column, row = jnp.moveaxis(first_BQNK2, -1, 0)
    inside = (column >= -1) & (column < width) & (row >= -1) & (row < height)
    weight = jnp.where(inside, weight_BQNK.astype(jnp.float32), 0)
    corner_weight = jnp.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=-1) * weight[..., None]
    index = jnp.where(inside, (row + 1) * (width + 1) + column + 1, 0).astype(jnp.int32)
    batch, _, heads, _ = index.shape
    index_BNL = index.transpose(0, 2, 1, 3).reshape(batch, heads, -1)
    return index_BNL, corner_weight.transpose(0, 2, 1, 3, 4).reshape(batch, heads, -1, 4)


def _weighted_rows(table_BNSD, index_BNL, corner_weight_BNLC, num_points: int):
    """(B, N, Q, H): the rows of the corner table, weighted and summed over corners and points."""
    rows_BNLD = jnp.take_along_axis(table_BNSD, index_BNL[..., None], axis=2, mode="clip")
    batch, heads, length, features = rows_BNLD.shape
    rows = rows_BNLD.reshape(batch, heads, length // num_points, num_points * 4, features // 4)
    weight = corner_weight_BNLC.reshape(batch, heads, length // num_points, num_points * 4).astype(rows.dtype)
    return jnp.einsum("BNQK,BNQKH->BNQH", weight, rows)


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
