# SPDX-License-Identifier: Apache-2.0
"""Decoding in slots: rows that have ended are replaced by waiting prompts while the others go on.

The compiled programs of continuous batching (Orca, OSDI 2022), all of fixed shapes: `encode_images` fills a pool of
image features, `admit` reads prompts and puts them into slots (`prefill` and `insert` do so in two steps), `decode`
generates until enough slots are free, `cancel` frees some. `inference.session` decides what runs when. Of a model only
`answer_features`, `prefill` and `extend` are called.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lionjax.core.types import VLM, Array, Batch, Cache, Params, pytree_dataclass
from lionjax.inference import sampling
from lionjax.inference.sampling import GenerationConfig, RowSampling
from lionjax.nn.kv_cache import constrain_cache, empty_cache, insert_rows, set_rows


@pytree_dataclass
class SlotRows:
    """What is known of each row; `length_B` tokens are chosen, the model has read all of them but the last."""

    token_B: Array
    done_B: Array  # ended, or without a prompt
    length_B: Array
    limit_B: Array  # most new tokens
    ids_BM: Array
    logprob_BM: Array | None
    seen_BV: Array | None
    key_B: Array | None  # random keys, as raw data
    is_finite_B: Array
    sampling: RowSampling | None = None  # with `config.row_sampling`


@pytree_dataclass
class Slots:
    """Slots of answers that are generated together."""

    cache: Cache
    rows: SlotRows


@pytree_dataclass
class Admission:
    """Prompts that join: batch row r takes slot `slot_GR` (out of range: none, a row of padding) of its group."""

    batch: Batch  # without images where features are taken from the pool
    slot_GR: Array  # int32 (groups, rows of a group); see `kv_cache.insert_rows`
    image_B: Array | None  # index of the pool
    limit_B: Array
    key_B: Array | None
    sampling: RowSampling | None = None


@functools.partial(jax.jit, static_argnames=("model", "config", "num_slots"))
def init_slots(
    model: VLM, params: Params, admission: Admission, pool: Any, config: GenerationConfig, num_slots: int
) -> Slots:
    """`num_slots` free slots for prompts up to the lengths of `admission`, whose values are not read."""
    batch = with_pooled_features(admission.batch, admission.image_B, pool)

    def with_slots(leaf):
        return jnp.zeros((num_slots, *leaf.shape[1:]), leaf.dtype)

    batch = jax.eval_shape(lambda batch: jax.tree.map(with_slots, batch), batch)
    logits_BV, cache = jax.eval_shape(
        lambda params, batch: model.prefill(params, batch, config.max_new_tokens - 1), params, batch
    )
    return Slots(empty_cache(cache), _empty_rows(num_slots, logits_BV.shape[-1], config))


def _empty_rows(num_rows: int, vocab_size: int, config: GenerationConfig) -> SlotRows:
    shape = (num_rows, config.max_new_tokens)
    zeros_B, has_keys = jnp.zeros(num_rows, jnp.int32), config.do_sample or config.row_sampling
    return SlotRows(
        token_B=zeros_B,
        done_B=jnp.ones(num_rows, bool),
        length_B=zeros_B,
        limit_B=zeros_B,
        ids_BM=jnp.full(shape, config.pad_token_id, jnp.int32),
        logprob_BM=jnp.zeros(shape) if config.output_logprobs else None,
        seen_BV=None if config.repetition_penalty == 1.0 else jnp.zeros((num_rows, vocab_size), bool),
        key_B=jax.random.key_data(sampling.row_keys([0] * num_rows)) if has_keys else None,
        is_finite_B=jnp.ones(num_rows, bool),
        sampling=RowSampling(jnp.zeros(num_rows), jnp.ones(num_rows)) if config.row_sampling else None,
    )


def with_pooled_features(batch: Batch, image_B: Array | None, pool: Any) -> Batch:
    """The batch with features of its images from places `image_B` of the pool; as it is without a pool."""
    if pool is None:
        return batch
    features = jax.tree.map(lambda leaf: jnp.take(leaf, image_B, axis=0, mode="clip"), pool)
    return dataclasses.replace(batch, features=features)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("pool",))
def encode_images(model: VLM, params: Params, batch: Batch, pool: Any, place_B: Array) -> Any:
    """The pool with the features of the batch's images at `place_B`; places beyond the pool are dropped."""
    features = model.answer_features(params, batch)
    return jax.tree.map(lambda old, new: old.at[place_B].set(new.astype(old.dtype), mode="drop"), pool, features)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def prefill(model: VLM, params: Params, admission: Admission, pool: Any, config: GenerationConfig) -> Slots:
    """Read the prompts of an admission and choose the first token of each answer: the rows that `insert` places."""
    batch = with_pooled_features(admission.batch, admission.image_B, pool)
    logits_RV, cache = model.prefill(params, batch, 0)
    rows = _empty_rows(*logits_RV.shape, config)
    seen_RV = sampling.init_seen(*logits_RV.shape, config, batch.prompt_BL, batch.prompt_mask_BL)
    given = {"limit_B": admission.limit_B, "key_B": admission.key_B, "sampling": admission.sampling}
    rows = dataclasses.replace(rows, done_B=~rows.done_B, seen_BV=seen_RV, **given)
    return Slots(cache, append_token(rows, logits_RV, config))


@functools.partial(jax.jit, donate_argnames=("slots",))
def insert(slots: Slots, new: Slots, slot_GR: Array) -> Slots:
    """The slots with the rows of `new`, which `prefill` made, in place of some; see `Admission.slot_GR`."""
    rows = jax.tree.map(lambda old, new: set_rows(old[None], new[None], slot_GR)[0], slots.rows, new.rows)
    return Slots(constrain_cache(insert_rows(slots.cache, new.cache, slot_GR)), rows)


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("slots",))
def admit(model: VLM, params: Params, slots: Slots, admission: Admission, pool: Any, config: GenerationConfig) -> Slots:
    """`prefill` and `insert` as one program."""
    return insert(slots, prefill(model, params, admission, pool, config), admission.slot_GR)


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("slots",))
def decode(
    model: VLM, params: Params, slots: Slots, config: GenerationConfig, min_done: Array | int, max_steps: Array | int
) -> Slots:
    """Generate until `min_done` slots are free, at most `max_steps` tokens of each row."""

    def wants_more(carry):
        slots, step = carry
        return (step < max_steps) & (slots.rows.done_B.sum() < min_done)

    def extend(carry):
        slots, step = carry
        logits_BV, cache = model.extend(params, slots.rows.token_B, slots.cache)
        return Slots(constrain_cache(cache), append_token(slots.rows, logits_BV, config)), step + 1

    return jax.lax.while_loop(wants_more, extend, (slots, jnp.zeros((), jnp.int32)))[0]


@functools.partial(jax.jit, donate_argnames=("slots",))
def cancel(slots: Slots, is_canceled_B: Array) -> Slots:
    """The slots with some of them freed."""
    rows = dataclasses.replace(slots.rows, done_B=slots.rows.done_B | is_canceled_B)
    return Slots(slots.cache, rows)


def append_token(rows: SlotRows, logits_BV: Array, config: GenerationConfig) -> SlotRows:
    """One more token in each row that has not ended; non-finite scores end a row."""
    keys = None if rows.key_B is None else jax.random.wrap_key_data(rows.key_B)
    step_B1, live_B = rows.length_B[:, None], ~rows.done_B
    token_B, logprob_B, is_finite_B = sampling.choose_token(
        logits_BV, rows.seen_BV, step_B1, config, keys, rows.sampling
    )
    token_B = jnp.where(live_B, token_B, config.pad_token_id)
    is_next_BM = (jnp.arange(config.max_new_tokens) == step_B1) & live_B[:, None]
    is_finite_B = rows.is_finite_B & (rows.done_B | is_finite_B)
    length_B = rows.length_B + live_B
    is_end_B = sampling.is_end_token(token_B, config) | (length_B >= rows.limit_B) | ~is_finite_B
    logprob_BM = rows.logprob_BM
    return dataclasses.replace(
        rows,
        token_B=token_B,
        done_B=rows.done_B | is_end_B,
        length_B=length_B,
        ids_BM=jnp.where(is_next_BM, token_B[:, None], rows.ids_BM),
        logprob_BM=logprob_BM if logprob_B is None else jnp.where(is_next_BM, logprob_B[:, None], logprob_BM),
        seen_BV=sampling.mark_seen(rows.seen_BV, token_B),
        is_finite_B=is_finite_B,
    )
