# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention (arXiv 1706.03762): masks, scaled dot-product attention, the `Attention` layer, the KV cache.

A mask is an `AttentionMask`, which fused kernels accept, or boolean (True: attend) and broadcasts to (B, N, L, S).
Biases are added to the scores in float32.
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
    """Mask as valid keys (B, S), None for all, and a causal flag: the form that fused kernels accept.

    `segment_BL`: in attention of a sequence to itself, queries attend to keys of their own segment; None: to all.
    """

    key_valid_BS: jax.Array | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    segment_BL: jax.Array | None = None

    def to_dense(self, length: int):
        """Boolean mask that broadcasts to (B, 1, L, S), for L = `length` queries; None if nothing is masked."""
        mask = flash_attention.dense_mask(self.key_valid_BS, self.causal, length)
        if self.segment_BL is None:
            return mask
        is_same_BLL = (self.segment_BL[:, :, None] == self.segment_BL[:, None])[:, None]
        return is_same_BLL if mask is None else is_same_BLL & mask


def key_padding_mask(valid_BS) -> AttentionMask:
    """Mask in which all queries attend to the valid keys."""
    return AttentionMask(valid_BS.astype(bool))


def causal_mask(valid_BL=None) -> AttentionMask:
    """Mask in which a query attends to itself and earlier positions, where these are valid."""
    return AttentionMask(None if valid_BL is None else valid_BL.astype(bool), causal=True)


def segmented_causal_mask(segment_BL) -> AttentionMask:
    """Mask in which a query attends to itself and earlier positions of its segment."""
    return AttentionMask(causal=True, segment_BL=segment_BL)


def dot_product_attention(
    query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale: float = 1.0, dropout_rate: float = 0.0, key=None
):
    """softmax(scale * q k + bias) v (B, L, N, H), the softmax in float32, by a fused kernel if one supports the inputs.

    Keys may have fewer heads than queries (grouped-query attention). `key` drives dropout on the probabilities.
    """
    drops = bool(dropout_rate) and key is not None
    if isinstance(mask, AttentionMask | None):
        mask = mask or AttentionMask()
        if bias is None and not drops:
            out_BLNH = flash_attention.flash_attention(
                query_BLNH, key_BSNH, value_BSNH, mask.key_valid_BS, mask.causal, scale, mask.segment_BL
            )
            if out_BLNH is not None:
                return out_BLNH
        mask = mask.to_dense(query_BLNH.shape[1])
    dropout_fn = functools.partial(dropout, rate=dropout_rate, key=key) if drops else None
    return flash_attention.reference_attention(query_BLNH, key_BSNH, value_BSNH, mask, bias, scale, dropout_fn)


def segmented_attention(query_BLNH, kv_segments, mask=None, bias=None, scale: float = 1.0):
    """As `dot_product_attention`, with keys and values (B, N, S, H) in several segments that are not concatenated.

    A segment may have fewer rows than the queries; its row b then serves queries b n to (b + 1) n - 1 (the n beams of
    one prompt).
    """
    rows, length, heads, head = query_BLNH.shape

    def group_queries(x_BLNX, key_BNSH):
        """(B, L, N, X) -> (rows of the segment, heads of the segment, queries, X)."""
        kv_rows, kv_heads, size = len(key_BNSH), key_BNSH.shape[1], x_BLNX.shape[-1]
        x = x_BLNX.reshape(kv_rows, rows // kv_rows * length, kv_heads, heads // kv_heads, size)
        queries = rows // kv_rows * length * (heads // kv_heads)  # not -1, which fails for an empty segment
        return x.transpose(0, 2, 1, 3, 4).reshape(kv_rows, kv_heads, queries, size)

    def ungroup_queries(x, key_BNSH):
        """The inverse of `group_queries`."""
        kv_rows, kv_heads, size = len(key_BNSH), key_BNSH.shape[1], x.shape[-1]
        x = x.reshape(kv_rows, kv_heads, rows // kv_rows * length, heads // kv_heads, size)
        return x.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, size)

    def segment_scores(keys):
        query = group_queries(query_BLNH, keys)
        return ungroup_queries(jnp.einsum("BNLH,BNSH->BNLS", query, keys, preferred_element_type=jnp.float32), keys)

    score_BLNS = scale * jnp.concatenate([segment_scores(keys) for keys, _ in kv_segments], axis=-1)
    if bias is not None:
        score_BLNS = score_BLNS + bias.swapaxes(1, 2)
    if isinstance(mask, AttentionMask):
        mask = mask.to_dense(length)
    if mask is not None:
        score_BLNS = jnp.where(mask.swapaxes(1, 2), score_BLNS, flash_attention.MASK_VALUE)
    probs_BLNS = jax.nn.softmax(score_BLNS, axis=-1).astype(kv_segments[0][1].dtype)
    ends = np.cumsum([keys.shape[2] for keys, _ in kv_segments])[:-1]
    return sum(
        ungroup_queries(jnp.einsum("BNLS,BNSH->BNLH", group_queries(probs, values), values), values)
        for probs, (_, values) in zip(jnp.split(probs_BLNS, ends, axis=-1), kv_segments)
    )


def copying_inits(sharpness: float) -> tuple:
    """Initializers of q, k, v and o with which attention copies what resembles its query, for inputs of one width.

    q and k are one orthogonal matrix, so that a source vector scores `sharpness` times its product with the query; v is
    another one, which o inverts.
    """

    def orthogonal(number: int, factor: float):
        def init(key, shape, dtype=jnp.float32):  # the same values for every key
            matrix = nn.initializers.orthogonal()(jax.random.key(number), (shape[0], math.prod(shape[1:])), dtype)
            return (factor * matrix).reshape(shape)

        return init

    def inverse(key, shape, dtype=jnp.float32):
        return orthogonal(1, 1.0)(key, shape[::-1], dtype).T

    match = orthogonal(0, sharpness**0.5)
    return (match, match, orthogonal(1, 1.0), inverse)


class Attention(nn.Module):
    """Multi-head attention of x (B, L, D) to itself or to a source (B, S, D').

    `biases`: which of q, k, v, o have a bias. `num_kv_heads`: fewer than `num_heads` for grouped-query attention.
    """

    width: int
    num_heads: int
    head_dim: int
    source_width: int | None = None
    num_kv_heads: int | None = None
    biases: str = "qkvo"
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    dropout_rate: float = 0.0
    kernel_inits: tuple = (normal(0.02),) * 4  # of q, k, v, o
    lora: LoraConfig = LoraConfig()
    sub_ln_eps: float | None = None  # epsilon of a norm before the output projection (sub-LN); None: no norm

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
        """Queries (B, L, N, H)."""
        return with_logical_constraint(self.q(x_BLD, fold_in(key, 1)), "batch", "length", "act_heads", None)

    def project_key_value(self, x_BSD, key=None):
        """Keys and values, each (B, S, num_kv_heads, H)."""
        return self.k(x_BSD, fold_in(key, 2)), self.v(x_BSD, fold_in(key, 3))

    def attend(self, query_BLNH, key_value, mask=None, bias=None, key=None, past_kv=()):
        """Output (B, L, D) of queries at keys and values (B, S, N, H), and at those of the segments `past_kv`.

        Past keys and values (B, N, S, H) come before the others, which may be None; there is no dropout with them. A
        product of one query with keys in this order of axes reads them where they lie; in the other they are copied.
        """
        scale = 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale
        if past_kv:
            new_kv = () if key_value is None else (tuple(x.swapaxes(1, 2) for x in key_value),)
            segments = (*past_kv, *new_kv)
            out = segmented_attention(query_BLNH, segments, mask, bias, scale)
        else:
            out = dot_product_attention(query_BLNH, *key_value, mask, bias, scale, self.dropout_rate, key)
        if self.sub_ln_eps is not None:
            out = self.norm(out.reshape(*out.shape[:-2], -1)).reshape(out.shape)
        return with_logical_constraint(self.o(out, fold_in(key, 4)), "batch", "length", "act_embed")

    def __call__(self, x_BLD, source_BSD=None, mask=None, bias=None, key=None):
        source = x_BLD if source_BSD is None else source_BSD
        query_BLNH, keys_values = self.project_query(x_BLD, key), self.project_key_value(source, key)
        return self.attend(query_BLNH, keys_values, mask, bias, key)


def update_kv_cache(cache, new_BNLH, layer, position):
    """The cache (layers, B, N, S, H) with new keys or values (B, N, L, H) of one layer from `position` on.

    Inside a scan that carries the cache, XLA updates it in place.
    """
    start = (layer, 0, 0, position, 0)
    return jax.lax.dynamic_update_slice(cache, new_BNLH[None].astype(cache.dtype), start)


def weight_map(
    torch_modules: dict[str, str], num_heads: int, head_dim: int, biases: str, num_kv_heads: int | None = None
) -> tuple[WeightMapping, ...]:
    """Mappings of an `Attention` whose q, k, v, o are torch Linears: `torch_modules` is {letter: torch module}."""
    mappings = []
    for letter, name in torch_modules.items():
        heads = (num_kv_heads or num_heads) if letter in "kv" else num_heads
        kernel = merge_heads_kernel(num_heads, head_dim) if letter == "o" else split_heads_kernel(heads, head_dim)
        mappings.append(WeightMapping(f"{name}.weight", f"{letter}/kernel", kernel))
        if letter in biases:
            transform = {} if letter == "o" else {"transform": split_heads(heads, head_dim)}
            mappings.append(WeightMapping(f"{name}.bias", f"{letter}/bias", **transform))
    return tuple(mappings)
