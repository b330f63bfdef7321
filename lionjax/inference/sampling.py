# SPDX-License-Identifier: Apache-2.0
"""What to ask of generation, what it gives back, and what happens to a row of scores before a token is taken.

Everything here follows Hugging Face `generate`, so that the same weights give the same words. Scores are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lionjax.core.types import Array, Cache, UserError, pytree

IMPOSSIBLE = -jnp.inf
BLOCK = 128  # scores a maximum is kept for in `top_k`


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to generate. The three ids are T5's unless said otherwise."""

    max_new_tokens: int = 64
    min_length: int = 0  # no end token before so many, the start token among them
    beams: int = 1
    length_penalty: float = 1.0  # a beam counts score / length ** this; above 0 favours long ones
    repetition_penalty: float = 1.0  # above 1 makes tokens already generated less likely
    sample: bool = False  # draw instead of taking the best; the next three apply only then
    temperature: float = 1.0
    top_k: int = 0  # 0 means all
    top_p: float = 1.0
    eos: int = 1  # -1 for a model without one
    pad: int = 0
    start: int | None = 0  # the decoder's first token, which counts as generated; None: has none
    logprobs: bool = False  # also give the model's log-probability of each token

    def __post_init__(self):
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "beams": (self.beams >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 means none)"),
            "temperature": (self.temperature > 0, "above 0 (for the likeliest words set sample to false)"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (right, wish) in wanted.items():
            if not right:
                raise UserError(f"generate.{name} is {getattr(self, name)} but must be {wish}")
        if self.sample and self.beams > 1:
            raise UserError(f"sampling with {self.beams} beams is not offered; set beams to 1 or sample to false")


@pytree
class Generated:
    """What came out: one row per prompt."""

    ids_BM: Array  # int32 (B, max_new_tokens): new tokens, the end token, then padding
    length_B: Array  # tokens up to and with the end token
    score_B: Array = None  # log-probability; of beams over length ** length_penalty
    logprob_BM: Array = None  # the model's own of each token, 0 after the end; with config.logprobs
    kept: Any = None  # what the system kept of each answer beside its words, from the cache's `written["kept"]`


def kept(cache: Cache) -> Any:
    """What a system keeps of its answers beside their words, such as boxes: `written["kept"]`, one row per answer."""
    found = cache.written.get("kept") if isinstance(cache.written, dict) else None
    return jax.tree.map(lambda leaf: leaf[0], found)


def nothing_seen(rows: int, vocab: int, config: GenerateConfig) -> Array | None:
    """A (rows, V) table of the tokens generated so far, or None when no penalty asks for it."""
    if config.repetition_penalty == 1.0:
        return None
    seen_RV = jnp.zeros((rows, vocab), bool)
    return seen_RV if config.start is None else seen_RV.at[:, config.start].set(True)


def see(seen_RV: Array | None, token_R: Array) -> Array | None:
    """The table with one more token per row."""
    if seen_RV is None:
        return None
    return seen_RV.at[jnp.arange(len(token_R)), token_R].set(True)


def rule(scores_RV: Array, seen_RV: Array | None, step: Array | int, config: GenerateConfig) -> Array:
    """Scores after the repetition penalty (arXiv 1909.05858) and the ban on an early end.

    `step` is the number of tokens generated so far. The penalty multiplies a negative score and divides a positive one.
    """
    if seen_RV is not None:
        strength = config.repetition_penalty
        punished_RV = jnp.where(scores_RV < 0, scores_RV * strength, scores_RV / strength)
        scores_RV = jnp.where(seen_RV, punished_RV, scores_RV)
    least = config.min_length - (config.start is not None)
    if least > 0:
        is_end_V = jnp.arange(scores_RV.shape[-1]) == config.eos
        scores_RV = jnp.where(is_end_V & (step < least), IMPOSSIBLE, scores_RV)
    return scores_RV


def candidates(scores_BV: Array, config: GenerateConfig) -> tuple[Array, Array | None]:
    """What sampling draws from: scores (B, k) in falling order and their ids, impossible ones at -inf.

    Temperature first, then the `top_k` best, then the fewest of these whose probabilities reach `top_p` (nucleus
    sampling, arXiv 1904.09751). Without either cut all scores come back as they stand and the ids are None.
    """
    scores_BV = scores_BV / config.temperature
    vocab = scores_BV.shape[-1]
    kept = min(config.top_k or vocab, vocab)
    if kept == vocab and config.top_p == 1.0:
        return scores_BV, None
    scores_Bk, ids_Bk = top_k(scores_BV, kept)
    if config.top_p < 1.0:
        probability_Bk = jax.nn.softmax(scores_Bk, axis=-1)
        better_Bk = jnp.cumsum(probability_Bk, axis=-1) - probability_Bk
        # The first is always kept: a rounding error must not leave an empty set.
        inside_Bk = (better_Bk < config.top_p) | (jnp.arange(kept) == 0)
        scores_Bk = jnp.where(inside_Bk, scores_Bk, IMPOSSIBLE)
    return scores_Bk, ids_Bk


def draw(scores_BV: Array, config: GenerateConfig, key: Array) -> Array:
    """One token per row, drawn from `candidates`."""
    scores_Bk, ids_Bk = candidates(scores_BV, config)
    place_B = jax.random.categorical(key, scores_Bk).astype(jnp.int32)
    return place_B if ids_Bk is None else jnp.take_along_axis(ids_Bk, place_B[:, None], axis=1)[:, 0]


def best(scores_BV: Array) -> Array:
    """The first highest score of each row: argmax, as two reductions that a CPU runs in vectors (6 times faster)."""
    ids_V = jnp.arange(scores_BV.shape[-1], dtype=jnp.int32)
    highest_B1 = scores_BV.max(axis=-1, keepdims=True)
    return jnp.where(scores_BV >= highest_B1, ids_V, ids_V[-1]).min(axis=-1)


def top_k(scores_BV: Array, k: int) -> tuple[Array, Array]:
    """The k highest scores of each row in falling order and their places: `jax.lax.top_k`, faster on long rows.

    The k best stand in the k blocks with the highest maxima, so only these blocks are searched. Equal scores come in
    the order of their places, as there.
    """
    rows, length = scores_BV.shape
    if length < 4 * BLOCK * k:
        top_Bk, place_Bk = jax.lax.top_k(scores_BV, k)
    else:
        padding = ((0, 0), (0, -length % BLOCK))
        blocks_BRC = jnp.pad(scores_BV, padding, constant_values=IMPOSSIBLE)
        blocks_BRC = blocks_BRC.reshape(rows, -1, BLOCK)
        chosen_Bk = jnp.sort(jax.lax.top_k(blocks_BRC.max(axis=-1), k)[1], axis=-1)
        few_BC = take(blocks_BRC, chosen_Bk).reshape(rows, k * BLOCK)
        top_Bk, place_Bk = jax.lax.top_k(few_BC, k)
        place_Bk = take(chosen_Bk, place_Bk // BLOCK) * BLOCK + place_Bk % BLOCK
    # XLA turns a slice of a top-k back into a full sort (50 times slower on a CPU), unless it cannot see it.
    return jax.lax.optimization_barrier((top_Bk, place_Bk))


def take(tree, index_BK: Array):
    """For every leaf (B, J, ...) of a tree: rows `index_BK` of axis 1, prompt by prompt."""

    def row(leaf_J, index_K):
        return jnp.take(leaf_J, index_K, axis=0, mode="clip")

    return jax.tree.map(lambda leaf: jax.vmap(row)(leaf, index_BK), tree)
