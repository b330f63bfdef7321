# SPDX-License-Identifier: Apache-2.0
"""The decode loop: prefill the prompt, then decode one token at a time until every row has reached its end token.

`generate` is one compiled loop; `stream` runs the same step from Python and yields each token when it is known. Of a
model only `prefill` and `extend` are called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import VLM, Array, Batch, Cache, Params, UserError, pytree_dataclass
from lionjax.inference import sampling as scoring
from lionjax.inference.beam_search import beam_search
from lionjax.inference.sampling import GenerateOutput, GenerationConfig


@pytree_dataclass
class DecodeState:
    """State of the loop: `step` tokens are chosen; the model has read all of them but the last."""

    cache: Cache | None
    token_B: Array
    done_B: Array
    ids_BM: Array
    logprob_BM: Array | None
    seen_BV: Array | None
    step: Array
    is_finite_B: Array  # False from the first step on whose logits hold NaN or infinity


@functools.partial(jax.jit, static_argnames=("model", "config"))
def generate(
    model: VLM, params: Params, batch: Batch, config: GenerationConfig, key: Array | None = None
) -> GenerateOutput:
    """Generate answers to a batch of prompts: greedy, sampled with `key`, or by beam search, as `config` says.

    `key`: one for the batch, or (B,) one for each row, whose answer then does not depend on the other rows. Compiled
    once for each model, config and batch shape; the loop stops when all rows have ended. `is_finite_B` of the
    output must be checked (`sampling.require_finite`). Raises UserError when `config.do_sample` is set and no key is
    given.
    """
    if config.num_beams > 1:
        return beam_search(model, params, batch, config)
    state = prefill(model, params, batch, config, key)
    state = jax.lax.while_loop(
        lambda state: (state.step < config.max_new_tokens) & ~state.done_B.all(),
        lambda state: decode_step(model, params, state, config, key),
        state,
    )
    return finalize(state, config)


def stream(
    model: VLM, params: Params, batch: Batch, config: GenerationConfig, key: Array | None = None
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, (B,) ids per step, as soon as they are known; padding after a row's end.

    Raises UserError for beam search, whose first tokens are only known at the end, and for non-finite logits.
    """
    if config.num_beams > 1:
        raise UserError(f"{config.num_beams} beams cannot stream: their first token is known last; set num_beams to 1")
    state = jit_prefill(model, params, batch, config, key)
    scoring.require_finite(state.is_finite_B)
    yield np.asarray(state.token_B)
    for _ in range(config.max_new_tokens - 1):
        if state.done_B.all():
            return
        state = jit_decode_step(model, params, state, config, key)
        scoring.require_finite(state.is_finite_B)
        yield np.asarray(state.token_B)


def prefill(model: VLM, params: Params, batch: Batch, config: GenerationConfig, key: Array | None) -> DecodeState:
    """Read the prompts and select the first token of each answer."""
    if config.do_sample and key is None:
        raise UserError("sampling needs a random key; give generate one, or set do_sample to false")
    logits_BV, cache = model.prefill(params, batch, config.max_new_tokens - 1)
    rows, vocab = logits_BV.shape
    state = DecodeState(
        cache=None,
        token_B=jnp.full(rows, config.pad_token_id, jnp.int32),
        done_B=jnp.zeros(rows, bool),
        ids_BM=jnp.full((rows, config.max_new_tokens), config.pad_token_id, jnp.int32),
        logprob_BM=jnp.zeros((rows, config.max_new_tokens)) if config.output_logprobs else None,
        seen_BV=scoring.init_seen(rows, vocab, config, batch.prompt_BL, batch.prompt_mask_BL),
        step=jnp.zeros((), jnp.int32),
        is_finite_B=jnp.ones(rows, bool),
    )
    return select_next_token(logits_BV, cache, state, config, key)


def decode_step(
    model: VLM, params: Params, state: DecodeState, config: GenerationConfig, key: Array | None
) -> DecodeState:
    """Read the last token and select the next one."""
    logits_BV, cache = model.extend(params, state.token_B, state.cache)
    return select_next_token(logits_BV, cache, state, config, key)


def select_next_token(
    logits_BV: Array, cache: Cache, state: DecodeState, config: GenerationConfig, key: Array | None
) -> DecodeState:
    """One more token per row, greedy or sampled; padding in rows that have ended. Non-finite logits end a row."""
    step, was_done_B = state.step, state.done_B
    token_B, logprob_B, is_finite_B = scoring.choose_token(logits_BV, state.seen_BV, step, config, key)
    is_finite_B = state.is_finite_B & (was_done_B | is_finite_B)
    token_B = jnp.where(was_done_B, config.pad_token_id, token_B)
    logprob_BM = state.logprob_BM
    if config.output_logprobs:
        logprob_BM = logprob_BM.at[:, step].set(jnp.where(was_done_B, 0.0, logprob_B))
    return DecodeState(
        cache=cache,
        token_B=token_B,
        done_B=was_done_B | scoring.is_end_token(token_B, config) | ~is_finite_B,
        ids_BM=state.ids_BM.at[:, step].set(token_B),
        logprob_BM=logprob_BM,
        seen_BV=scoring.mark_seen(state.seen_BV, token_B),
        step=step + 1,
        is_finite_B=is_finite_B,
    )


def finalize(state: DecodeState, config: GenerationConfig) -> GenerateOutput:
    """The generated ids with their lengths, scores and auxiliary outputs."""
    is_end_BM = scoring.is_end_token(state.ids_BM, config) & (jnp.arange(config.max_new_tokens) < state.step)
    length_B = jnp.where(state.done_B, scoring.argmax(is_end_BM) + 1, state.step)
    score_B = state.logprob_BM.sum(axis=1) if config.output_logprobs else None
    return GenerateOutput(
        state.ids_BM, length_B, score_B, state.logprob_BM, scoring.aux_outputs(state.cache), state.is_finite_B
    )


jit_prefill = jax.jit(prefill, static_argnames=("model", "config"))
jit_decode_step = jax.jit(decode_step, static_argnames=("model", "config"), donate_argnames=("state",))
