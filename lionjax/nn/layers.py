# SPDX-License-Identifier: Apache-2.0
"""Layers: dense (with LoRA), embedding, norms, activations, feed-forward, patch embedding, convolution, windows.

Every parameter has logical axes for sharding. Norms run in float32; matrix products run in the dtype of their input,
to which the weights are cast.
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


# Checkpoint policies: what a rematerialized block saves for its backward pass.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_block(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block rematerialized in the backward pass by a policy of `REMAT_POLICIES`; "none" changes nothing."""
    if policy == "none":
        return block
    return nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[policy])


def scan_blocks(block: type[nn.Module], length: int, num_broadcast: int = 0, unchecked_in: nn.Module | None = None):
    """`length` blocks in sequence as one scan, their parameters stacked on a leading "layers" axis.

    A block maps (carry, inputs of its layer, *inputs shared by all layers) to (carry, outputs of its layer).
    `num_broadcast`: how many inputs are shared. By default flax traces each block once more, to check that no step
    changes a shared value; in programs of the module `unchecked_in` it does not. The second trace decides the random
    keys of `init`, where it is always made, and the text by which kept features are found, so that towers have it.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * num_broadcast if num_broadcast else 0,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
        check_constancy_invariants=unchecked_in is None or unchecked_in.is_initializing(),
    )


class Dense(nn.Module):
    """y = x W + b over the last axis of x. `features` may have two axes (heads, head size)."""

    in_features: int
    features: int | tuple[int, ...]
    kernel_axes: tuple[str, ...]  # of the kernel: (input, *features)
    use_bias: bool = True
    kernel_init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()
    bias_init: Callable = zeros

    @nn.compact
    def __call__(self, x, key=None):
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param(
            "kernel", with_logical_partitioning(self.kernel_init, self.kernel_axes), (self.in_features, *features)
        )
        y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.lora.targets(self.path):
            y = y + self.lora_delta(x, features, key)
        if self.use_bias:
            bias_init = with_logical_partitioning(self.bias_init, self.kernel_axes[1:])
            y = y + self.param("bias", bias_init, features).astype(x.dtype)
        return y

    def lora_delta(self, x, features, key):
        """(alpha / rank) B A x (arXiv 2106.09685)."""
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
    """(..., N, H) -> (..., D): the output projection of attention."""

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
        if self.lora.targets(self.path):
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
    """The initializer `init` with all axes but the last as fan-in."""

    def wrapped(key, shape, dtype=jnp.float32):
        fan_in = 1
        for size in shape[:-1]:
            fan_in *= size
        return init(key, (fan_in, shape[-1]), dtype).reshape(shape)

    return wrapped


class Embed(nn.Module):
    """Embeddings (B, L, D) of ids (B, L). The first `num_frozen` rows of the table get no gradient."""

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
            is_trained_V1 = (jnp.arange(self.num_embeddings) >= self.num_frozen)[:, None]
            table = jnp.where(is_trained_V1, table, jax.lax.stop_gradient(table))
        self.table = table

    def __call__(self, ids_BL, dtype=jnp.float32):
        return jnp.take(self.table, ids_BL, axis=0).astype(dtype)

    def attend(self, x_BLD):
        """Logits (..., V) of x (..., D) with the embedding table as head."""
        # Not with the transposed table: a backward pass of one token would copy it, which takes longer than the pass.
        return jnp.einsum("...D,VD->...V", x_BLD, self.table.astype(x_BLD.dtype))


class LayerNorm(nn.Module):
    """LayerNorm (arXiv 1607.06450) over the last axis, computed in float32; the output has the dtype of x."""

    width: int
    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", with_logical_partitioning(ones, ("embed",)), (self.width,))
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centered = x32 - mean
        variance = (centered * centered).mean(-1, keepdims=True)
        y = centered * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.width,))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last axis, computed in float32, without bias (T5, LLaMA)."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", with_logical_partitioning(ones, ("embed",)), (self.width,))
        x32 = x.astype(jnp.float32)
        normalized = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
        return normalized.astype(x.dtype) * scale.astype(x.dtype)


def make_norm(norm: str, width: int, eps: float, bias: bool, **name) -> nn.Module:
    """The norm layer "rmsnorm" or "layernorm"; an RMSNorm has no bias."""
    return RMSNorm(width, eps, **name) if norm == "rmsnorm" else LayerNorm(width, eps, bias, **name)


@jax.custom_vjp
def gelu(x):
    """GELU with erf (torch's default); its custom gradient saves the slope in the dtype of x."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.7071067811865476))


def _gelu_forward(x):
    cdf = 0.5 * (1 + jax.lax.erf(x * 0.7071067811865476))
    slope = cdf + x * jnp.exp(-0.5 * x * x) * 0.3989422804014327
    return x * cdf, slope.astype(x.dtype)


gelu.defvjp(_gelu_forward, lambda slope, gradient: (gradient * slope,))

ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nn.Module):
    """down(act(up(x))), optionally with a norm before `down`."""

    width: int
    mlp_dim: int
    activation: str = "gelu"
    out_features: int | None = None
    use_bias: bool = True
    kernel_init: Callable = normal(0.02)
    zero_init_output: bool = False  # zero kernel of `down`, so that the output starts at 0
    sub_ln_eps: float | None = None  # epsilon of a norm before `down` (sub-LN); None: no norm
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x, key=None):
        down_init = zeros if self.zero_init_output else self.kernel_init
        out_features = self.out_features or self.width
        up = Dense(self.width, self.mlp_dim, ("embed", "mlp"), self.use_bias, self.kernel_init, self.lora, name="up")
        down = Dense(self.mlp_dim, out_features, ("mlp", "embed"), self.use_bias, down_init, self.lora, name="down")
        h = ACTIVATIONS[self.activation](up(x, fold_in(key, 1)))
        if self.sub_ln_eps is not None:
            h = LayerNorm(self.mlp_dim, self.sub_ln_eps, name="norm")(h)
        return down(h, fold_in(key, 2))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202), the feed-forward of T5 v1.1 (wi_0: gate, wi_1: up) and LLaMA."""

    width: int
    mlp_dim: int
    activation: str
    kernel_init: Callable = normal(0.02)
    lora: LoraConfig = LoraConfig()
    use_bias: bool = False
    sub_ln_eps: float | None = None  # epsilon of a norm before `down` (sub-LN); None: no norm

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


class StackedMLP(nn.Module):
    """MLP of `widths` with ReLU; with `num_stacked`, one MLP for each index of the second-last axis of x."""

    widths: tuple[int, ...]
    num_stacked: int | None = None
    zero_init_output: bool = False  # zero kernel of the last layer, so that the output starts at 0

    @nn.compact
    def __call__(self, x):
        lead = () if self.num_stacked is None else (self.num_stacked,)
        for n, (inputs, features) in enumerate(zip(self.widths, self.widths[1:])):
            axes, is_last = (None,) * len(lead), n == len(self.widths) - 2
            init = flatten_fan_in(kaiming_uniform) if lead else kaiming_uniform
            init = zeros if is_last and self.zero_init_output else init
            init = with_logical_partitioning(init, (*axes, "embed", "mlp"))
            kernel = self.param(f"kernel_{n}", init, (*lead, inputs, features)).astype(x.dtype)
            bias = self.param(f"bias_{n}", with_logical_partitioning(zeros, (*axes, "mlp")), (*lead, features)).astype(
                x.dtype
            )
            x = jnp.einsum("...SI,SIO->...SO" if lead else "...I,IO->...O", x, kernel) + bias
            x = x if is_last else nn.relu(x)
        return x


class PatchEmbed(nn.Module):
    """Patch embeddings (B, P, D) of images (B, H, W, C), in row-major order; a strided convolution as one product.

    Pixels beyond the last whole patch are ignored.
    """

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
        batch, height, width, _ = image_BHWC.shape
        rows, columns = height // p, width // p
        x = image_BHWC[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, c)
        x_BPF = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * c)
        y_BPD = x_BPF @ kernel.reshape(-1, self.width).astype(x_BPF.dtype)
        if self.use_bias:
            y_BPD = y_BPD + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.width,)).astype(
                y_BPD.dtype
            )
        return y_BPD


class Conv(nn.Module):
    """Convolution (B, H, W, C) -> (B, H', W', D) with a square kernel and zero padding of kernel_size // 2."""

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
        padding = ((self.kernel_size // 2, self.kernel_size // 2),) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x_BHWC, kernel, (self.stride,) * 2, padding, dimension_numbers=layout)
        if self.use_bias:
            y = y + self.param("bias", with_logical_partitioning(zeros, ("embed",)), (self.features,)).astype(y.dtype)
        return y


def window_partition(x_BHWD, window_size: int):
    """Windows (B * windows, window_size**2, D) of x (B, H, W, D) in row-major order, zero-padded right and below."""
    batch, height, width, features = x_BHWD.shape
    x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, -height % window_size), (0, -width % window_size), (0, 0)))
    rows, columns = x_BHWD.shape[1] // window_size, x_BHWD.shape[2] // window_size
    x = x_BHWD.reshape(batch, rows, window_size, columns, window_size, features).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * rows * columns, window_size * window_size, features)


def window_reverse(windows_BLD, window_size: int, shape: tuple[int, ...]):
    """The inverse of `window_partition`: x of `shape` (B, H, W, D)."""
    batch, height, width, features = shape
    rows, columns = -(-height // window_size), -(-width // window_size)
    x = windows_BLD.reshape(batch, rows, columns, window_size, window_size, features).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * window_size, columns * window_size, features)[:, :height, :width]


def dropout(x, rate: float, key):
    """x with a fraction `rate` set to 0 and the rest scaled by 1 / (1 - rate); x itself if rate is 0 or key None."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def l2_normalize(x):
    """x divided by its L2 norm over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def fold_in(key, data: int):
    """`jax.random.fold_in`, or None if `key` is None (evaluation)."""
    return None if key is None else jax.random.fold_in(key, data)


def split_key(key, num: int):
    """`jax.random.split`, or a list of `num` Nones if `key` is None (evaluation)."""
    return [None] * num if key is None else jax.random.split(key, num)


def take_positions(x_BLD, position_BK):
    """x (B, K, ...) at the positions (B, K) of axis 1 of x (B, L, ...)."""
    return jnp.take_along_axis(x_BLD, position_BK.reshape(*position_BK.shape, *(1,) * (x_BLD.ndim - 2)), axis=1)


def dense_weight_map(torch_module: str, flax_module: str, bias: bool = True) -> tuple[WeightMapping, ...]:
    """Mappings of a `Dense` from a torch Linear."""
    mappings = (WeightMapping(f"{torch_module}.weight", f"{flax_module}/kernel", linear),)
    return (*mappings, WeightMapping(f"{torch_module}.bias", f"{flax_module}/bias")) if bias else mappings


def norm_weight_map(torch_module: str, flax_module: str, bias: bool = True) -> tuple[WeightMapping, ...]:
    """Mappings of a norm, whose scale is `weight` in torch."""
    mappings = (WeightMapping(f"{torch_module}.weight", f"{flax_module}/scale"),)
    return (*mappings, WeightMapping(f"{torch_module}.bias", f"{flax_module}/bias")) if bias else mappings
