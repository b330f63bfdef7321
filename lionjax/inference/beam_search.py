# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest whole answer instead of the likeliest next word, as Hugging Face does it.

Each prompt keeps K open hypotheses, which grow, and K closed ones, which have ended. A step takes the 2K best
continuations of the open ones: those that end may close, and the K best of the rest stay open. A prompt is settled when
its best open hypothesis could not beat its worst closed one if it ended now.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import VLM, Array, Batch, Cache, Params, pytree
from lionjax.inference import sampling as scoring
from lionjax.inference.sampling import GenerateConfig, Generated, take

LOW = -1e9  # below every real score; finite, so that a sum with it still orders


@pytree
class Open:
    """Hypotheses that grow."""

    text: dict  # ids (B, K, M), and logprob (B, K, M) when asked for
    score_BK: Array  # sum of log-probabilities
    token_BK: Array  # the last token, not yet read by the model
    parent_BK: Array  # the beam each of them grew from, whose cache it needs
    seen_RV: Array | None  # R = B K rows


@pytree
class Closed:
    """Hypotheses that have ended, best first. Places not yet taken have a score of about LOW."""

    text: dict
    score_BK: Array  # sum of log-probabilities / length ** length_penalty
    length_BK: Array
    taken_BK: Array


@pytree
class Beams:
    cache: Cache  # of B K rows, in the order before `open.parent_BK`
    open: Open
    closed: Closed
    settled_B: Array
    step: Array  # tokens chosen so far


def beam_search(system: VLM, params: Params, batch: Batch, config: GenerateConfig) -> Generated:
    """The best answer to each prompt among `config.beams` hypotheses.

    The repetition penalty acts on log-probabilities, the start token counts as generated, and `score_B` is the sum of
    the penalised log-probabilities over length ** length_penalty. To be called inside `jax.jit`.
    """
    beams = start(system, params, batch, config)
    beams = jax.lax.while_loop(
        lambda beams: (beams.step < config.max_new_tokens) & ~beams.settled_B.all(),
        lambda beams: advance(system, params, beams, config),
        beams,
    )
    closed = beams.closed
    length_B = closed.length_BK[:, 0]
    inside_BM = jnp.arange(config.max_new_tokens) < length_B[:, None]
    ids_BM = jnp.where(inside_BM, closed.text["ids"][:, 0], config.pad)
    logprob_BM = jnp.where(inside_BM, closed.text["logprob"][:, 0], 0) if config.logprobs else None
    kept = jax.tree.map(lambda leaf: leaf[:, 0], closed.text.get("kept"))
    return Generated(ids_BM, length_B, closed.score_BK[:, 0], logprob_BM, kept)


def start(system: VLM, params: Params, batch: Batch, config: GenerateConfig) -> Beams:
    """Read each prompt once and open its first K hypotheses."""
    logits_BV, cache = system.prefill(params, batch, config.max_new_tokens - 1)
    rows, vocab = logits_BV.shape
    beams = config.beams
    text = {"ids": jnp.full((rows, beams, config.max_new_tokens), config.pad, jnp.int32)}
    if config.logprobs:
        text["logprob"] = jnp.zeros((rows, beams, config.max_new_tokens))
    if (kept := scoring.kept(cache)) is not None:
        text["kept"] = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], beams, axis=1), kept)
    zeros_BK = jnp.zeros((rows, beams), jnp.int32)
    low_BK = jnp.full((rows, beams), LOW)
    # Only the first beam counts in the first step, or all beams would say the same.
    empty = Open(
        text=text,
        score_BK=low_BK.at[:, 0].set(0.0),
        token_BK=zeros_BK,
        parent_BK=zeros_BK,
        seen_RV=scoring.nothing_seen(rows * beams, vocab, config),
    )
    closed = Closed(text, low_BK, zeros_BK, jnp.zeros((rows, beams), bool))

    def repeat(leaf):
        return jnp.repeat(leaf, beams, axis=1)

    written, fixed = (jax.tree.map(repeat, part) for part in (cache.written, cache.fixed))
    cache = Cache(written, fixed, cache.step, cache.read)
    nobody = Beams(cache, empty, closed, jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))
    return grow(jnp.repeat(logits_BV, beams, axis=0), cache, nobody, config)


def advance(system: VLM, params: Params, beams: Beams, config: GenerateConfig) -> Beams:
    """Give each open hypothesis its parent's cache, read its last token, and grow."""
    written = follow(beams.cache.written, beams.open.parent_BK)
    cache = dataclasses.replace(beams.cache, written=written)
    logits_RV, cache = system.extend(params, beams.open.token_BK.reshape(-1), cache)
    return grow(logits_RV, cache, beams, config)


def follow(written, parent_BK: Array):
    """Rows of the cache (layers, B K, ...) in the order of their beams' parents."""
    rows, beams = parent_BK.shape

    def one(leaf):
        split = jnp.moveaxis(leaf.reshape(leaf.shape[0], rows, beams, *leaf.shape[2:]), 0, 2)
        return jnp.moveaxis(take(split, parent_BK), 2, 0).reshape(leaf.shape)

    return jax.tree.map(one, written)


def grow(logits_RV: Array, cache: Cache, beams: Beams, config: GenerateConfig) -> Beams:
    """One more token: the 2K best continuations of each prompt, sorted into open and closed."""
    was, step = beams.open, beams.step
    rows, vocab = len(beams.settled_B), logits_RV.shape[-1]
    logprob_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    scores_RV = scoring.rule(logprob_RV, was.seen_RV, step, config)
    total_BJ = (scores_RV + was.score_BK.reshape(-1, 1)).reshape(rows, -1)
    # 2K, because at most K of them end and K must stay open.
    score_BC, place_BC = scoring.top_k(total_BJ, 2 * config.beams)
    parent_BC, token_BC = place_BC // vocab, place_BC % vocab
    text = take(was.text, parent_BC)
    text["ids"] = text["ids"].at[:, :, step].set(token_BC)
    if config.logprobs:
        chosen_BC = jnp.take_along_axis(logprob_RV.reshape(rows, -1), place_BC, axis=1)
        text["logprob"] = text["logprob"].at[:, :, step].set(chosen_BC)
    if (kept := scoring.kept(cache)) is not None:
        beams_first = jax.tree.map(lambda leaf: leaf.reshape(rows, config.beams, *leaf.shape[1:]), kept)
        text["kept"] = take(beams_first, parent_BC)
    ends_BC = (token_BC == config.eos) | (step + 1 == config.max_new_tokens)
    closed = close(beams, text, score_BC, ends_BC, config)
    score_BK, order_BK = jax.lax.top_k(jnp.where(ends_BC, score_BC + LOW, score_BC), config.beams)
    chosen = take({"text": text, "token": token_BC, "parent": parent_BC}, order_BK)
    seen_RV = was.seen_RV
    if seen_RV is not None:
        seen_BKV = take(seen_RV.reshape(rows, config.beams, vocab), chosen["parent"])
        seen_RV = scoring.see(seen_BKV.reshape(-1, vocab), chosen["token"].reshape(-1))
    now = Open(chosen["text"], score_BK, chosen["token"], chosen["parent"], seen_RV)
    hope_B = score_BK[:, 0] / over(config)[step]
    settled_B = beams.settled_B | (closed.taken_BK.all(axis=1) & (hope_B <= closed.score_BK[:, -1]))
    return Beams(cache, now, closed, settled_B, step + 1)


def close(beams: Beams, text: dict, score_BC: Array, ends_BC: Array, config: GenerateConfig) -> Closed:
    """The K best of the closed hypotheses and of those that end now among the K best continuations."""
    old, k = beams.closed, config.beams
    ends_BK = ends_BC[:, :k] & ~beams.settled_B[:, None]
    score_BK = jnp.where(ends_BK, score_BC[:, :k] / over(config)[beams.step], LOW)
    new = Closed(
        text=jax.tree.map(lambda leaf: leaf[:, :k], text),
        score_BK=score_BK,
        length_BK=jnp.full_like(old.length_BK, beams.step + 1),
        taken_BK=ends_BK,
    )
    both = jax.tree.map(lambda one, other: jnp.concatenate([one, other], axis=1), old, new)
    return take(both, jax.lax.top_k(both.score_BK, k)[1])


def over(config: GenerateConfig) -> Array:
    """length ** length_penalty for the lengths 1, 2, ... max_new_tokens, rounded once."""
    return jnp.asarray(np.arange(1, config.max_new_tokens + 1, dtype=np.float64) ** config.length_penalty, jnp.float32)
