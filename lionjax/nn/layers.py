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

from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.weight_map import WeightMapping, linear
from lionjax.nn.lora import LoraConfig

zeros, ones = nn.initializers.zeros, nn.initializers.ones
normal = nn.initializers.normal
kaiming_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's Linear default, a = sqrt(5)


# What a rematerialised block keeps for its backward pass.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Dense(nn.Module):
    """y = x W + b over the last axis of x. `features` may have two axes (heads, head size)."""

    in_features: int
    features: int | tuple[int, ...]
    kernel_axes: tuple[str, ...]  # of the kernel: (input, *features)
    use_bias: bool = True
    kernel_init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x, key=None):
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param(
            "kernel", with_logical_partitioning(self.kernel_init, self.kernel_axes), (self.in_features, *features)
        )
        y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.lora.rank and self.name in self.lora.target_modules:
            y = y + self.lora_delta(x, features, key)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, self.kernel_axes[1:]), features).astype(x.dtype)
        return y

    def lora_delta(self, x, features, key):
        rank = self.lora.rank
        a = self.param(
            "lora_a",
            with_logical_partitioning(kaiming_uniform, (self.kernel_axes[0], "narrow")),
            (self.in_features, rank),
        )
        b = self.param("lora_b", with_logical_partitioning(zeros, ("narrow", *self.kernel_axes[1:])), (rank, *features))
        low = dropout(x, self.lora.dropout, key) @ a.astype(x.dtype)
        return jnp.tensordot(low, b.astype(x.dtype), 1) * (self.lora.alpha / rank)


class DenseFromHeads(nn.Module):
    """(…, N, H) -> (…, D): an attention's output projection."""

    num_heads: int
    head_dim: int
    features: int
    use_bias: bool = True
    kernel_init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x_BLNH, key=None):
        x = x_BLNH.reshape(*x_BLNH.shape[:-2], self.num_heads * self.head_dim)
        shape = (self.num_heads, self.head_dim, self.features)
        kernel = self.param(
            "kernel", with_logical_partitioning(flatten_fan_in(self.kernel_init), ("heads", "head", "embed")), shape
        )
        y = x @ kernel.reshape(-1, self.features).astype(x.dtype)
        if self.lora.rank and self.name in self.lora.target_modules:
            rank = self.lora.rank
            axes = ("heads", "head", "narrow")
            a = self.param(
                "lora_a",
                with_logical_partitioning(flatten_fan_in(kaiming_uniform), axes),
                (self.num_heads, self.head_dim, rank),
            )
            b = self.param("lora_b", with_logical_partitioning(zeros, ("narrow", "embed")), (rank, self.features))
            low = dropout(x, self.lora.dropout, key) @ a.reshape(-1, rank).astype(x.dtype)
            y = y + low @ b.astype(x.dtype) * (self.lora.alpha / rank)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.features,)).astype(x.dtype)
        return y


def flatten_fan_in(init: Callable) -> Callable:
    """An initialiser that sees all axes but the last as one (its fan-in)."""

    def wrapped(key, shape, dtype=jnp.float32):
        flat = 1
        for size in shape[:-1]:
            flat *= size
        return init(key, (flat, shape[-1]), dtype).reshape(shape)

    return wrapped


class Embed(nn.Module):
    """Rows of a table by id: (B, L) -> (B, L, D). The first `frozen` rows get no gradient."""

    num_embeddings: int
    width: int
    embedding_init: Callable = normal(0.02)
    num_frozen: int = 0

    def setup(self):
        table = self.param(
            "table",
            with_logical_partitioning(self.embedding_init, ("vocab", "embed")),
            (self.num_embeddings, self.width),
        )
        if self.num_frozen:
            learns_V1 = (jnp.arange(self.num_embeddings) >= self.num_frozen)[:, None]
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
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", with_logical_partitioning(ones, ("embed",)), (self.width,))
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        centred = wide - mean
        variance = (centred * centred).mean(-1, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.width,))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square over the last axis, in float32, no centring, no bias (T5, LLaMA)."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", with_logical_partitioning(ones, ("embed",)), (self.width,))
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
    mlp_dim: int
    activation: str = "gelu"
    out_features: int | None = None
    use_bias: bool = True
    kernel_init: Callable = normal(0.02)
    zero_init_output: bool = False  # start with an output of zero
    sub_ln_eps: float | None = None  # of a norm before the second dense (sub-LN); None: there is none

    @nn.compact
    def __call__(self, x):
        out = zeros if self.zero_init_output else self.kernel_init
        up = Dense(self.width, self.mlp_dim, ("embed", "mlp"), self.use_bias, self.kernel_init, name="up")
        down = Dense(self.mlp_dim, self.out_features or self.width, ("mlp", "embed"), self.use_bias, out, name="down")
        h = ACTIVATIONS[self.activation](up(x))
        if self.sub_ln_eps is not None:
            h = LayerNorm(self.mlp_dim, self.sub_ln_eps, name="norm")(h)
        return down(h)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x): T5 v1.1's (wi_0 gate, wi_1 up) and LLaMA's feed-forward."""

    width: int
    mlp_dim: int
    activation: str
    kernel_init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()
    use_bias: bool = False
    sub_ln_eps: float | None = None  # of a norm before the last dense; None: there is none

    @nn.compact
    def __call__(self, x, dropout_rate: float = 0.0, key=None):
        def dense(inputs, outputs, axes, name):
            return Dense(inputs, outputs, axes, self.use_bias, self.kernel_init, self.lora, name=name)

        gate = dense(self.width, self.mlp_dim, ("embed", "mlp"), "gate")(x, fold_in(key, 1))
        hidden = ACTIVATIONS[self.activation](gate) * dense(self.width, self.mlp_dim, ("embed", "mlp"), "up")(
            x, fold_in(key, 2)
        )
        if self.sub_ln_eps is not None:
            hidden = LayerNorm(self.mlp_dim, self.sub_ln_eps, name="norm")(hidden)
        return dense(self.mlp_dim, self.width, ("mlp", "embed"), "down")(
            dropout(hidden, dropout_rate, key), fold_in(key, 3)
        )


class PatchEmbed(nn.Module):
    """(B, H, W, C) -> (B, P, D): a convolution whose stride is its kernel, as one product; patches row by row."""

    patch_size: int
    width: int
    in_channels: int = 3
    use_bias: bool = True

    @nn.compact
    def __call__(self, image_BHWC):
        p, c = self.patch_size, self.in_channels
        shape = (p, p, c, self.width)
        kernel = self.param(
            "kernel", with_logical_partitioning(flatten_fan_in(normal(0.02)), ("conv", "conv", "conv", "embed")), shape
        )
        batch, high, wide, _ = image_BHWC.shape
        rows, columns = high // p, wide // p
        x = image_BHWC[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, c)
        x_BPF = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * c)
        y_BPD = x_BPF @ kernel.reshape(-1, self.width).astype(x_BPF.dtype)
        if self.use_bias:
            y_BPD = y_BPD + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.width,)).astype(
                y_BPD.dtype
            )
        return y_BPD


class Conv(nn.Module):
    """(B, H, W, C) -> (B, H', W', D): a square kernel at every `stride`-th pixel, zeros around the picture."""

    in_features: int
    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (self.kernel_size, self.kernel_size, self.in_features, self.features)
        init = with_logical_partitioning(flatten_fan_in(normal(0.02)), ("conv", "conv", None, "embed"))
        kernel = self.param("kernel", init, shape).astype(x_BHWC.dtype)
        room = ((self.kernel_size // 2, self.kernel_size // 2),) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x_BHWC, kernel, (self.stride,) * 2, room, dimension_numbers=layout)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.features,)).astype(y.dtype)
        return y


def window_partition(x_BHWD, window_size: int):
    """(B, H, W, D) -> (B', side * side, D): squares row by row, zeros beyond the right and lower edge."""
    batch, high, wide, width = x_BHWD.shape
    x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, -high % window_size), (0, -wide % window_size), (0, 0)))
    down, across = x_BHWD.shape[1] // window_size, x_BHWD.shape[2] // window_size
    x = x_BHWD.reshape(batch, down, window_size, across, window_size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * down * across, window_size * window_size, width)


def window_reverse(windows_BLD, window_size: int, shape: tuple[int, ...]):
    """The inverse of `into_squares` for what had this shape."""
    batch, high, wide, width = shape
    down, across = -(-high // window_size), -(-wide // window_size)
    x = windows_BLD.reshape(batch, down, across, window_size, window_size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, down * window_size, across * window_size, width)[:, :high, :wide]


def dropout(x, rate: float, key):
    """Zero a share of x and scale the rest; the identity when rate is 0 or key is None (evaluation)."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def fold_in(key, data: int):
    """A key of its own for one of several that share one, which stays as it was; None from None."""
    return None if key is None else jax.random.fold_in(key, data)


def split_key(key, num: int):
    """`number` keys from one; Nones from None, so that evaluation needs no branch."""
    return [None] * num if key is None else jax.random.split(key, num)


def take_positions(x_BLD, position_BK):
    """Rows of x at these places: (B, L, ...) -> (B, K, ...)."""
    return jnp.take_along_axis(x_BLD, position_BK.reshape(*position_BK.shape, *(1,) * (x_BLD.ndim - 2)), axis=1)


def dense_weight_map(torch_module: str, flax_module: str, bias: bool = True) -> tuple[WeightMapping, ...]:
    """Rows of a `Dense` that is a torch Linear."""
    rows = (WeightMapping(f"{torch_module}.weight", f"{flax_module}/kernel", linear),)
    return (*rows, WeightMapping(f"{torch_module}.bias", f"{flax_module}/bias")) if bias else rows


def norm_weight_map(torch_module: str, flax_module: str, bias: bool = True) -> tuple[WeightMapping, ...]:
    """Rows of a norm: torch's weight is our scale."""
    rows = (WeightMapping(f"{torch_module}.weight", f"{flax_module}/scale"),)
    return (*rows, WeightMapping(f"{torch_module}.bias", f"{flax_module}/bias")) if bias else rows
