# SPDX-License-Identifier: Apache-2.0
"""Attention: who may look at whom, T5's relative positions, the product itself, and the cache of a decoder.

A mask says what a kernel can use (`Mask`), or is boolean (True = may look) and broadcasts to (B, N, L, S); biases are
added to the scores in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import with_logical_constraint
from lionjax.core.weight_map import WeightMapping, merge_heads_kernel, split_heads, split_heads_kernel
from lionjax.nn import flash_attention
from lionjax.nn.layers import Dense, DenseFromHeads, LayerNorm, dropout, fold_in, normal
from lionjax.nn.lora import LoraConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Who may look at whom in words that a kernel understands: at real keys (B, S), all if None, and not ahead."""

    key_valid_BS: jax.Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    def to_dense(self, length: int):
        """As booleans that broadcast to (B, 1, L, S); None where all is seen."""
        return flash_attention.dense_mask(self.key_valid_BS, self.causal, length)


def key_padding_mask(valid_BS) -> AttentionMask:
    """Everyone may look at the real tokens."""
    return AttentionMask(valid_BS.astype(bool))


def causal_mask(valid_BL=None) -> AttentionMask:
    """A token may look at itself and before, there at the real ones."""
    return AttentionMask(None if valid_BL is None else valid_BL.astype(bool), causal=True)


def dot_product_attention(
    query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale: float = 1.0, dropout_rate: float = 0.0, key=None
):
    """softmax(scale * q k + bias) v, the softmax in float32: (B, L, N, H). By a kernel where one computes this.

    Keys may have fewer heads than queries (grouped-query attention). `mask` is a `Mask`, or booleans. `key` drives
    dropout on the probabilities.
    """
    drops = bool(dropout_rate) and key is not None
    if isinstance(mask, AttentionMask | None):
        mask = mask or AttentionMask()
        if bias is None and not drops:
            given = (query_BLNH, key_BSNH, value_BSNH, mask.key_valid_BS, mask.causal, scale)
            out_BLNH = flash_attention.flash_attention(*given)
            if out_BLNH is not None:
                return out_BLNH
        mask = mask.to_dense(query_BLNH.shape[1])
    drop = functools.partial(dropout, rate=dropout_rate, key=key) if drops else None
    return flash_attention.reference_attention(query_BLNH, key_BSNH, value_BSNH, mask, bias, scale, drop)


def segmented_attention(query_BLNH, kv_segments, mask=None, bias=None, scale: float = 1.0):
    """As `attend`, keys and values being in several pieces (B, N, S, H) along S, which are never put together.

    Where a piece has fewer rows than there are queries, as many queries after each other as that makes share a row.
    """
    rows, length, heads, head = query_BLNH.shape

    def shared(x_BLNX, key_BNSH):
        """(B, L, N, X) -> (rows of the piece, heads of the piece, queries, X)."""
        few, fewer, size = len(key_BNSH), key_BNSH.shape[1], x_BLNX.shape[-1]
        x = x_BLNX.reshape(few, rows // few * length, fewer, heads // fewer, size)
        asked = rows // few * length * (heads // fewer)  # a piece may be empty, where -1 says nothing
        return x.transpose(0, 2, 1, 3, 4).reshape(few, fewer, asked, size)

    def each(x, key_BNSH):
        """And back."""
        few, fewer, size = len(key_BNSH), key_BNSH.shape[1], x.shape[-1]
        x = x.reshape(few, fewer, rows // few * length, heads // fewer, size)
        return x.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, size)

    score_BLNS = scale * jnp.concatenate(
        [
            each(
                jnp.einsum("BNLH,BNSH->BNLS", shared(query_BLNH, keys), keys, preferred_element_type=jnp.float32), keys
            )
            for keys, _ in kv_segments
        ],
        axis=-1,
    )
    if bias is not None:
        score_BLNS = score_BLNS + bias.swapaxes(1, 2)
    if isinstance(mask, AttentionMask):
        mask = mask.to_dense(length)
    if mask is not None:
        score_BLNS = jnp.where(mask.swapaxes(1, 2), score_BLNS, flash_attention.MASK_VALUE)
    share_BLNS = jax.nn.softmax(score_BLNS, axis=-1).astype(kv_segments[0][1].dtype)
    ends = np.cumsum([keys.shape[2] for keys, _ in kv_segments])[:-1]
    return sum(
        each(jnp.einsum("BNLS,BNSH->BNLH", shared(share, values), values), values)
        for share, (_, values) in zip(jnp.split(share_BLNS, ends, axis=-1), kv_segments)
    )


class Attention(nn.Module):
    """Queries from x, keys and values from x or from elsewhere; `biases` names which of q, k, v, o have one."""

    width: int
    num_heads: int
    head_dim: int
    source_width: int | None = None
    num_kv_heads: int | None = None
    biases: str = "qkvo"
    scale: float | None = None  # None: 1 / sqrt(head)
    dropout_rate: float = 0.0
    kernel_inits: tuple = (normal(0.02),) * 4  # of q, k, v, o
    lora: LoraConfig = LoraConfig()
    sub_ln_eps: float | None = None  # of a norm before the output projection (sub-LN); None: there is none

    def setup(self):
        source = self.source_width or self.width
        kv_heads = self.num_kv_heads or self.num_heads
        axes = ("embed", "heads", "head")

        def project(inputs, heads, letter, init):
            return Dense(inputs, (heads, self.head_dim), axes, letter in self.biases, init, self.lora)

        self.q = project(self.width, self.num_heads, "q", self.kernel_inits[0])
        self.k = project(source, kv_heads, "k", self.kernel_inits[1])
        self.v = project(source, kv_heads, "v", self.kernel_inits[2])
        self.o = DenseFromHeads(
            self.num_heads, self.head_dim, self.width, "o" in self.biases, self.kernel_inits[3], self.lora
        )
        if self.sub_ln_eps is not None:
            self.norm = LayerNorm(self.num_heads * self.head_dim, self.sub_ln_eps)

    def project_query(self, x_BLD, key=None):
        return with_logical_constraint(self.q(x_BLD, fold_in(key, 1)), "batch", "length", "act_heads", None)

    def project_key_value(self, x_BSD, key=None):
        return self.k(x_BSD, fold_in(key, 2)), self.v(x_BSD, fold_in(key, 3))

    def attend(self, query_BLNH, key_value, mask=None, bias=None, key=None, past_kv=()):
        """At keys and values (B, S, N, H), and behind `earlier` pieces of them (B, N, S, H) where there are any."""
        scale = 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale
        if past_kv:
            parts = (*past_kv, tuple(x.swapaxes(1, 2) for x in key_value))
            out = segmented_attention(query_BLNH, parts, mask, bias, scale)
        else:
            out = dot_product_attention(query_BLNH, *key_value, mask, bias, scale, self.dropout_rate, key)
        if self.sub_ln_eps is not None:
            out = self.norm(out.reshape(*out.shape[:-2], -1)).reshape(out.shape)
        return with_logical_constraint(self.o(out, fold_in(key, 4)), "batch", "length", "act_embed")

    def __call__(self, x_BLD, source_BSD=None, mask=None, bias=None, key=None):
        source = x_BLD if source_BSD is None else source_BSD
        query_BLNH, keys_values = self.project_query(x_BLD, key), self.project_key_value(source, key)
        return self.attend(query_BLNH, keys_values, mask, bias, key)


def update_kv_cache(cache, new_BLNH, layer, position):
    """New keys or values of one layer at positions step, step + 1, ... of the cache of all (layers, B, S, N, H).

    Only the new ones move, because a scan that carries the cache changes it in place.
    """
    start = (layer, 0, position, 0, 0)
    return jax.lax.dynamic_update_slice(cache, new_BLNH[None].astype(cache.dtype), start)


def weight_map(
    torch_modules: dict[str, str], num_heads: int, head_dim: int, biases: str, num_kv_heads: int | None = None
) -> tuple[WeightMapping, ...]:
    """Rows of an `Attention` whose q, k, v, o are four torch Linears with the given names."""
    rows = []
    for letter, name in torch_modules.items():
        number = (num_kv_heads or num_heads) if letter in "kv" else num_heads
        kernel = merge_heads_kernel(num_heads, head_dim) if letter == "o" else split_heads_kernel(number, head_dim)
        rows.append(WeightMapping(f"{name}.weight", f"{letter}/kernel", kernel))
        if letter in biases:
            shape = {} if letter == "o" else {"transform": split_heads(number, head_dim)}
            rows.append(WeightMapping(f"{name}.bias", f"{letter}/bias", **shape))
    return tuple(rows)
