# SPDX-License-Identifier: Apache-2.0
"""Beam search with the semantics of Hugging Face `generate(num_beams=K)`.

Each prompt has K live beams (not yet ended) and K finished ones. A step takes the 2K best continuations of the live
beams: those that end compete for the finished slots, and the K best of the others stay live. A prompt is done when its
best live beam would not beat its worst finished beam if it ended now.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import VLM, Array, Batch, Cache, Params, pytree_dataclass
from lionjax.inference import sampling
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, gather_rows, is_end_token
from lionjax.nn.kv_cache import repeat_rows

LARGE_NEGATIVE = -1e9  # below every real score, but finite: sums with it keep their order


@pytree_dataclass
class LiveBeams:
    """Beams that have not ended."""

    sequences: dict  # ids (B, K, M); logprob (B, K, M) with config.output_logprobs; kept: the model's aux outputs
    score_BK: Array  # sum of log-probabilities
    token_BK: Array  # the last token, not yet fed to the model
    parent_BK: Array  # the beam that each was expanded from; its cache rows are needed
    seen_RV: Array | None  # tokens generated so far, R = B K rows; None without a repetition penalty


@pytree_dataclass
class FinishedBeams:
    """Beams that have ended, best first. Empty slots have a score of about LARGE_NEGATIVE."""

    sequences: dict
    score_BK: Array  # sum of log-probabilities / length ** length_penalty
    length_BK: Array
    is_finished_BK: Array


@pytree_dataclass
class BeamState:
    """The loop state of a beam search."""

    cache: Cache  # B K rows, not yet reordered by `live.parent_BK`
    live: LiveBeams
    finished: FinishedBeams
    done_B: Array
    step: Array  # int32 scalar: tokens generated so far
    is_finite_B: Array  # False from the first step on whose logits hold NaN or infinity


def beam_search(model: VLM, params: Params, batch: Batch, config: GenerationConfig) -> GenerateOutput:
    """The best of `config.num_beams` beams for each prompt, as a GenerateOutput. Call it inside `jax.jit`.

    The repetition penalty acts on log-probabilities, the start token counts as generated, and `score_B` is the sum of
    the penalized log-probabilities divided by length ** length_penalty.
    """
    state = prefill(model, params, batch, config)
    state = jax.lax.while_loop(
        lambda state: (state.step < config.max_new_tokens) & ~state.done_B.all(),
        lambda state: decode_step(model, params, state, config),
        state,
    )
    finished = state.finished
    length_B = finished.length_BK[:, 0]
    is_token_BM = jnp.arange(config.max_new_tokens) < length_B[:, None]
    ids_BM = jnp.where(is_token_BM, finished.sequences["ids"][:, 0], config.pad_token_id)
    logprob_BM = jnp.where(is_token_BM, finished.sequences["logprob"][:, 0], 0) if config.output_logprobs else None
    aux = jax.tree.map(lambda leaf: leaf[:, 0], finished.sequences.get("kept"))
    return GenerateOutput(ids_BM, length_B, finished.score_BK[:, 0], logprob_BM, aux, state.is_finite_B)


def prefill(model: VLM, params: Params, batch: Batch, config: GenerationConfig) -> BeamState:
    """Run each prompt through the model once and take its first K beams."""
    logits_BV, cache = model.prefill(params, batch, config.max_new_tokens - 1)
    num_prompts, vocab_size = logits_BV.shape
    num_beams = config.num_beams
    sequences = {"ids": jnp.full((num_prompts, num_beams, config.max_new_tokens), config.pad_token_id, jnp.int32)}
    if config.output_logprobs:
        sequences["logprob"] = jnp.zeros((num_prompts, num_beams, config.max_new_tokens))
    if (aux := sampling.aux_outputs(cache)) is not None:
        sequences["kept"] = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], num_beams, axis=1), aux)
    zeros_BK = jnp.zeros((num_prompts, num_beams), jnp.int32)
    low_BK = jnp.full((num_prompts, num_beams), LARGE_NEGATIVE)
    # Only the first beam counts in the first step; otherwise all beams would be equal.
    live = LiveBeams(
        sequences=sequences,
        score_BK=low_BK.at[:, 0].set(0.0),
        token_BK=zeros_BK,
        parent_BK=zeros_BK,
        seen_RV=sampling.init_seen(num_prompts * num_beams, vocab_size, config, batch.prompt_BL, batch.prompt_mask_BL),
    )
    finished = FinishedBeams(sequences, low_BK, zeros_BK, jnp.zeros((num_prompts, num_beams), bool))

    cache = repeat_rows(cache, num_beams)
    flags = {"done_B": jnp.zeros(num_prompts, bool), "is_finite_B": jnp.ones(num_prompts, bool)}
    state = BeamState(cache, live, finished, step=jnp.zeros((), jnp.int32), **flags)
    return expand_beams(jnp.repeat(logits_BV, num_beams, axis=0), cache, state, config)


def decode_step(model: VLM, params: Params, state: BeamState, config: GenerationConfig) -> BeamState:
    """One step: reorder the cache by `parent_BK`, feed each live beam's last token, expand the beams."""
    generated = reorder_cache(state.cache.generated, state.live.parent_BK)
    cache = dataclasses.replace(state.cache, generated=generated)
    logits_RV, cache = model.extend(params, state.live.token_BK.reshape(-1), cache)
    return expand_beams(logits_RV, cache, state, config)


def reorder_cache(generated, parent_BK: Array):
    """The cache with leaves (layers, B K, ...) reordered so that each beam has its parent's rows."""
    num_prompts, num_beams = parent_BK.shape

    def reorder(leaf):
        split = jnp.moveaxis(leaf.reshape(leaf.shape[0], num_prompts, num_beams, *leaf.shape[2:]), 0, 2)
        return jnp.moveaxis(gather_rows(split, parent_BK), 2, 0).reshape(leaf.shape)

    return jax.tree.map(reorder, generated)


def expand_beams(logits_RV: Array, cache: Cache, state: BeamState, config: GenerationConfig) -> BeamState:
    """Add one token: take the 2K best continuations of each prompt and update live and finished beams."""
    live, step = state.live, state.step
    num_prompts, vocab_size = len(state.done_B), logits_RV.shape[-1]
    logprob_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    # NaN or infinity anywhere in a row of logits makes all its log-probabilities NaN.
    is_finite_B = ~jnp.isnan(logprob_RV[:, 0]).reshape(num_prompts, -1).any(axis=1)
    is_finite_B = state.is_finite_B & (state.done_B | is_finite_B)
    scores_RV = sampling.process_logits(logprob_RV, live.seen_RV, step, config)
    total_BJ = (scores_RV + live.score_BK.reshape(-1, 1)).reshape(num_prompts, -1)
    # Each beam can end by each end token, and as many as `num_beams` must stay live.
    num_candidates = (1 + len(sampling.end_token_ids(config))) * config.num_beams
    score_BC, index_BC = sampling.top_k(total_BJ, num_candidates)
    parent_BC, token_BC = index_BC // vocab_size, index_BC % vocab_size
    sequences = gather_rows(live.sequences, parent_BC)
    sequences["ids"] = sequences["ids"].at[:, :, step].set(token_BC)
    if config.output_logprobs:
        chosen_BC = jnp.take_along_axis(logprob_RV.reshape(num_prompts, -1), index_BC, axis=1)
        sequences["logprob"] = sequences["logprob"].at[:, :, step].set(chosen_BC)
    if (aux := sampling.aux_outputs(cache)) is not None:
        aux_BK = jax.tree.map(lambda leaf: leaf.reshape(num_prompts, config.num_beams, *leaf.shape[1:]), aux)
        sequences["kept"] = gather_rows(aux_BK, parent_BC)
    ends_BC = is_end_token(token_BC, config) | (step + 1 == config.max_new_tokens)
    finished = update_finished(state, sequences, score_BC, ends_BC, config)
    score_BK, order_BK = jax.lax.top_k(jnp.where(ends_BC, score_BC + LARGE_NEGATIVE, score_BC), config.num_beams)
    chosen = gather_rows({"text": sequences, "token": token_BC, "parent": parent_BC}, order_BK)
    seen_RV = live.seen_RV
    if seen_RV is not None:
        seen_BKV = gather_rows(seen_RV.reshape(num_prompts, config.num_beams, vocab_size), chosen["parent"])
        seen_RV = sampling.mark_seen(seen_BKV.reshape(-1, vocab_size), chosen["token"].reshape(-1))
    next_live = LiveBeams(chosen["text"], score_BK, chosen["token"], chosen["parent"], seen_RV)
    best_possible_B = score_BK[:, 0] / length_norm(config)[step]
    done_B = state.done_B | (finished.is_finished_BK.all(axis=1) & (best_possible_B <= finished.score_BK[:, -1]))
    return BeamState(cache, next_live, finished, done_B | ~is_finite_B, step + 1, is_finite_B)


def update_finished(
    state: BeamState, sequences: dict, score_BC: Array, ends_BC: Array, config: GenerationConfig
) -> FinishedBeams:
    """The K best of the finished beams and of those that end now among the K best continuations."""
    old, num_beams = state.finished, config.num_beams
    ends_BK = ends_BC[:, :num_beams] & ~state.done_B[:, None]
    score_BK = jnp.where(ends_BK, score_BC[:, :num_beams] / length_norm(config)[state.step], LARGE_NEGATIVE)
    new = FinishedBeams(
        sequences=jax.tree.map(lambda leaf: leaf[:, :num_beams], sequences),
        score_BK=score_BK,
        length_BK=jnp.full_like(old.length_BK, state.step + 1),
        is_finished_BK=ends_BK,
    )
    both = jax.tree.map(lambda left, right: jnp.concatenate([left, right], axis=1), old, new)
    return gather_rows(both, jax.lax.top_k(both.score_BK, num_beams)[1])


def length_norm(config: GenerationConfig) -> Array:
    """length ** length_penalty for lengths 1 to max_new_tokens, float32 (max_new_tokens,), computed in float64."""
    return jnp.asarray(np.arange(1, config.max_new_tokens + 1, dtype=np.float64) ** config.length_penalty, jnp.float32)
