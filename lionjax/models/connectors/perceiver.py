# SPDX-License-Identifier: Apache-2.0
"""Connectors with learned queries: Flamingo's Perceiver resampler (arXiv 2204.14198), mPLUG-Owl's, Kosmos-2's.

In all three, learned queries attend to the image features and to themselves in one attention. They differ in their
norms, residuals and depth. mPLUG-Owl's visual abstractor: arXiv 2304.14178; Kosmos-2: 2306.14824.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.weight_map import WeightMapping, reshape, with_prefix
from lionjax.nn import attention as attentions
from lionjax.nn import layers
from lionjax.nn.adapters import flamingo_attention_weight_map
from lionjax.nn.attention import Attention
from lionjax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class LatentQueryConfig:
    """What the modules have in common whose learned queries read the tower's output in `depth` layers."""

    width: int = 1024
    depth: int = 6
    _: dataclasses.KW_ONLY
    norm_eps: float = 1e-5


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class ResamplerConfig(LatentQueryConfig):
    """Config of the Perceiver resampler (Flamingo, section 2.1).

    `max_frames`: number of learned frame embeddings for videos; 0: none.
    """

    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 4096
    num_query_tokens: int = 64
    max_frames: int = 0


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class AbstractorConfig(LatentQueryConfig):
    """Config of mPLUG-Owl's visual abstractor; `width` is that of the tower.

    `sub_ln_eps`: epsilon of the norm inside its feed-forward.
    """

    num_heads: int = 16
    mlp_dim: int = 4096
    num_query_tokens: int = 64
    sub_ln_eps: float = 1e-6
    dropout: float = 0.1  # on the attention probabilities


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class ImageToTextProjectionConfig:
    """Config of Kosmos-2's connector; `width` is that of the text decoder.

    `init_std`: of the linear's kernel. Its inputs are L2-normalized, so with 1.0 patches start as large as the queries.
    """

    vision_width: int = 1024
    width: int = 2048
    num_heads: int = 32
    num_query_tokens: int = 64
    init_std: float = 0.02
    lora: LoraConfig = LoraConfig()


def _query_tokens(module: nn.Module, init_std: float = 0.02):
    shape = (module.c.num_query_tokens, module.c.width)
    return module.param("queries", with_logical_partitioning(layers.normal(init_std), ("position", "embed")), shape)


class ResamplerBlock(nn.Module):
    """q += attention(norm(q), [norm(x); norm(q)]); q += mlp(norm(q))."""

    c: ResamplerConfig

    @nn.compact
    def __call__(self, x_BQD, key, source_BPD):
        c = self.c
        attention = Attention(c.width, c.num_heads, c.head_dim, biases="", name="attention")
        h_BQD = layers.LayerNorm(c.width, c.norm_eps, name="norm")(x_BQD)
        source_BPD = layers.LayerNorm(c.width, c.norm_eps, name="source_norm")(source_BPD)
        x_BQD = x_BQD + attention(h_BQD, jnp.concatenate([source_BPD, h_BQD], axis=1))
        mlp = layers.MLP(c.width, c.mlp_dim, use_bias=False, name="mlp")
        x_BQD = x_BQD + mlp(layers.LayerNorm(c.width, c.norm_eps, name="mlp_norm")(x_BQD))
        return with_logical_constraint(x_BQD, "batch", "length", "act_embed"), None


class Resampler(nn.Module):
    """Perceiver resampler: Q image tokens (..., Q, D) for each image or video (..., F, P, D) of F frames."""

    c: ResamplerConfig

    @nn.compact
    def __call__(self, source):
        c = self.c
        *lead, frames, patches, width = source.shape
        if c.max_frames:
            shape = (c.max_frames, c.width)
            frame_FD = self.param("frames", with_logical_partitioning(layers.normal(1.0), (None, "embed")), shape)
            source = source + frame_FD[:frames, None].astype(source.dtype)
        source_BPD = source.reshape(-1, frames * patches, width)
        query_QD = _query_tokens(self, 1.0).astype(source.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        x_BQD, _ = layers.scan_blocks(ResamplerBlock, c.depth, 1, unchecked_in=self)(c, name="blocks")(
            x_BQD, None, source_BPD
        )
        return layers.LayerNorm(c.width, c.norm_eps, name="norm")(x_BQD).reshape(*lead, *query_QD.shape)


class AbstractorBlock(nn.Module):
    """h = norm(q); q = h + attention(h, [h; norm(x)]); q += mlp(norm(q)). The first residual starts after the norm."""

    c: AbstractorConfig

    @nn.compact
    def __call__(self, x_BQD, key, source_BPD):
        c = self.c
        attention = Attention(c.width, c.num_heads, c.width // c.num_heads, dropout_rate=c.dropout, name="attention")
        h_BQD = layers.LayerNorm(c.width, c.norm_eps, name="norm")(x_BQD)
        source_BPD = layers.LayerNorm(c.width, c.norm_eps, name="source_norm")(source_BPD)
        x_BQD = h_BQD + attention(h_BQD, jnp.concatenate([h_BQD, source_BPD], axis=1), key=key)
        mlp = layers.GatedMLP(c.width, c.mlp_dim, "silu", use_bias=True, sub_ln_eps=c.sub_ln_eps, name="mlp")
        x_BQD = x_BQD + mlp(layers.LayerNorm(c.width, c.norm_eps, name="mlp_norm")(x_BQD))
        return with_logical_constraint(x_BQD, "batch", "length", "act_embed"), None


class Abstractor(nn.Module):
    """Image tokens (B, Q, D) from image features (B, P, D)."""

    c: AbstractorConfig

    @nn.compact
    def __call__(self, source_BPD, key=None):
        c = self.c
        query_QD = _query_tokens(self).astype(source_BPD.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        keys = None if key is None else jnp.stack(layers.split_key(key, c.depth))
        return layers.scan_blocks(AbstractorBlock, c.depth, 1, unchecked_in=self)(c, name="blocks")(
            x_BQD, keys, source_BPD
        )[0]


class ImageToTextProjection(nn.Module):
    """Image tokens (B, Q, width) from features (B, P, D): a linear, then attention without norms or residual."""

    c: ImageToTextProjectionConfig

    @nn.compact
    def __call__(self, source_BPD, key=None):
        c = self.c
        init = layers.normal(c.init_std)
        dense = layers.Dense(c.vision_width, c.width, ("embed", None), kernel_init=init, lora=c.lora, name="dense")
        source_BPD = dense(source_BPD, layers.fold_in(key, 1))
        query_QD = _query_tokens(self, 1.0).astype(source_BPD.dtype)
        x_BQD = jnp.broadcast_to(query_QD, (len(source_BPD), *query_QD.shape))
        attention = Attention(c.width, c.num_heads, c.width // c.num_heads, lora=c.lora, name="attention")
        return attention(x_BQD, jnp.concatenate([source_BPD, x_BQD], axis=1), key=layers.fold_in(key, 2))


def build_connector(c: AbstractorConfig | ImageToTextProjectionConfig) -> nn.Module:
    """The flax module of a connector config."""
    return Abstractor(c) if isinstance(c, AbstractorConfig) else ImageToTextProjection(c)


def resampler_weight_map(c: ResamplerConfig) -> tuple[WeightMapping, ...]:
    """Names under `perceiver.` in OpenFlamingo."""
    block = (
        *with_prefix("0.", "", flamingo_attention_weight_map(c.num_heads, c.head_dim)),
        *layers.norm_weight_map("0.norm_media", "source_norm"),
        *layers.norm_weight_map("0.norm_latents", "norm"),
        *layers.norm_weight_map("1.0", "mlp_norm"),
        *layers.dense_weight_map("1.1", "mlp/up", bias=False),
        *layers.dense_weight_map("1.3", "mlp/down", bias=False),
    )
    return (
        WeightMapping("latents", "queries"),
        *((WeightMapping("frame_embs", "frames"),) if c.max_frames else ()),
        *layers.norm_weight_map("norm", "norm"),
        *with_prefix("layers.{i}.", "blocks/", block),
    )


def abstractor_weight_map(c: AbstractorConfig) -> tuple[WeightMapping, ...]:
    """Names in mPLUG-Owl: `query_tokens`, and the layers under `abstractor.encoder.layers.`."""
    linears = {"q": "query", "k": "key", "v": "value"}
    head = c.width // c.num_heads
    block = (
        *layers.norm_weight_map("norm1", "norm"),
        *layers.norm_weight_map("normk", "source_norm"),
        *with_prefix("attention.", "attention/", attentions.weight_map(linears, c.num_heads, head, "qkv")),
        *with_prefix("output.", "attention/", attentions.weight_map({"o": "out_proj"}, c.num_heads, head, "o")),
        *layers.norm_weight_map("output.norm2", "mlp_norm"),
        *layers.dense_weight_map("output.mlp.w1", "mlp/gate"),
        *layers.dense_weight_map("output.mlp.w3", "mlp/up"),
        *layers.dense_weight_map("output.mlp.w2", "mlp/down"),
        *layers.norm_weight_map("output.mlp.ffn_ln", "mlp/norm"),
    )
    return (
        WeightMapping(
            "query_tokens", "queries", reshape((1, c.num_query_tokens, c.width), (c.num_query_tokens, c.width))
        ),
        *with_prefix("abstractor.encoder.layers.{i}.crossattention.", "blocks/", block),
    )


def projection_weight_map(c: ImageToTextProjectionConfig) -> tuple[WeightMapping, ...]:
    """Names under `image_to_text_projection.` in Hugging Face's Kosmos-2."""
    linears = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    attention = attentions.weight_map(linears, c.num_heads, c.width // c.num_heads, "qkvo")
    return (
        *layers.dense_weight_map("dense", "dense"),
        WeightMapping("latent_query", "queries"),
        *with_prefix("x_attn.", "attention/", attention),
    )
