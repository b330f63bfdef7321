# SPDX-License-Identifier: Apache-2.0
"""Checksums of parameters: 64 bits for each leaf, independent of sharding, and manifests of pytrees."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core import params as trees
from lionjax.core.types import Params


def leaf_checksums(tree: Params) -> dict[str, str]:
    """{path: 64-bit checksum of the leaf's content, 16 hex digits}. The value does not depend on the sharding.

    The checksum is a sum over the leaf's words, each hashed with its position: any single change alters it, and it can
    be computed on the devices that hold the shards. Arrays in CPU memory are read with numpy, without compilation.
    """
    flat = trees.flatten(tree)
    if all(in_host_memory(leaf) for leaf in flat.values()):
        sums = {path: _checksum_numpy(np.asarray(leaf)) for path, leaf in flat.items()}
    else:
        sums = jax.device_get(_checksums_jax(flat))
    return {path: f"{int(high):08x}{int(low):08x}" for path, (high, low) in sums.items()}


def params_digest(params: Params, about: str) -> str:
    """16 hex digits that recognize parameters together with a text, such as their config."""
    content = f"{about} {sorted(leaf_checksums(params).items())}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def in_host_memory(leaf) -> bool:
    """Whether all of an array is in this process's CPU memory."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.sharding.device_set)


def _fmix32(word):
    """The 32-bit finalizer of MurmurHash3 (public domain): each input bit changes about half of the output bits."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _hash_words(words, positions, xp):
    salts = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
    return xp.stack([_fmix32(words ^ _fmix32(positions + salt)).sum(dtype=np.uint32) for salt in salts])


def _checksum_numpy(x: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    total, chunk = np.zeros(2, np.uint32), 1 << 18  # words; 1 MiB fits in a core's L2 cache
    for start in range(0, words.size, chunk):
        part = words[start : start + chunk].astype(np.uint32)
        total += _hash_words(part, np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32), np)
    return total


def _checksum_jax(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    positions, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        positions, stride = positions + iota * np.uint32(stride % 2**32), stride * words.shape[axis]
    return _hash_words(words, positions, jnp)


@jax.jit
def _checksums_jax(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _checksum_jax(x) for path, x in flat.items()}


def manifest(items: dict[str, Params]) -> dict[str, list]:
    """{"item/path": [dtype, shape, checksum]} of the leaves of several pytrees."""
    flat = trees.flatten(items)
    sums = leaf_checksums(items)
    return {path: [str(leaf.dtype), list(leaf.shape), sums[path]] for path, leaf in flat.items()}


def sha256_of_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serializable value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
