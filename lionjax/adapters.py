# SPDX-License-Identifier: Apache-2.0
"""Narrow detours beside frozen layers: LION's bottleneck adapters and the router that mixes them by task."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.layers import Dense, kaiming_uniform, ones, zeros
from lionjax.sharding import sharded
from lionjax.weight_rows import Row, joined, linear


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LION, section 3.2: how narrow, how many, and for how many tasks they are mixed. One adapter needs no router."""

    bottleneck: int = 64
    count: int = 2
    tasks: int = 2


class Adapter(nn.Module):
    """A narrow detour around a frozen layer; it starts by adding nothing."""

    width: int
    bottleneck: int

    @nn.compact
    def __call__(self, x_BLD):
        down = Dense(
            self.width, self.bottleneck, ("embed", "narrow"), init=kaiming_uniform, name="down"
        )
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
        changes = [
            Adapter(self.width, self.c.bottleneck, name=f"adapter_{a}")(x_BLD)
            for a in range(self.c.count)
        ]
        if self.c.count == 1:
            return changes[0]
        shape = (self.c.tasks, self.c.count, self.width)
        ratio_TAD = self.param(
            "ratio", sharded(one_adapter_per_task, ("task", "task", "embed")), shape
        )
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
        rows.append(
            Row(tuple(f"router_ratio{a + 1}" for a in range(c.count)), "ratio", joined(axis=1))
        )
    return tuple(rows)
