# SPDX-License-Identifier: Apache-2.0
"""Fused attention (arXiv 2205.14135): cuDNN on GPUs, splash attention on TPUs, and the reference implementation.

The kernels support valid keys and a causal flag as masks, splash attention also segments. Biases, dropout, other masks,
float32, short sequences and other devices use `reference_attention` (see `attention.dot_product_attention`).
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lionjax.core import sharding

log = logging.getLogger(__name__)

MASK_VALUE = -1e30  # far below any score, and finite, so that a fully masked row gives no NaN
# Minimum of query and key length for a kernel; the score matrix of shorter ones is small. Neither value was measured.
MIN_LENGTH = {"gpu": 128, "tpu": 512}
KERNEL_DTYPES = {"gpu": (jnp.bfloat16, jnp.float16), "tpu": (jnp.bfloat16,)}
KERNELS = {"gpu": "cudnn", "tpu": "splash"}
BLOCK_LENGTHS = (512, 384, 256, 128)  # block sizes of splash attention; one must divide the length
KERNEL_TOLERANCE = 0.05  # largest allowed error of a 16-bit kernel relative to the maximum of the reference


def select_backend(platform: str, query_BLNH, key_BSNH, causal: bool = False) -> str:
    """The name "cudnn", "splash" or "xla" (the reference), by platform, dtype and lengths."""
    lengths = query_BLNH.shape[1], key_BSNH.shape[1]
    if platform not in KERNELS or query_BLNH.dtype not in KERNEL_DTYPES[platform]:
        return "xla"
    if min(lengths) < MIN_LENGTH[platform] or (causal and lengths[0] != lengths[1]):
        return "xla"
    return KERNELS[platform]


def flash_attention(query_BLNH, key_BSNH, value_BSNH, key_valid_BS, causal: bool, scale: float, segment_BL=None):
    """softmax(scale * q k) v (B, L, N, H) over the valid keys by a kernel, or None if no kernel supports the inputs.

    `key_valid_BS`: valid keys; None: all. `segment_BL`: queries attend to keys of their own segment (with all keys
    valid); None: to all. Fully masked rows have an unspecified finite value.
    """
    mesh = sharding.current_mesh()
    if mesh is None and jax.device_count() > 1:
        return None  # without a mesh the sharding of the inputs is unknown
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    inputs = (query_BLNH, key_BSNH, value_BSNH)
    name = select_backend(platform, query_BLNH, key_BSNH, causal)
    if name == "splash":
        segmented = segment_BL is not None
        kernel = functools.partial(splash_attention, causal=causal, scale=scale, segmented=segmented)
        return shard_attention(kernel, mesh, *inputs, segment_BL if segmented else key_valid_BS)
    if (
        name == "cudnn"
        and segment_BL is None
        and cudnn_attention_works(
            query_BLNH.dtype, query_BLNH.shape[1:], key_BSNH.shape[1:], key_valid_BS is not None, causal
        )
    ):
        return cudnn_attention(*inputs, key_valid_BS, causal, scale)
    return None


def reference_attention(query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale: float = 1.0, dropout_fn=None):
    """softmax(scale * q k + bias) v (B, L, N, H), the softmax in float32; `dropout_fn` is applied to the probabilities.

    On CPUs its gradient takes 0.6 to 0.75 of the time of that of `jax.nn.dot_product_attention`; the forward pass takes
    the same time.
    """
    if key_BSNH.shape[2] != query_BLNH.shape[2]:
        groups = query_BLNH.shape[2] // key_BSNH.shape[2]
        key_BSNH, value_BSNH = (jnp.repeat(x, groups, axis=2) for x in (key_BSNH, value_BSNH))
    score_BNLS = jnp.einsum("BLNH,BSNH->BNLS", query_BLNH, key_BSNH, preferred_element_type=jnp.float32)
    if scale != 1.0:
        score_BNLS = score_BNLS * scale
    if bias is not None:
        score_BNLS = score_BNLS + bias
    if mask is not None:
        score_BNLS = jnp.where(mask, score_BNLS, MASK_VALUE)
    probs_BNLS = jax.nn.softmax(score_BNLS, axis=-1)
    probs_BNLS = (probs_BNLS if dropout_fn is None else dropout_fn(probs_BNLS)).astype(value_BSNH.dtype)
    return jnp.einsum("BNLS,BSNH->BLNH", probs_BNLS, value_BSNH)


def dense_mask(key_valid_BS, causal: bool, length: int):
    """Boolean mask that broadcasts to (B, 1, L, S), for L = `length` queries; None if nothing is masked."""
    mask = None if key_valid_BS is None else key_valid_BS[:, None, None, :]
    if causal:
        lower = jnp.tril(jnp.ones((length, length), bool))[None, None]
        mask = lower if mask is None else lower & mask
    return mask


def cudnn_attention(query_BLNH, key_BSNH, value_BSNH, key_valid_BS, causal: bool, scale: float):
    """Attention by cuDNN, in bfloat16 or float16. It takes the valid keys as a bias, which needs even lengths."""
    mask, length = None, query_BLNH.shape[1]
    if key_valid_BS is not None:
        query_BLNH, key_BSNH, value_BSNH = (pad_to_multiple(x, 2) for x in (query_BLNH, key_BSNH, value_BSNH))
        key_valid_BS = pad_to_multiple(key_valid_BS, 2)
        shape = (len(key_valid_BS), 1, query_BLNH.shape[1], key_valid_BS.shape[1])
        mask = jnp.broadcast_to(key_valid_BS[:, None, None, :], shape)
    out_BLNH = jax.nn.dot_product_attention(
        query_BLNH, key_BSNH, value_BSNH, None, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )
    return out_BLNH[:, :length]


@functools.cache
def cudnn_attention_works(dtype, query_shape: tuple, key_shape: tuple, has_mask: bool, causal: bool) -> bool:
    """Whether this build's cuDNN agrees with the reference, gradients too, on two rows of (L, N, H) and (S, N, H).

    If not, the reason is logged once.
    """
    random = np.random.default_rng(0)
    inputs = [
        random.standard_normal((2, *shape)).astype(np.float32)
        for shape in (query_shape, key_shape, key_shape, query_shape)
    ]
    key_valid_BS = (np.arange(key_shape[0]) < key_shape[0] * np.array([[0.5], [1.0]])) if has_mask else None

    def values_and_gradients(attention_fn):
        def weighted_sum(q, k, v, weight):
            return (attention_fn(q, k, v).astype(jnp.float32) * weight).sum()

        q, k, v = (jnp.asarray(x, dtype) for x in inputs[:3])
        gradients = jax.jit(jax.grad(weighted_sum, (0, 1, 2)))(q, k, v, inputs[3])
        return [np.asarray(x, np.float32) for x in (jax.jit(attention_fn)(q, k, v), *gradients)]

    scale, mask = query_shape[-1] ** -0.5, dense_mask(key_valid_BS, causal, query_shape[0])
    try:
        with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices()[0]):
            kernel = values_and_gradients(lambda q, k, v: cudnn_attention(q, k, v, key_valid_BS, causal, scale))
            reference = values_and_gradients(lambda q, k, v: reference_attention(q, k, v, mask, None, scale))
        relative_error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(kernel, reference))
        if not relative_error < KERNEL_TOLERANCE:
            raise ValueError(f"relative error {relative_error:.2g} to the reference, above {KERNEL_TOLERANCE}")
    except Exception as error:  # any failure of the build: fall back to the reference
        shapes = f"{np.dtype(dtype).name}, queries {query_shape}, keys {key_shape}" + ", masked" * has_mask
        lines = f"{error}".strip().splitlines() or [type(error).__name__]
        log.warning("cuDNN attention is off for %s: %s", shapes, lines[0])
        return False
    return True


def splash_attention(
    query_BLNH,
    key_BSNH,
    value_BSNH,
    key_valid_BS,
    causal: bool,
    scale: float,
    interpret: bool = False,
    segmented: bool = False,
):
    """Attention by JAX's splash attention for TPUs, with sequences padded to a multiple of its block size.

    If `segmented`, `key_valid_BS` has the segment of each position in place of whether it is valid; 0 is padding.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    length, key_length = query_BLNH.shape[1], key_BSNH.shape[1]
    query_BLNH, key_BSNH, value_BSNH = (
        pad_to_multiple(x, BLOCK_LENGTHS[-1]) for x in (query_BLNH * scale, key_BSNH, value_BSNH)
    )
    rows, queries, heads, _ = query_BLNH.shape
    keys = key_BSNH.shape[1]
    if keys != key_length and key_valid_BS is None:
        key_valid_BS = jnp.ones((rows, key_length), bool)
    q, k = (next(block for block in BLOCK_LENGTHS if n % block == 0) for n in (queries, keys))
    kernel = make_splash_mha_single_device(
        MultiHeadMask([(CausalMask if causal else FullMask)((queries, keys))] * heads),
        block_sizes=BlockSizes(block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k),
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (query_BLNH, key_BSNH, value_BSNH)]
    if key_valid_BS is None:
        out_BNLH = jax.vmap(kernel)(*heads_first)
    else:  # without segments all queries, padding included, attend to the keys of segment 1
        key_segments = pad_to_multiple(key_valid_BS, BLOCK_LENGTHS[-1]).astype(jnp.int32)
        query_segments = key_segments if segmented else jnp.ones((rows, queries), jnp.int32)
        segments = SegmentIds(query_segments, key_segments)
        out_BNLH = jax.vmap(kernel)(*heads_first, segments)
    return out_BNLH.swapaxes(1, 2)[:, :length]


def pad_to_multiple(x_BL, multiple: int):
    """x with zeros (False) appended to axis 1 up to a multiple."""
    padding = -x_BL.shape[1] % multiple
    return jnp.pad(x_BL, ((0, 0), (0, padding), *((0, 0),) * (x_BL.ndim - 2))) if padding else x_BL


def shard_attention(attention_fn, mesh, query_BLNH, key_BSNH, value_BSNH, key_valid_BS):
    """`attention_fn` under `shard_map` over batch and heads, because XLA cannot partition a kernel."""
    if mesh is None or mesh.size == 1:
        return attention_fn(query_BLNH, key_BSNH, value_BSNH, key_valid_BS)
    heads = math.gcd(query_BLNH.shape[2], key_BSNH.shape[2])
    axes, shape = ("batch", None, "act_heads", None), (len(query_BLNH), 1, heads, 1)
    spec = sharding.partition_spec(axes, shape, mesh, "attention")
    inputs, specs = (query_BLNH, key_BSNH, value_BSNH), (spec,) * 3
    if key_valid_BS is not None:
        inputs, specs = (*inputs, key_valid_BS), (*specs, PartitionSpec(spec[0]))

    def local_attention(q, k, v, key_valid_BS=None):
        return attention_fn(q, k, v, key_valid_BS)

    # check_vma is off because kernels do not declare over which mesh axes their output varies.
    return jax.shard_map(local_attention, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*inputs)
