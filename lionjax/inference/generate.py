# SPDX-License-Identifier: Apache-2.0
"""From a prompt to words: read it once, then one token at a time until every row has ended.

`generate` runs as one compiled loop; `stream` runs the same step from Python and hands out each token as it comes.
Any `VLM` will do: only its `prefill` and `extend` are called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import VLM, Array, Batch, Cache, Params, UserError, pytree
from lionjax.inference import sampling as scoring
from lionjax.inference.beam_search import beam_search
from lionjax.inference.sampling import GenerateConfig, Generated


@pytree
class Answers:
    """Answers under way: `step` tokens are chosen; the model has read all of them but the last."""

    cache: Cache | None
    token_B: Array
    done_B: Array
    ids_BM: Array
    logprob_BM: Array | None
    seen_BV: Array | None
    step: Array


@functools.partial(jax.jit, static_argnames=("system", "config"))
def generate(system: VLM, params: Params, batch: Batch, config: GenerateConfig, key: Array | None = None) -> Generated:
    """Answers to a batch of prompts: greedy, sampled with `key`, or by beam search, as the config says.

    Compiled once for each system, config and shape of batch; the loop stops when all rows have ended. Raises UserError
    when the config samples and no key is given.
    """
    if config.beams > 1:
        return beam_search(system, params, batch, config)
    answers = begin(system, params, batch, config, key)
    answers = jax.lax.while_loop(
        lambda answers: (answers.step < config.max_new_tokens) & ~answers.done_B.all(),
        lambda answers: advance(system, params, answers, config, key),
        answers,
    )
    return finish(answers, config)


def stream(
    system: VLM, params: Params, batch: Batch, config: GenerateConfig, key: Array | None = None
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, one (B,) row of ids per step, as soon as each is known; padding after a row's end.

    Raises UserError for beams, whose first words are only known at the end.
    """
    if config.beams > 1:
        raise UserError(f"{config.beams} beams cannot stream: their first word is known last; set beams to 1")
    answers = first(system, params, batch, config, key)
    yield np.asarray(answers.token_B)
    for _ in range(config.max_new_tokens - 1):
        if answers.done_B.all():
            return
        answers = following(system, params, answers, config, key)
        yield np.asarray(answers.token_B)


def begin(system: VLM, params: Params, batch: Batch, config: GenerateConfig, key: Array | None) -> Answers:
    """Read the prompts and choose the first token of each answer."""
    if config.sample and key is None:
        raise UserError("sampling needs a random key; give generate one, or set sample to false")
    logits_BV, cache = system.prefill(params, batch, config.max_new_tokens - 1)
    rows, vocab = logits_BV.shape
    answers = Answers(
        cache=None,
        token_B=jnp.full(rows, config.pad, jnp.int32),
        done_B=jnp.zeros(rows, bool),
        ids_BM=jnp.full((rows, config.max_new_tokens), config.pad, jnp.int32),
        logprob_BM=jnp.zeros((rows, config.max_new_tokens)) if config.logprobs else None,
        seen_BV=scoring.nothing_seen(rows, vocab, config),
        step=jnp.zeros((), jnp.int32),
    )
    return choose(logits_BV, cache, answers, config, key)


def advance(system: VLM, params: Params, answers: Answers, config: GenerateConfig, key: Array | None) -> Answers:
    """Read the last token and choose the next one."""
    logits_BV, cache = system.extend(params, answers.token_B, answers.cache)
    return choose(logits_BV, cache, answers, config, key)


def choose(logits_BV: Array, cache: Cache, answers: Answers, config: GenerateConfig, key: Array | None) -> Answers:
    """One more token per row: the likeliest or a drawn one; padding in rows that have ended."""
    step, was_done_B = answers.step, answers.done_B
    logits_BV = logits_BV.astype(jnp.float32)
    scores_BV = scoring.rule(logits_BV, answers.seen_BV, step, config)
    if config.sample:
        token_B = scoring.draw(scores_BV, config, jax.random.fold_in(key, step))
    else:
        token_B = scoring.best(scores_BV)
    token_B = jnp.where(was_done_B, config.pad, token_B)
    logprob_BM = answers.logprob_BM
    if config.logprobs:
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        logprob_BM = logprob_BM.at[:, step].set(jnp.where(was_done_B, 0.0, logprob_B))
    return Answers(
        cache=cache,
        token_B=token_B,
        done_B=was_done_B | (token_B == config.eos),
        ids_BM=answers.ids_BM.at[:, step].set(token_B),
        logprob_BM=logprob_BM,
        seen_BV=scoring.see(answers.seen_BV, token_B),
        step=step + 1,
    )


def finish(answers: Answers, config: GenerateConfig) -> Generated:
    """The answers with their lengths."""
    is_end_BM = (answers.ids_BM == config.eos) & (jnp.arange(config.max_new_tokens) < answers.step)
    length_B = jnp.where(answers.done_B, scoring.best(is_end_BM) + 1, answers.step)
    score_B = answers.logprob_BM.sum(axis=1) if config.logprobs else None
    return Generated(answers.ids_BM, length_B, score_B, answers.logprob_BM, scoring.kept(answers.cache))


first = jax.jit(begin, static_argnames=("system", "config"))
following = jax.jit(advance, static_argnames=("system", "config"), donate_argnames=("answers",))
