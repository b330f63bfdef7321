# SPDX-License-Identifier: Apache-2.0
"""The small parts that models are made of: dense, embedding, norms, activations, feed-forward, patches, windows.

Every parameter has a name in our words, a shape and its logical axes. Norms and softmax run in float32; products run in
the dtype of their input, and the weights follow it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import sharded
from lionjax.core.weight_map import Row, linear
from lionjax.nn.lora import LoraConfig

zeros, ones = nn.initializers.zeros, nn.initializers.ones
normal = nn.initializers.normal
kaiming_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's Linear default, a = sqrt(5)


# What a rematerialised block keeps for its backward pass.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Dense(nn.Module):
    """y = x W + b over the last axis of x. `features` may have two axes (heads, head size)."""

    inputs: int
    features: int | tuple[int, ...]
    axes: tuple[str, ...]  # of the kernel: (input, *features)
    bias: bool = True
    init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x, key=None):
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param("kernel", sharded(self.init, self.axes), (self.inputs, *features))
        y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.lora.rank and self.name in self.lora.targets:
            y = y + self.detour(x, features, key)
        if self.bias:
            y = y + self.param("bias", sharded(zeros, self.axes[1:]), features).astype(x.dtype)
        return y

    def detour(self, x, features, key):
        rank = self.lora.rank
        a = self.param("lora_a", sharded(kaiming_uniform, (self.axes[0], "narrow")), (self.inputs, rank))
        b = self.param("lora_b", sharded(zeros, ("narrow", *self.axes[1:])), (rank, *features))
        low = dropout(x, self.lora.dropout, key) @ a.astype(x.dtype)
        return jnp.tensordot(low, b.astype(x.dtype), 1) * (self.lora.alpha / rank)


class DenseFromHeads(nn.Module):
    """(…, N, H) -> (…, D): an attention's output projection."""

    heads: int
    head: int
    features: int
    bias: bool = True
    init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x_BLNH, key=None):
        x = x_BLNH.reshape(*x_BLNH.shape[:-2], self.heads * self.head)
        shape = (self.heads, self.head, self.features)
        kernel = self.param("kernel", sharded(flat_in(self.init), ("heads", "head", "embed")), shape)
        y = x @ kernel.reshape(-1, self.features).astype(x.dtype)
        if self.lora.rank and self.name in self.lora.targets:
            rank = self.lora.rank
            axes = ("heads", "head", "narrow")
            a = self.param("lora_a", sharded(flat_in(kaiming_uniform), axes), (self.heads, self.head, rank))
            b = self.param("lora_b", sharded(zeros, ("narrow", "embed")), (rank, self.features))
            low = dropout(x, self.lora.dropout, key) @ a.reshape(-1, rank).astype(x.dtype)
            y = y + low @ b.astype(x.dtype) * (self.lora.alpha / rank)
        if self.bias:
            y = y + self.param("bias", sharded(zeros, ("embed",)), (self.features,)).astype(x.dtype)
        return y


def flat_in(init: Callable) -> Callable:
    """An initialiser that sees all axes but the last as one (its fan-in)."""

    def wrapped(key, shape, dtype=jnp.float32):
        flat = 1
        for size in shape[:-1]:
            flat *= size
        return init(key, (flat, shape[-1]), dtype).reshape(shape)

    return wrapped


class Embed(nn.Module):
    """Rows of a table by id: (B, L) -> (B, L, D). The first `frozen` rows get no gradient."""

    vocab: int
    width: int
    init: Callable = normal(0.02)
    frozen: int = 0

    def setup(self):
        table = self.param("table", sharded(self.init, ("vocab", "embed")), (self.vocab, self.width))
        if self.frozen:
            learns_V1 = (jnp.arange(self.vocab) >= self.frozen)[:, None]
            table = jnp.where(learns_V1, table, jax.lax.stop_gradient(table))
        self.table = table

    def __call__(self, ids_BL, dtype=jnp.float32):
        return jnp.take(self.table, ids_BL, axis=0).astype(dtype)

    def attend(self, x_BLD):
        """Logits against the same table."""
        return x_BLD @ self.table.T.astype(x_BLD.dtype)


class LayerNorm(nn.Module):
    """Mean and variance over the last axis, in float32; the result has the input's dtype."""

    width: int
    eps: float
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", sharded(ones, ("embed",)), (self.width,))
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        centred = wide - mean
        variance = (centred * centred).mean(-1, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.bias:
            y = y + self.param("bias", sharded(zeros, ("embed",)), (self.width,))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square over the last axis, in float32, no centring, no bias (T5, LLaMA)."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", sharded(ones, ("embed",)), (self.width,))
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)).astype(x.dtype) * scale.astype(
            x.dtype
        )


@jax.custom_vjp
def gelu(x):
    """GELU with the exact erf (torch's "gelu")."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.7071067811865476))


def _gelu_forward(x):
    cdf = 0.5 * (1 + jax.lax.erf(x * 0.7071067811865476))
    slope = cdf + x * jnp.exp(-0.5 * x * x) * 0.3989422804014327
    return x * cdf, slope.astype(x.dtype)


gelu.defvjp(_gelu_forward, lambda slope, change: (change * slope,))

ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nn.Module):
    """Dense, activation, dense."""

    width: int
    hidden: int
    activation: str = "gelu"
    features: int | None = None
    bias: bool = True
    init: Callable = normal(0.02)
    zero_out: bool = False  # start with an output of zero
    inner_eps: float | None = None  # of a norm before the second dense (sub-LN); None: there is none

    @nn.compact
    def __call__(self, x):
        out = zeros if self.zero_out else self.init
        up = Dense(self.width, self.hidden, ("embed", "mlp"), self.bias, self.init, name="up")
        down = Dense(self.hidden, self.features or self.width, ("mlp", "embed"), self.bias, out, name="down")
        h = ACTIVATIONS[self.activation](up(x))
        if self.inner_eps is not None:
            h = LayerNorm(self.hidden, self.inner_eps, name="norm")(h)
        return down(h)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): T5 v1.1's (wi_0 gate, wi_1 up) and LLaMA's feed-forward."""

    width: int
    hidden: int
    activation: str
    init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()
    bias: bool = False
    inner_eps: float | None = None  # of a norm before the last dense; None: there is none

    @nn.compact
    def __call__(self, x, dropout_rate: float = 0.0, key=None):
        def dense(inputs, outputs, axes, name):
            return Dense(inputs, outputs, axes, self.bias, self.init, self.lora, name=name)

        gate = dense(self.width, self.hidden, ("embed", "mlp"), "gate")(x, folded(key, 1))
        hidden = ACTIVATIONS[self.activation](gate) * dense(self.width, self.hidden, ("embed", "mlp"), "up")(
            x, folded(key, 2)
        )
        if self.inner_eps is not None:
            hidden = LayerNorm(self.hidden, self.inner_eps, name="norm")(hidden)
        return dense(self.hidden, self.width, ("mlp", "embed"), "down")(
            dropout(hidden, dropout_rate, key), folded(key, 3)
        )


class PatchEmbed(nn.Module):
    """(B, H, W, C) -> (B, P, D): a convolution whose stride is its kernel, as one product; patches row by row."""

    patch: int
    width: int
    channels: int = 3
    bias: bool = True

    @nn.compact
    def __call__(self, image_BHWC):
        p, c = self.patch, self.channels
        shape = (p, p, c, self.width)
        kernel = self.param("kernel", sharded(flat_in(normal(0.02)), ("conv", "conv", "conv", "embed")), shape)
        batch, high, wide, _ = image_BHWC.shape
        rows, columns = high // p, wide // p
        x = image_BHWC[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, c)
        x_BPF = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * c)
        y_BPD = x_BPF @ kernel.reshape(-1, self.width).astype(x_BPF.dtype)
        if self.bias:
            y_BPD = y_BPD + self.param("bias", sharded(zeros, ("embed",)), (self.width,)).astype(y_BPD.dtype)
        return y_BPD


class Conv(nn.Module):
    """(B, H, W, C) -> (B, H', W', D): a square kernel at every `stride`-th pixel, zeros around the picture."""

    inputs: int
    features: int
    kernel: int = 3
    stride: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (self.kernel, self.kernel, self.inputs, self.features)
        init = sharded(flat_in(normal(0.02)), ("conv", "conv", None, "embed"))
        kernel = self.param("kernel", init, shape).astype(x_BHWC.dtype)
        room = ((self.kernel // 2, self.kernel // 2),) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x_BHWC, kernel, (self.stride,) * 2, room, dimension_numbers=layout)
        if self.bias:
            y = y + self.param("bias", sharded(zeros, ("embed",)), (self.features,)).astype(y.dtype)
        return y


def into_squares(x_BHWD, side: int):
    """(B, H, W, D) -> (B', side * side, D): squares row by row, zeros beyond the right and lower edge."""
    batch, high, wide, width = x_BHWD.shape
    x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, -high % side), (0, -wide % side), (0, 0)))
    down, across = x_BHWD.shape[1] // side, x_BHWD.shape[2] // side
    x = x_BHWD.reshape(batch, down, side, across, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * down * across, side * side, width)


def from_squares(x_BLD, side: int, shape: tuple[int, ...]):
    """The inverse of `into_squares` for what had this shape."""
    batch, high, wide, width = shape
    down, across = -(-high // side), -(-wide // side)
    x = x_BLD.reshape(batch, down, across, side, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, down * side, across * side, width)[:, :high, :wide]


def dropout(x, rate: float, key):
    """Zero a share of x and scale the rest; the identity when rate is 0 or key is None (evaluation)."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def folded(key, number: int):
    """A key of its own for one of several that share one, which stays as it was; None from None."""
    return None if key is None else jax.random.fold_in(key, number)


def split_key(key, number: int):
    """`number` keys from one; Nones from None, so that evaluation needs no branch."""
    return [None] * number if key is None else jax.random.split(key, number)


def pick(x_BLD, place_BK):
    """Rows of x at these places: (B, L, ...) -> (B, K, ...)."""
    return jnp.take_along_axis(x_BLD, place_BK.reshape(*place_BK.shape, *(1,) * (x_BLD.ndim - 2)), axis=1)


def dense_rows(torch: str, flax: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a `Dense` that is a torch Linear."""
    rows = (Row(f"{torch}.weight", f"{flax}/kernel", linear),)
    return (*rows, Row(f"{torch}.bias", f"{flax}/bias")) if bias else rows


def norm_rows(torch: str, flax: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a norm: torch's weight is our scale."""
    rows = (Row(f"{torch}.weight", f"{flax}/scale"),)
    return (*rows, Row(f"{torch}.bias", f"{flax}/bias")) if bias else rows
