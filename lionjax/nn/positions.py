# SPDX-License-Identifier: Apache-2.0
"""Position encodings: rotary embeddings, ALiBi, sinusoids, and T5's relative position bias."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import with_logical_partitioning
from lionjax.nn.layers import normal
from lionjax.nn.rope import RopeScaling, rope_frequencies


def rope_cos_sin(positions_BL, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """Cosine and sine (B, L, 1, H/2) of the rotation angles of these positions, for `apply_rope` (arXiv 2104.09864)."""
    angle_BLNH = positions_BL.astype(jnp.float32)[:, :, None, None] * rope_frequencies(head_dim, theta, scaling)
    attention_factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle_BLNH) * attention_factor, jnp.sin(angle_BLNH) * attention_factor


def apply_rope(x_BLNH, cos_sin):
    """x with each pair (h, h + H/2) rotated by its angle, in float32; pairs as in Hugging Face's LLaMA."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLNH.dtype)


def alibi_bias(positions_BS, num_heads: int):
    """ALiBi bias (B, N, 1, S): key position times a slope for each head (arXiv 2108.12409).

    It depends on the key alone, because a constant added to all scores of a query does not change the softmax. The
    slopes are MPT's, also for a number of heads that is not a power of two.
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slope_N = 2.0 ** -(np.arange(1, power + 1, dtype=np.float32) * (8 / power))
    if power != num_heads:
        slope_N = np.concatenate([slope_N[1::2], slope_N[::2]])[:num_heads]
    return positions_BS.astype(jnp.float32)[:, None, None, :] * slope_N[:, None, None]


def sinusoidal_positions(positions_BL, width: int):
    """Sinusoidal position embeddings (B, L, D), sines before cosines, as in fairseq and Kosmos-2."""
    half = width // 2
    frequency_D = np.exp(np.arange(half, dtype=np.float32) * -(math.log(10000) / (half - 1)))
    angle_BLD = positions_BL.astype(jnp.float32)[..., None] * frequency_D
    embedding_BLD = jnp.concatenate([jnp.sin(angle_BLD), jnp.cos(angle_BLD)], axis=-1)
    return jnp.pad(embedding_BLD, ((0, 0), (0, 0), (0, width % 2)))


def interleaved_sinusoids(position, width: int, temperature: float = 10000.0):
    """Sines and cosines (..., D) in turn of positions (...) in full circles, as in DETR (arXiv 2005.12872), in float32.

    Feature 2 i is the sine of 2 pi position / temperature^(2 i / D), feature 2 i + 1 its cosine; D = `width` is even.
    """
    period_D = np.float32(temperature) ** (2 * np.arange(width // 2, dtype=np.float32) / width)
    angle = position.astype(jnp.float32)[..., None] * np.float32(2 * math.pi) / period_D
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position.shape, width)


def relative_position_bucket(query_positions, key_positions, num_buckets: int, max_distance: int, bidirectional: bool):
    """T5's bucket (L, S) of the distance from query positions (L,) to key positions (S,) (arXiv 1910.10683, 2.1).

    Small distances have a bucket each; larger ones share logarithmically growing buckets up to `max_distance`.
    """
    distance_LS = key_positions[None, :] - query_positions[:, None]
    bucket_LS = jnp.zeros_like(distance_LS)
    if bidirectional:
        num_buckets //= 2
        bucket_LS = (distance_LS > 0) * num_buckets
        distance_LS = jnp.abs(distance_LS)
    else:
        distance_LS = jnp.maximum(-distance_LS, 0)
    exact = num_buckets // 2
    far_LS = jnp.log(jnp.maximum(distance_LS, 1).astype(jnp.float32) / exact)
    far_LS = exact + (far_LS / np.log(max_distance / exact) * (num_buckets - exact)).astype(jnp.int32)
    return bucket_LS + jnp.where(distance_LS < exact, distance_LS, jnp.minimum(far_LS, num_buckets - 1))


class RelativePositionBias(nn.Module):
    """T5's attention bias (1, N, L, S), learned for each head and distance bucket and shared by all layers."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    width: int  # of the model, for the initial scale

    @nn.compact
    def __call__(self, query_positions, key_positions):
        init = with_logical_partitioning(normal(self.width**-0.5), ("position", "heads"))
        table = self.param("table", init, (self.num_buckets, self.num_heads))
        bucket_LS = relative_position_bucket(
            query_positions, key_positions, self.num_buckets, self.max_distance, self.bidirectional
        )
        return table[bucket_LS].transpose(2, 0, 1)[None].astype(jnp.float32)


def position_ids(mask_BL):
    """Positions (B, L) from 0 of the real tokens of each row; padding has the position of the token before it."""
    return jnp.maximum(jnp.cumsum(mask_BL.astype(jnp.int32), axis=1) - 1, 0)


def segment_positions(segment_BL):
    """Positions (B, L) from 0 in each segment, a run of equal numbers in a row."""
    index_L = jnp.arange(segment_BL.shape[1])
    is_start_BL = jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)))
    return index_L - jax.lax.cummax(jnp.where(is_start_BL, index_L, 0), axis=1)


def last_token(x_BLD, mask_BL):
    """x (B, D) at the last real token of each row."""
    length = mask_BL.shape[1]
    last_B = length - 1 - jnp.argmax(mask_BL[:, ::-1].astype(bool), axis=1)
    return jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)[:, 0]


def states_before(state_BLD):
    """The state before each position of a sequence (B, L, D) without gaps; the first position has its own."""
    return jnp.concatenate([state_BLD[:, :1], state_BLD[:, :-1]], axis=1)
