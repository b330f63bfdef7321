# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters with a task router (LION, arXiv 2311.11860); gated cross-attention (Flamingo, 2204.14198)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.weight_map import WeightMapping, linear, split_fused, split_heads_kernel, stack_tensors, with_prefix
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_weight_map, kaiming_uniform, norm_weight_map, ones, zeros


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Config of the routed adapters (LION, section 3.2); with `num_adapters` 1 there is no router."""

    bottleneck_dim: int = 64
    num_adapters: int = 2
    num_tasks: int = 2


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """Config of gated cross-attention to images before each n-th layer of a frozen LM (Flamingo, section 2.2).

    `vision_width`: width of the image tokens. `mlp_dim`: of the feed-forward, 4 times the language model's width.
    """

    every_n_layers: int = 4
    vision_width: int = 1024
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 16384


class GatedCrossAttentionBlock(nn.Module):
    """x += tanh(gate) attention(norm(x), images); x += tanh(mlp_gate) mlp(norm(x)). Both gates start at 0.

    `media`: image tokens of a row (B, S, D), which of them each text token attends to (B, L, S), and whether it
    attends to any (B, L). `media_kv`: keys and values of the image tokens, None if they are to be computed; they are
    returned with x.
    """

    width: int
    c: GatedCrossAttentionConfig

    @nn.compact
    def __call__(self, x_BLD, media, media_kv=None):
        c = self.c
        image_BSD, mask_BLS, attends_BL = media

        def gate(name):
            return jnp.tanh(self.param(name, with_logical_partitioning(zeros, (None,)), (1,))).astype(x_BLD.dtype)

        attention = Attention(self.width, c.num_heads, c.head_dim, c.vision_width, biases="", name="attention")
        media_kv = attention.project_key_value(image_BSD) if media_kv is None else media_kv
        query = attention.project_query(LayerNorm(self.width, 1e-5, name="norm")(x_BLD))
        change_BLD = attention.attend(query, media_kv, mask_BLS[:, None])
        change_BLD = jnp.where(attends_BL[..., None], change_BLD, 0)
        x_BLD = x_BLD + gate("gate") * change_BLD
        mlp = MLP(self.width, c.mlp_dim, use_bias=False, name="mlp")
        change_BLD = mlp(LayerNorm(self.width, 1e-5, name="mlp_norm")(x_BLD))
        return x_BLD + gate("mlp_gate") * change_BLD, media_kv


def gated_cross_attention_weight_map(c: GatedCrossAttentionConfig) -> tuple[WeightMapping, ...]:
    """Names of one gated block in OpenFlamingo."""
    return (
        *with_prefix("attn.", "", flamingo_attention_weight_map(c.num_heads, c.head_dim)),
        *norm_weight_map("attn.norm", "norm"),
        WeightMapping("attn_gate", "gate"),
        *norm_weight_map("ff.0", "mlp_norm"),
        *dense_weight_map("ff.1", "mlp/up", bias=False),
        *dense_weight_map("ff.3", "mlp/down", bias=False),
        WeightMapping("ff_gate", "mlp_gate"),
    )


def flamingo_attention_weight_map(num_heads: int, head_dim: int) -> tuple[WeightMapping, ...]:
    """OpenFlamingo's names of an `Attention` at `attention`; keys and values are one Linear there."""
    split, paths = split_heads_kernel(num_heads, head_dim), ("attention/k/kernel", "attention/v/kernel")
    return (
        *with_prefix("", "attention/", attentions.weight_map({"q": "to_q", "o": "to_out"}, num_heads, head_dim, "")),
        WeightMapping("to_kv.weight", paths, split_fused(split, split)),
    )


class Adapter(nn.Module):
    """Bottleneck adapter up(relu(down(x))) (arXiv 1902.00751); its output starts at 0."""

    width: int
    bottleneck_dim: int

    @nn.compact
    def __call__(self, x_BLD):
        down = Dense(self.width, self.bottleneck_dim, ("embed", "narrow"), kernel_init=kaiming_uniform, name="down")
        up = Dense(self.bottleneck_dim, self.width, ("narrow", "embed"), kernel_init=zeros, name="up")
        scale = self.param("scale", with_logical_partitioning(ones, (None,)), (1,))
        return up(jax.nn.relu(down(x_BLD))) * scale.astype(x_BLD.dtype)


class RoutedAdapters(nn.Module):
    """Sum of parallel adapters, weighted per channel by ratios of the task of each row (LION, section 3.2).

    The original has one task for a whole batch; here each row has its own.
    """

    width: int
    c: AdapterConfig

    @nn.compact
    def __call__(self, x_BLD, task_B):
        changes = [
            Adapter(self.width, self.c.bottleneck_dim, name=f"adapter_{a}")(x_BLD) for a in range(self.c.num_adapters)
        ]
        if self.c.num_adapters == 1:
            return changes[0]
        shape = (self.c.num_tasks, self.c.num_adapters, self.width)
        ratio_TAD = self.param(
            "ratio", with_logical_partitioning(one_adapter_per_task_init, ("task", "task", "embed")), shape
        )
        ratio_BAD = ratio_TAD[task_B].astype(x_BLD.dtype)
        return sum(change * ratio_BAD[:, None, a] for a, change in enumerate(changes))


def one_adapter_per_task_init(key, shape, dtype=jnp.float32):
    """Ratios (tasks, adapters, D) that start with weight 1 of adapter t for task t, else 0."""
    del key
    return jnp.broadcast_to(jnp.eye(shape[0], shape[1], dtype=dtype)[:, :, None], shape)


def adapter_weight_map(c: AdapterConfig) -> tuple[WeightMapping, ...]:
    """LION's names under `...layer.N.adapter.`; its router matrices (task, D) are stacked to (task, adapter, D)."""
    mappings = []
    for a in range(c.num_adapters):
        torch, flax = f"adapters.{a}.", f"adapter_{a}/"
        mappings += [
            WeightMapping(torch + "down_proj.weight", flax + "down/kernel", linear),
            WeightMapping(torch + "down_proj.bias", flax + "down/bias"),
            WeightMapping(torch + "up_proj.weight", flax + "up/kernel", linear),
            WeightMapping(torch + "up_proj.bias", flax + "up/bias"),
            WeightMapping(torch + "scale", flax + "scale"),
        ]
    if c.num_adapters > 1:
        routers = tuple(f"router_ratio{a + 1}" for a in range(c.num_adapters))
        mappings.append(WeightMapping(routers, "ratio", stack_tensors(axis=1)))
    return tuple(mappings)
