# SPDX-License-Identifier: Apache-2.0
"""Learned queries that look at a picture and at themselves: Flamingo's resampler, mPLUG-Owl's and Kosmos-2's bridges.

In all three, keys and values are those of the picture and of the queries, side by side. They differ in where norms and
residuals stand, and in how often they look.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.sharding import constrain, sharded
from lionjax.core.weight_map import Row, reshaped, under
from lionjax.nn import attention as attentions
from lionjax.nn.adapters import flamingo_attention_rows
from lionjax.nn.attention import Attention
from lionjax.nn.layers import MLP, Dense, GatedMLP, LayerNorm, dense_rows, norm_rows, normal, split_key


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Flamingo, section 2.1. `frames`: the most that a film may have, each with a learned mark; 0: no marks."""

    width: int = 1024
    layers: int = 6
    heads: int = 8
    head: int = 64
    hidden: int = 4096
    queries: int = 64
    frames: int = 0
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class AbstractorConfig:
    """mPLUG-Owl's visual abstractor, as wide as the tower. `inner_eps`: of the norm inside its feed-forward."""

    width: int = 1024
    layers: int = 6
    heads: int = 16
    hidden: int = 4096
    queries: int = 64
    eps: float = 1e-5
    inner_eps: float = 1e-6
    dropout: float = 0.1  # on the attention's shares


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Kosmos-2's way into its text decoder, as wide as that.

    `spread`: of the linear's first kernel. What it reads has length 1, so at 1.0 patches begin as loud as queries.
    """

    source_width: int = 1024
    width: int = 2048
    heads: int = 32
    queries: int = 64
    spread: float = 0.02


def _queries(module: nn.Module, scale: float = 0.02):
    shape = (module.c.queries, module.c.width)
    return module.param("queries", sharded(normal(scale), ("position", "embed")), shape)


def _scanned(block, length: int):
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class ResamplerBlock(nn.Module):
    """q += attention(norm q, [norm x; norm q]); q += mlp(norm q)."""

    c: ResamplerConfig

    @nn.compact
    def __call__(self, x_BQD, key, source_BPD):
        c = self.c
        own = Attention(c.width, c.heads, c.head, biases="", name="attention")
        h_BQD = LayerNorm(c.width, c.eps, name="norm")(x_BQD)
        seen_BPD = LayerNorm(c.width, c.eps, name="source_norm")(source_BPD)
        x_BQD = x_BQD + own(h_BQD, jnp.concatenate([seen_BPD, h_BQD], axis=1))
        mlp = MLP(c.width, c.hidden, bias=False, name="mlp")
        x_BQD = x_BQD + mlp(LayerNorm(c.width, c.eps, name="mlp_norm")(x_BQD))
        return constrain(x_BQD, "batch", "length", "act_embed"), None


class Resampler(nn.Module):
    """Each picture or film becomes the same number of words: (..., F, P, D) of F frames -> (..., Q, D)."""

    c: ResamplerConfig

    @nn.compact
    def __call__(self, source):
        c = self.c
        *before, frames, patches, width = source.shape
        if c.frames:
            shape = (c.frames, c.width)
            mark_FD = self.param("frames", sharded(normal(1.0), (None, "embed")), shape)
            source = source + mark_FD[:frames, None].astype(source.dtype)
        source_BPD = source.reshape(-1, frames * patches, width)
        query_QD = _queries(self, 1.0).astype(source.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        x_BQD, _ = _scanned(ResamplerBlock, c.layers)(c, name="blocks")(x_BQD, None, source_BPD)
        return LayerNorm(c.width, c.eps, name="norm")(x_BQD).reshape(*before, *query_QD.shape)


class AbstractorBlock(nn.Module):
    """h = norm q; q = h + attention(h, [h; norm x]); q += mlp(norm q). The residual begins behind the norm."""

    c: AbstractorConfig

    @nn.compact
    def __call__(self, x_BQD, key, source_BPD):
        c = self.c
        own = Attention(c.width, c.heads, c.width // c.heads, rate=c.dropout, name="attention")
        h_BQD = LayerNorm(c.width, c.eps, name="norm")(x_BQD)
        seen_BPD = LayerNorm(c.width, c.eps, name="source_norm")(source_BPD)
        x_BQD = h_BQD + own(h_BQD, jnp.concatenate([h_BQD, seen_BPD], axis=1), key=key)
        mlp = GatedMLP(c.width, c.hidden, "silu", bias=True, inner_eps=c.inner_eps, name="mlp")
        x_BQD = x_BQD + mlp(LayerNorm(c.width, c.eps, name="mlp_norm")(x_BQD))
        return constrain(x_BQD, "batch", "length", "act_embed"), None


class Abstractor(nn.Module):
    """(B, P, D) features of a picture -> (B, Q, D)."""

    c: AbstractorConfig

    @nn.compact
    def __call__(self, source_BPD, key=None):
        c = self.c
        query_QD = _queries(self).astype(source_BPD.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        keys = None if key is None else jnp.stack(split_key(key, c.layers))
        return _scanned(AbstractorBlock, c.layers)(c, name="blocks")(x_BQD, keys, source_BPD)[0]


class Projection(nn.Module):
    """One linear, then one look without norms or residual: (B, P, D) -> (B, Q, width)."""

    c: ProjectionConfig

    @nn.compact
    def __call__(self, source_BPD, key=None):
        c = self.c
        dense = Dense(c.source_width, c.width, ("embed", None), init=normal(c.spread), name="dense")
        source_BPD = dense(source_BPD)
        query_QD = _queries(self, 1.0).astype(source_BPD.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        own = Attention(c.width, c.heads, c.width // c.heads, name="attention")
        return own(x_BQD, jnp.concatenate([source_BPD, x_BQD], axis=1))


def of_config(c: AbstractorConfig | ProjectionConfig) -> nn.Module:
    """The bridge of these sizes."""
    return Abstractor(c) if isinstance(c, AbstractorConfig) else Projection(c)


def resampler_rows(c: ResamplerConfig) -> tuple[Row, ...]:
    """Names under `perceiver.` in OpenFlamingo."""
    block = (
        *under("0.", "", flamingo_attention_rows(c.heads, c.head)),
        *norm_rows("0.norm_media", "source_norm"),
        *norm_rows("0.norm_latents", "norm"),
        *norm_rows("1.0", "mlp_norm"),
        *dense_rows("1.1", "mlp/up", bias=False),
        *dense_rows("1.3", "mlp/down", bias=False),
    )
    return (
        Row("latents", "queries"),
        *((Row("frame_embs", "frames"),) if c.frames else ()),
        *norm_rows("norm", "norm"),
        *under("layers.{i}.", "blocks/", block),
    )


def abstractor_rows(c: AbstractorConfig) -> tuple[Row, ...]:
    """Names in mPLUG-Owl: `query_tokens`, and the layers under `abstractor.encoder.layers.`."""
    linears = {"q": "query", "k": "key", "v": "value"}
    head = c.width // c.heads
    block = (
        *norm_rows("norm1", "norm"),
        *norm_rows("normk", "source_norm"),
        *under("attention.", "attention/", attentions.torch_rows(linears, c.heads, head, "qkv")),
        *under("output.", "attention/", attentions.torch_rows({"o": "out_proj"}, c.heads, head, "o")),
        *norm_rows("output.norm2", "mlp_norm"),
        *dense_rows("output.mlp.w1", "mlp/gate"),
        *dense_rows("output.mlp.w3", "mlp/up"),
        *dense_rows("output.mlp.w2", "mlp/down"),
        *norm_rows("output.mlp.ffn_ln", "mlp/norm"),
    )
    return (
        Row("query_tokens", "queries", reshaped((1, c.queries, c.width), (c.queries, c.width))),
        *under("abstractor.encoder.layers.{i}.crossattention.", "blocks/", block),
    )


def projection_rows(c: ProjectionConfig) -> tuple[Row, ...]:
    """Names under `image_to_text_projection.` in Hugging Face's Kosmos-2."""
    linears = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    rows = attentions.torch_rows(linears, c.heads, c.width // c.heads, "qkvo")
    return (*dense_rows("dense", "dense"), Row("latent_query", "queries"), *under("x_attn.", "attention/", rows))
