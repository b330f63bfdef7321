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

from lionjax.core.sharding import constrain
from lionjax.core.weight_map import Row, heads_in, heads_in_bias, heads_out
from lionjax.nn import flash_attention
from lionjax.nn.layers import Dense, DenseFromHeads, LayerNorm, dropout, folded, normal
from lionjax.nn.lora import LoraConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may look at whom in words that a kernel understands: at real keys (B, S), all if None, and not ahead."""

    keys_BS: jax.Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self, length: int):
        """As booleans that broadcast to (B, 1, L, S); None where all is seen."""
        return flash_attention.dense(self.keys_BS, self.causal, length)


def key_mask(mask_BS) -> Mask:
    """Everyone may look at the real tokens."""
    return Mask(mask_BS.astype(bool))


def causal_mask(mask_BL=None) -> Mask:
    """A token may look at itself and before, there at the real ones."""
    return Mask(None if mask_BL is None else mask_BL.astype(bool), causal=True)


def attend(query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale: float = 1.0, rate: float = 0.0, key=None):
    """softmax(scale * q k + bias) v, the softmax in float32: (B, L, N, H). By a kernel where one computes this.

    Keys may have fewer heads than queries (grouped-query attention). `mask` is a `Mask`, or booleans. `key` drives
    dropout on the probabilities.
    """
    drops = bool(rate) and key is not None
    if isinstance(mask, Mask | None):
        mask = mask or Mask()
        if bias is None and not drops:
            given = (query_BLNH, key_BSNH, value_BSNH, mask.keys_BS, mask.causal, scale)
            out_BLNH = flash_attention.fused(*given)
            if out_BLNH is not None:
                return out_BLNH
        mask = mask.dense(query_BLNH.shape[1])
    drop = functools.partial(dropout, rate=rate, key=key) if drops else None
    return flash_attention.plain(query_BLNH, key_BSNH, value_BSNH, mask, bias, scale, drop)


def attend_parts(query_BLNH, parts, mask=None, bias=None, scale: float = 1.0):
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
            for keys, _ in parts
        ],
        axis=-1,
    )
    if bias is not None:
        score_BLNS = score_BLNS + bias.swapaxes(1, 2)
    if isinstance(mask, Mask):
        mask = mask.dense(length)
    if mask is not None:
        score_BLNS = jnp.where(mask.swapaxes(1, 2), score_BLNS, flash_attention.MASKED)
    share_BLNS = jax.nn.softmax(score_BLNS, axis=-1).astype(parts[0][1].dtype)
    ends = np.cumsum([keys.shape[2] for keys, _ in parts])[:-1]
    return sum(
        each(jnp.einsum("BNLS,BNSH->BNLH", shared(share, values), values), values)
        for share, (_, values) in zip(jnp.split(share_BLNS, ends, axis=-1), parts)
    )


class Attention(nn.Module):
    """Queries from x, keys and values from x or from elsewhere; `biases` names which of q, k, v, o have one."""

    width: int
    heads: int
    head: int
    source_width: int | None = None
    kv_heads: int | None = None
    biases: str = "qkvo"
    scale: float | None = None  # None: 1 / sqrt(head)
    rate: float = 0.0
    inits: tuple = (normal(0.02),) * 4  # of q, k, v, o
    lora: LoraConfig = LoraConfig()
    inner_eps: float | None = None  # of a norm before the output projection (sub-LN); None: there is none

    def setup(self):
        source = self.source_width or self.width
        kv_heads = self.kv_heads or self.heads
        axes = ("embed", "heads", "head")

        def project(inputs, heads, letter, init):
            return Dense(inputs, (heads, self.head), axes, letter in self.biases, init, self.lora)

        self.q = project(self.width, self.heads, "q", self.inits[0])
        self.k = project(source, kv_heads, "k", self.inits[1])
        self.v = project(source, kv_heads, "v", self.inits[2])
        self.o = DenseFromHeads(self.heads, self.head, self.width, "o" in self.biases, self.inits[3], self.lora)
        if self.inner_eps is not None:
            self.norm = LayerNorm(self.heads * self.head, self.inner_eps)

    def queries(self, x_BLD, key=None):
        return constrain(self.q(x_BLD, folded(key, 1)), "batch", "length", "act_heads", None)

    def keys_values(self, x_BSD, key=None):
        return self.k(x_BSD, folded(key, 2)), self.v(x_BSD, folded(key, 3))

    def look(self, query_BLNH, keys_values, mask=None, bias=None, key=None, earlier=()):
        """At keys and values (B, S, N, H), and behind `earlier` pieces of them (B, N, S, H) where there are any."""
        scale = 1 / math.sqrt(self.head) if self.scale is None else self.scale
        if earlier:
            parts = (*earlier, tuple(x.swapaxes(1, 2) for x in keys_values))
            out = attend_parts(query_BLNH, parts, mask, bias, scale)
        else:
            out = attend(query_BLNH, *keys_values, mask, bias, scale, self.rate, key)
        if self.inner_eps is not None:
            out = self.norm(out.reshape(*out.shape[:-2], -1)).reshape(out.shape)
        return constrain(self.o(out, folded(key, 4)), "batch", "length", "act_embed")

    def __call__(self, x_BLD, source_BSD=None, mask=None, bias=None, key=None):
        source = x_BLD if source_BSD is None else source_BSD
        query_BLNH, keys_values = self.queries(x_BLD, key), self.keys_values(source, key)
        return self.look(query_BLNH, keys_values, mask, bias, key)


def write(layers_cache, new_BLNH, layer, step):
    """New keys or values of one layer at positions step, step + 1, ... of the cache of all (layers, B, S, N, H).

    Only the new ones move, because a scan that carries the cache changes it in place.
    """
    start = (layer, 0, step, 0, 0)
    return jax.lax.dynamic_update_slice(layers_cache, new_BLNH[None].astype(layers_cache.dtype), start)


def torch_rows(
    names: dict[str, str], heads: int, head: int, biases: str, kv_heads: int | None = None
) -> tuple[Row, ...]:
    """Rows of an `Attention` whose q, k, v, o are four torch Linears with the given names."""
    rows = []
    for letter, name in names.items():
        number = (kv_heads or heads) if letter in "kv" else heads
        kernel = heads_out(heads, head) if letter == "o" else heads_in(number, head)
        rows.append(Row(f"{name}.weight", f"{letter}/kernel", kernel))
        if letter in biases:
            shape = {} if letter == "o" else {"op": heads_in_bias(number, head)}
            rows.append(Row(f"{name}.bias", f"{letter}/bias", **shape))
    return tuple(rows)
