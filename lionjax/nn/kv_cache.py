# SPDX-License-Identifier: Apache-2.0
"""The cache of generated tokens as a ring of slots, and rows that join while others are decoded (continuous batching).

All rows write the token of one step into the same slot, `step` modulo the number of slots, so that a step is one update
in place for all rows. A row that joined at a later step attends to fewer of the newest slots. Arrays: `Cache`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax.core.sharding import partition_spec, with_logical_constraint
from lionjax.core.types import Array, Cache

SLOT_AXES = {"k": 3, "v": 3, "self_k": 3, "self_v": 3}  # axis of the slots in these entries of `Cache.generated`
HEAD_AXES = {"k": 2, "v": 2, "self_k": 2, "self_v": 2, "cross_k": 2, "cross_v": 2, "media": 3}  # axis of the heads


def tokens_before(cache: Cache, num_rows: int) -> Array:
    """int32 (B,): tokens of each row in the slots, before the one that is read next."""
    start_B = jnp.zeros(num_rows, jnp.int32) if cache.start_B is None else cache.start_B
    return cache.step - start_B


def slot_ages(step: Array | int, num_slots: int) -> Array:
    """int32 (S,): how many steps before `step` each slot was written last, 0 for the slot of `step` itself."""
    return (step - jnp.arange(num_slots)) % num_slots


def set_rows(leaf: Array, rows: Array, row_GR: Array) -> Array:
    """An array (layers, B, ...) with `rows` (layers, G R, ...) in place of its rows `row_GR`; see `insert_rows`.

    Shorter rows fill the first places; those of masks, which are no floats, are followed by zeros.
    """
    groups = len(row_GR)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        rows = jnp.pad(rows, ((0, 0), (0, 0), *((0, a - b) for a, b in zip(leaf.shape[2:], rows.shape[2:]))))
    grouped_leaf = leaf.reshape(leaf.shape[0], groups, -1, *leaf.shape[2:])
    grouped_rows = rows.reshape(rows.shape[0], groups, -1, *rows.shape[2:]).astype(leaf.dtype)
    window = tuple(slice(0, size) for size in rows.shape[2:])

    def set_group(leaf, row_R, rows):
        return leaf.at[(slice(None), row_R, *window)].set(rows, mode="drop")

    return jax.vmap(set_group, (1, 0, 1), 1)(grouped_leaf, row_GR, grouped_rows).reshape(leaf.shape)


def insert_rows(cache: Cache, new: Cache, row_GR: Array) -> Cache:
    """The cache with the rows of `new`, which `prefill` made with `cache_length` 0, in place of its rows `row_GR`.

    Rows of both are in G equal groups, and indices count within a group, so that groups lie on different devices and
    nothing passes between them. An index outside a group drops its row. A shorter array of `new`, such as the keys of a
    shorter prompt, fills the first places; what it leaves is hidden by its mask.
    """

    def update(leaf, rows):
        return set_rows(leaf, rows, row_GR)

    def update_slots(leaf, rows, axis: int):
        for number in range(count := rows.shape[axis]):
            slot = (cache.step - count + number) % leaf.shape[axis]
            column = jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axis)
            column = update(column, jax.lax.slice_in_dim(rows, number, number + 1, axis=axis))
            leaf = jax.lax.dynamic_update_slice_in_dim(leaf, column, slot, axis)
        return leaf

    generated = {
        name: update_slots(leaf, new.generated[name], SLOT_AXES[name])
        if name in SLOT_AXES
        else jax.tree.map(update, leaf, new.generated[name])
        for name, leaf in cache.generated.items()
    }
    static, prompt = (jax.tree.map(update, *pair) for pair in ((cache.static, new.static), (cache.prompt, new.prompt)))
    # The new rows have read `new.step` tokens, which are in the newest slots.
    joined_1R = jnp.full((1, row_GR.size), cache.step - new.step, jnp.int32)
    return dataclasses.replace(
        cache, generated=generated, static=static, prompt=prompt, start_B=update(cache.start_B[None], joined_1R)[0]
    )


def repeat_rows(cache: Cache, count: int) -> Cache:
    """The cache with `count` rows for each of its rows, such as the beams of a prompt; they share the prompt's keys."""

    def repeat(leaf):
        return jnp.repeat(leaf, count, axis=1)

    generated, static = (jax.tree.map(repeat, part) for part in (cache.generated, cache.static))
    return dataclasses.replace(cache, generated=generated, static=static)


def empty_cache(prefilled: Cache) -> Cache:
    """A cache of zeros with the shapes of one that `prefill` made with room for answers; rows join it later."""
    num_rows = jax.tree.leaves(prefilled.static)[0].shape[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), prefilled)
    return constrain_cache(dataclasses.replace(zeros, start_B=jnp.zeros(num_rows, jnp.int32)))


def constrain_cache(cache: Cache) -> Cache:
    """The cache with its rows split over the batch axes of the mesh, and keys and values over the tensor axis."""
    return _map_with_axes(lambda leaf, *axes: with_logical_constraint(leaf, *axes), cache)


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """The shardings of `constrain_cache`, from shapes."""

    def sharding_of(leaf, *axes):
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, "cache"))

    shardings = _map_with_axes(sharding_of, cache)
    return dataclasses.replace(
        shardings, step=NamedSharding(mesh, PartitionSpec()), start_B=sharding_of(cache.start_B, "batch")
    )


def _map_with_axes(function: Callable, cache: Cache) -> Cache:
    """The cache with `function(leaf, *logical axes)` in place of each array of its rows."""

    def call(leaf, head_axis: int | None):
        names = [None, "batch", *[None] * (leaf.ndim - 2)]
        if head_axis is not None and leaf.ndim > head_axis:
            names[head_axis] = "act_heads"
        return function(leaf, *names)

    def map_entries(entries):
        return {
            name: jax.tree.map(functools.partial(call, head_axis=HEAD_AXES.get(name)), entry)
            for name, entry in entries.items()
        }

    return dataclasses.replace(
        cache,
        generated=map_entries(cache.generated),
        static=map_entries(cache.static),
        prompt=jax.tree.map(lambda leaf: call(leaf, 2), cache.prompt),
    )


def append_to_cache(cache: Cache, new_kv) -> Cache:
    """The cache with the keys and values (layers, B, N, 1, H) of the next token, as `Decoder.read_next` gives them."""
    # One update for all layers, so that XLA writes in place and copies nothing else of the cache.
    new_slots = {}
    for name, leaf in zip("kv", new_kv):
        old = cache.generated[name]
        slot = cache.step % old.shape[3]
        new_slots[name] = jax.lax.dynamic_update_slice(old, leaf.astype(old.dtype), (0, 0, 0, slot, 0))
    return dataclasses.replace(cache, generated=cache.generated | new_slots, step=cache.step + 1)
