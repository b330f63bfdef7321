# SPDX-License-Identifier: Apache-2.0
"""Attention by the kernels of GPUs and TPUs, which never hold all scores: which one is used where, in one place.

A kernel knows of a mask only which keys are real and whether it is causal. What else there is, biases, dropout on the
probabilities, other masks, float32, short rows, other devices, is left to the plain formula in `attention.attend`.
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

MASK_VALUE = -1e30  # far below any score, and finite, so that a row that sees nothing gives no NaN
# The shorter of queries and keys from which on a kernel is used. Scores of fewer are small beside the layer's other
# arrays. Neither number was measured on a device.
MIN_LENGTH = {"gpu": 128, "tpu": 512}
KERNEL_DTYPES = {"gpu": (jnp.bfloat16, jnp.float16), "tpu": (jnp.bfloat16,)}
KERNELS = {"gpu": "cudnn", "tpu": "splash"}
BLOCK_LENGTHS = (512, 384, 256, 128)  # of splash attention, which wants lengths that they divide
KERNEL_TOLERANCE = 0.05  # how far a kernel's values may be from the formula's, in 16 bits


def select_backend(platform: str, query_BLNH, key_BSNH, causal: bool = False) -> str:
    """Of "cudnn", "splash" and "xla", from where it will run, dtypes and lengths."""
    lengths = query_BLNH.shape[1], key_BSNH.shape[1]
    if platform not in KERNELS or query_BLNH.dtype not in KERNEL_DTYPES[platform]:
        return "xla"
    if min(lengths) < MIN_LENGTH[platform] or (causal and lengths[0] != lengths[1]):
        return "xla"
    return KERNELS[platform]


def flash_attention(query_BLNH, key_BSNH, value_BSNH, key_valid_BS, causal: bool, scale: float):
    """softmax(scale * q k) v over the real keys by a kernel: (B, L, N, H), or None where none fits.

    `keys_BS`: which keys are real; None: all. Rows that see nothing have some finite value.
    """
    mesh = sharding.current_mesh()
    if mesh is None and jax.device_count() > 1:
        return None  # a kernel must be told how its arrays are split
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    given = (query_BLNH, key_BSNH, value_BSNH, key_valid_BS)
    name = select_backend(platform, query_BLNH, key_BSNH, causal)
    if name == "splash":
        return shard_attention(functools.partial(splash_attention, causal=causal, scale=scale), mesh, *given)
    if name == "cudnn" and cudnn_attention_works(
        query_BLNH.dtype, query_BLNH.shape[1:], key_BSNH.shape[1:], key_valid_BS is not None, causal
    ):
        return cudnn_attention(*given, causal, scale)
    return None


def reference_attention(query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale: float = 1.0, dropout_fn=None):
    """The formula, the softmax in float32; `drop` is done to the probabilities.

    On CPUs its gradient takes 0.6 to 0.75 of the time of `jax.nn.dot_product_attention`'s, which splits heads into
    groups first (values alone: as long).
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
    share_BNLS = jax.nn.softmax(score_BNLS, axis=-1)
    share_BNLS = (share_BNLS if dropout_fn is None else dropout_fn(share_BNLS)).astype(value_BSNH.dtype)
    return jnp.einsum("BNLS,BSNH->BLNH", share_BNLS, value_BSNH)


def dense_mask(key_valid_BS, causal: bool, length: int):
    """The mask as booleans that broadcast to (B, 1, L, S); None where all is seen."""
    mask = None if key_valid_BS is None else key_valid_BS[:, None, None, :]
    if causal:
        before = jnp.tril(jnp.ones((length, length), bool))[None, None]
        mask = before if mask is None else before & mask
    return mask


def cudnn_attention(query_BLNH, key_BSNH, value_BSNH, key_valid_BS, causal: bool, scale: float):
    """By cuDNN, in bfloat16 or float16. It reads which keys are real as a bias, of even lengths."""
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
    """Whether the build at hand computes two rows of these (L, N, H) and (S, N, H) right, gradients too.

    If it does not, the reason is said once.
    """
    random = np.random.default_rng(0)
    given = [
        random.standard_normal((2, *shape)).astype(np.float32)
        for shape in (query_shape, key_shape, key_shape, query_shape)
    ]
    keys_BS = (np.arange(key_shape[0]) < key_shape[0] * np.array([[0.5], [1.0]])) if has_mask else None

    def out_of(function):
        def together(q, k, v, weight):
            return (function(q, k, v).astype(jnp.float32) * weight).sum()

        q, k, v = (jnp.asarray(x, dtype) for x in given[:3])
        gradients = jax.jit(jax.grad(together, (0, 1, 2)))(q, k, v, given[3])
        return [np.asarray(x, np.float32) for x in (jax.jit(function)(q, k, v), *gradients)]

    scale, mask = query_shape[-1] ** -0.5, dense_mask(keys_BS, causal, query_shape[0])
    try:
        with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices()[0]):
            theirs = out_of(lambda q, k, v: cudnn_attention(q, k, v, keys_BS, causal, scale))
            ours = out_of(lambda q, k, v: reference_attention(q, k, v, mask, None, scale))
        far = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(theirs, ours))
        if not far < KERNEL_TOLERANCE:
            raise ValueError(f"its values are {far:.2g} from the formula's")
    except Exception as error:  # whatever a build lacks, the formula is still there
        what = f"{np.dtype(dtype).name}, queries {query_shape}, keys {key_shape}" + ", masked" * has_mask
        said = f"{error}".strip().splitlines() or [type(error).__name__]
        log.warning("attention goes without cuDNN for %s: %s", what, said[0])
        return False
    return True


def splash_attention(
    query_BLNH, key_BSNH, value_BSNH, key_valid_BS, causal: bool, scale: float, interpret: bool = False
):
    """By JAX's splash attention for TPUs, rows lengthened to what its blocks divide."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    length, known = query_BLNH.shape[1], key_BSNH.shape[1]
    query_BLNH, key_BSNH, value_BSNH = (
        pad_to_multiple(x, BLOCK_LENGTHS[-1]) for x in (query_BLNH * scale, key_BSNH, value_BSNH)
    )
    rows, queries, heads, _ = query_BLNH.shape
    keys = key_BSNH.shape[1]
    if keys != known and key_valid_BS is None:
        key_valid_BS = jnp.ones((rows, known), bool)
    q, k = (next(block for block in BLOCK_LENGTHS if n % block == 0) for n in (queries, keys))
    kernel = make_splash_mha_single_device(
        MultiHeadMask([(CausalMask if causal else FullMask)((queries, keys))] * heads),
        block_sizes=BlockSizes(block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k),
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (query_BLNH, key_BSNH, value_BSNH)]
    if key_valid_BS is None:
        out_BNLH = jax.vmap(kernel)(*heads_first)
    else:  # all queries, those of padding too, look at segment 1
        segments = SegmentIds(
            jnp.ones((rows, queries), jnp.int32), pad_to_multiple(key_valid_BS, BLOCK_LENGTHS[-1]).astype(jnp.int32)
        )
        out_BNLH = jax.vmap(kernel)(*heads_first, segments)
    return out_BNLH.swapaxes(1, 2)[:, :length]


def pad_to_multiple(x_BL, multiple: int):
    """Zeros (False) behind the second axis, up to a multiple."""
    more = -x_BL.shape[1] % multiple
    return jnp.pad(x_BL, ((0, 0), (0, more), *((0, 0),) * (x_BL.ndim - 2))) if more else x_BL


def shard_attention(attention_fn, mesh, query_BLNH, key_BSNH, value_BSNH, key_valid_BS):
    """The function on each device's rows and heads, for the compiler cannot split a kernel itself."""
    if mesh is None or mesh.size == 1:
        return attention_fn(query_BLNH, key_BSNH, value_BSNH, key_valid_BS)
    heads = math.gcd(query_BLNH.shape[2], key_BSNH.shape[2])
    axes, shape = ("batch", None, "act_heads", None), (len(query_BLNH), 1, heads, 1)
    over = sharding.partition_spec(axes, shape, mesh, "attention")
    given, specs = (query_BLNH, key_BSNH, value_BSNH), (over,) * 3
    if key_valid_BS is not None:
        given, specs = (*given, key_valid_BS), (*specs, PartitionSpec(over[0]))

    def here(q, k, v, keys_BS=None):
        return attention_fn(q, k, v, keys_BS)

    # Each device writes its own part; a kernel says nothing of what varies over the mesh.
    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)(*given)
