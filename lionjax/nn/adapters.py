# SPDX-License-Identifier: Apache-2.0
"""What is put beside and between frozen layers: LION's bottleneck adapters with their router, Flamingo's looks."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import sharded
from lionjax.core.weight_map import Row, fused, heads_in, joined, linear, under
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_rows, kaiming_uniform, norm_rows, ones, zeros


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LION, section 3.2: how narrow, how many, and for how many tasks they are mixed. One adapter needs no router."""

    bottleneck: int = 64
    count: int = 2
    tasks: int = 2


@dataclasses.dataclass(frozen=True)
class CrossConfig:
    """Flamingo, section 2.2: a look at the pictures before each n-th layer of a frozen language model.

    `source_width`: of the pictures' words. `hidden`: of its feed-forward, 4 times the language model's width.
    """

    every: int = 4
    source_width: int = 1024
    heads: int = 8
    head: int = 64
    hidden: int = 16384


class GatedCross(nn.Module):
    """x += tanh(gate) attention(norm x, pictures); x += tanh(mlp_gate) mlp(norm x). Both gates begin at zero.

    `media`: the words of a row's pictures (B, S, D), who looks at which (B, L, S), and whose look counts (B, L).
    `kept` are keys and values of those words, where they are known already; they are handed back.
    """

    width: int
    c: CrossConfig

    @nn.compact
    def __call__(self, x_BLD, media, kept=None):
        c = self.c
        source_BSD, seen_BLS, real_BL = media

        def gate(name):
            return jnp.tanh(self.param(name, sharded(zeros, (None,)), (1,))).astype(x_BLD.dtype)

        own = Attention(self.width, c.heads, c.head, c.source_width, biases="", name="attention")
        kept = own.keys_values(source_BSD) if kept is None else kept
        query = own.queries(LayerNorm(self.width, 1e-5, name="norm")(x_BLD))
        change_BLD = own.look(query, kept, seen_BLS[:, None])
        change_BLD = jnp.where(real_BL[..., None], change_BLD, 0)
        x_BLD = x_BLD + gate("gate") * change_BLD
        mlp = MLP(self.width, c.hidden, bias=False, name="mlp")
        change_BLD = mlp(LayerNorm(self.width, 1e-5, name="mlp_norm")(x_BLD))
        return x_BLD + gate("mlp_gate") * change_BLD, kept


def cross_rows(c: CrossConfig) -> tuple[Row, ...]:
    """Names of one gated block in OpenFlamingo."""
    return (
        *under("attn.", "", flamingo_attention_rows(c.heads, c.head)),
        *norm_rows("attn.norm", "norm"),
        Row("attn_gate", "gate"),
        *norm_rows("ff.0", "mlp_norm"),
        *dense_rows("ff.1", "mlp/up", bias=False),
        *dense_rows("ff.3", "mlp/down", bias=False),
        Row("ff_gate", "mlp_gate"),
    )


def flamingo_attention_rows(heads: int, head: int) -> tuple[Row, ...]:
    """An `Attention` under `attention` as OpenFlamingo names it: keys and values are one Linear."""
    cut, paths = heads_in(heads, head), ("attention/k/kernel", "attention/v/kernel")
    return (
        *under("", "attention/", attentions.torch_rows({"q": "to_q", "o": "to_out"}, heads, head, "")),
        Row("to_kv.weight", paths, fused(cut, cut)),
    )


class Adapter(nn.Module):
    """A narrow detour around a frozen layer; it starts by adding nothing."""

    width: int
    bottleneck: int

    @nn.compact
    def __call__(self, x_BLD):
        down = Dense(self.width, self.bottleneck, ("embed", "narrow"), init=kaiming_uniform, name="down")
        up = Dense(self.bottleneck, self.width, ("narrow", "embed"), init=zeros, name="up")
        scale = self.param("scale", sharded(ones, (None,)), (1,))
        return up(jax.nn.relu(down(x_BLD))) * scale.astype(x_BLD.dtype)


class RoutedAdapters(nn.Module):
    """Adapters side by side, mixed per channel by ratios that depend on the task of each row of the batch.

    The original keeps one router index for a whole batch; here each row has its own, so tasks may mix.
    """

    width: int
    c: AdapterConfig

    @nn.compact
    def __call__(self, x_BLD, task_B):
        changes = [Adapter(self.width, self.c.bottleneck, name=f"adapter_{a}")(x_BLD) for a in range(self.c.count)]
        if self.c.count == 1:
            return changes[0]
        shape = (self.c.tasks, self.c.count, self.width)
        ratio_TAD = self.param("ratio", sharded(one_adapter_per_task, ("task", "task", "embed")), shape)
        ratio_BAD = ratio_TAD[task_B].astype(x_BLD.dtype)
        return sum(change * ratio_BAD[:, None, a] for a, change in enumerate(changes))


def one_adapter_per_task(key, shape, dtype=jnp.float32):
    """Task t starts with adapter t alone."""
    del key
    return jnp.broadcast_to(jnp.eye(shape[0], shape[1], dtype=dtype)[:, :, None], shape)


def torch_rows(c: AdapterConfig) -> tuple[Row, ...]:
    """LION's names under `...layer.N.adapter.`; the two router matrices become one (task, adapter, D) array."""
    rows = []
    for a in range(c.count):
        theirs, ours = f"adapters.{a}.", f"adapter_{a}/"
        rows += [
            Row(theirs + "down_proj.weight", ours + "down/kernel", linear),
            Row(theirs + "down_proj.bias", ours + "down/bias"),
            Row(theirs + "up_proj.weight", ours + "up/kernel", linear),
            Row(theirs + "up_proj.bias", ours + "up/bias"),
            Row(theirs + "scale", ours + "scale"),
        ]
    if c.count > 1:
        rows.append(Row(tuple(f"router_ratio{a + 1}" for a in range(c.count)), "ratio", joined(axis=1)))
    return tuple(rows)
