# SPDX-License-Identifier: Apache-2.0
"""Generation settings and output, logits processors, and sampling of tokens.

Everything follows Hugging Face `generate`, so that the same weights give the same tokens. Scores are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.errors import check_ranges
from lionjax.core.experiment import DecodingConfig
from lionjax.core.types import Array, Cache, UserError, pytree_dataclass

NEG_INF = -jnp.inf
TOP_K_BLOCK_SIZE = 128  # scores per block in `top_k`


@dataclasses.dataclass(frozen=True)
class GenerationConfig(DecodingConfig):
    """All settings of one generation, as in Hugging Face's GenerationConfig. The three token ids default to T5's."""

    max_new_tokens: int = 64
    min_length: int = 0  # tokens before the end token is allowed, the start token included
    eos_token_id: int | tuple[int, ...] = 1  # one id or several; -1 for a model without one
    pad_token_id: int = 0
    decoder_start_token_id: int | None = 0  # the decoder's first token, counted as generated; None: decoder-only model
    output_logprobs: bool = False  # also return the model's log-probability of each token
    row_sampling: bool = False  # in slots: each request has its own temperature (0: greedy) and top_p

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, "generation.", max_new_tokens=">= 1")
        if self.temperature <= 0:
            raise UserError(
                f"generation.temperature is {self.temperature}; give a number > 0 (for greedy decoding set do_sample "
                "to false)"
            )
        if self.do_sample and self.num_beams > 1:
            raise UserError(
                f"sampling with {self.num_beams} beams is not supported; set num_beams to 1 or do_sample to false"
            )


@pytree_dataclass
class GenerateOutput:
    """Generated tokens and their scores, one row per prompt."""

    ids_BM: Array  # int32 (B, max_new_tokens): new tokens, the end token, then padding
    length_B: Array  # tokens up to and including the end token
    score_B: Array = None  # sum of log-probabilities; with beams divided by length ** length_penalty
    logprob_BM: Array = None  # the model's log-probability of each token, 0 after the end; with output_logprobs
    aux_outputs: Any = None  # outputs of the model besides tokens (`generated["kept"]` of the cache), e.g. boxes
    is_finite_B: Array = None  # False where logits were NaN or infinite; the row's tokens mean nothing


@pytree_dataclass
class RowSampling:
    """Settings of each row with `GenerationConfig.row_sampling`: `temperature_B` (0: greedy) and `top_p_B`."""

    temperature_B: Array
    top_p_B: Array


def require_finite(is_finite_B, what: str = "logits") -> None:
    """Raise UserError unless all rows are True (`GenerateOutput.is_finite_B`)."""
    if not (is_finite_B := np.asarray(is_finite_B)).all():
        raise UserError(
            f"the model computed non-finite {what} (NaN or infinity) for {int((~is_finite_B).sum())} of "
            f"{len(is_finite_B)} inputs, so it has no answer; check its weights for NaN (`lionjax convert` lists such "
            "tensors) and that its tokenizer is its own"
        )


def end_token_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The end tokens, each of which ends an answer."""
    return config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)


def is_end_token(ids: Array, config: GenerationConfig) -> Array:
    """Bool, in the shape of `ids`: whether each id is an end token."""
    return (ids[..., None] == jnp.asarray(end_token_ids(config), ids.dtype)).any(axis=-1)


def aux_outputs(cache: Cache, names: Collection[str] | None = None) -> Any:
    """Outputs that a model collects besides tokens, such as boxes: `cache.generated["kept"]`, one row per sequence.

    `names`: of those that are wanted, None: all.
    """
    aux = cache.generated.get("kept") if isinstance(cache.generated, dict) else None
    if aux is not None and names is not None:
        aux = {name: aux[name] for name in names if name in aux}
    return jax.tree.map(lambda leaf: leaf[0], aux)


def init_seen(
    num_rows: int, vocab_size: int, config: GenerationConfig, prompt_BL: Array = None, prompt_mask_BL: Array = None
) -> Array | None:
    """Bool (num_rows, vocab_size), True for tokens that the repetition penalty counts; None without a penalty.

    These are the decoder's start token and, with `config.penalize_prompt`, those of the prompts; each prompt has
    num_rows / B rows.
    """
    if config.repetition_penalty == 1.0:
        return None
    seen_RV = jnp.zeros((num_rows, vocab_size), bool)
    if config.penalize_prompt:
        # Padding and an image token outside the vocabulary are dropped.
        ids_BL = jnp.where((prompt_mask_BL > 0) & (prompt_BL >= 0), prompt_BL, vocab_size)
        ids_RL = jnp.repeat(ids_BL, num_rows // len(ids_BL), axis=0)
        seen_RV = seen_RV.at[jnp.arange(num_rows)[:, None], ids_RL].set(True, mode="drop")
    return seen_RV if config.decoder_start_token_id is None else seen_RV.at[:, config.decoder_start_token_id].set(True)


def mark_seen(seen_RV: Array | None, token_R: Array) -> Array | None:
    """`seen_RV` with one more token per row marked."""
    if seen_RV is None:
        return None
    return seen_RV.at[jnp.arange(len(token_R)), token_R].set(True)


def process_logits(scores_RV: Array, seen_RV: Array | None, step: Array | int, config: GenerationConfig) -> Array:
    """Scores (R, V) after the repetition penalty (arXiv 1909.05858) and the minimum length (end token at -inf).

    `step` is the number of tokens generated so far. The penalty multiplies negative scores and divides positive ones.
    """
    if seen_RV is not None:
        penalty = config.repetition_penalty
        penalized_RV = jnp.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty)
        scores_RV = jnp.where(seen_RV, penalized_RV, scores_RV)
    min_new_tokens = config.min_length - (config.decoder_start_token_id is not None)
    if min_new_tokens > 0:
        is_end_V = is_end_token(jnp.arange(scores_RV.shape[-1]), config)
        scores_RV = jnp.where(is_end_V & (step < min_new_tokens), NEG_INF, scores_RV)
    return scores_RV


def top_k_top_p_filtering(
    scores_BV: Array, config: GenerationConfig, temperature: Array | None = None, top_p: Array | float | None = None
) -> tuple[Array, Array | None]:
    """Scores (B, k) in descending order with excluded tokens at -inf, and their token ids (B, k).

    Temperature first, then the `top_k` best, then the smallest set of these whose probabilities sum to `top_p` (nucleus
    sampling, arXiv 1904.09751). Without top_k and top_p, all scores in vocabulary order, and None for the ids.
    `temperature` and `top_p`: in place of those of the config; arrays are below 1.
    """
    scores_BV = scores_BV / (config.temperature if temperature is None else temperature)
    top_p = config.top_p if top_p is None else top_p
    has_top_p = not isinstance(top_p, float | int) or top_p < 1.0
    vocab_size = scores_BV.shape[-1]
    k = min(config.top_k or vocab_size, vocab_size)
    if k == vocab_size and not has_top_p:
        return scores_BV, None
    scores_Bk, ids_Bk = top_k(scores_BV, k)
    if has_top_p:
        probability_Bk = jax.nn.softmax(scores_Bk, axis=-1)
        mass_before_Bk = jnp.cumsum(probability_Bk, axis=-1) - probability_Bk
        # Always keep the first: a rounding error must not leave an empty set.
        in_nucleus_Bk = (mass_before_Bk < top_p) | (jnp.arange(k) == 0)
        scores_Bk = jnp.where(in_nucleus_Bk, scores_Bk, NEG_INF)
    return scores_Bk, ids_Bk


def sample_token(scores_BV: Array, config: GenerationConfig, key: Array, temperature=None, top_p=None) -> Array:
    """int32 (B,): one token per row, sampled after `top_k_top_p_filtering`."""
    scores_Bk, ids_Bk = top_k_top_p_filtering(scores_BV, config, temperature, top_p)
    # What `jax.random.categorical` draws, with the faster maximum.
    index_B = argmax(scores_Bk + jax.random.gumbel(key, scores_Bk.shape, scores_Bk.dtype))
    return index_B if ids_Bk is None else jnp.take_along_axis(ids_Bk, index_B[:, None], axis=1)[:, 0]


def sample_rows(scores_BV: Array, config: GenerationConfig, key_B: Array, step_B: Array, rows: RowSampling) -> Array:
    """int32 (B,): each row's token by its own settings: what `sample_token` chooses with them, or the greedy choice.

    What no row needs is not computed.
    """

    def sample(scores_V, key, step, temperature, top_p=1.0):
        return sample_token(scores_V[None], config, jax.random.fold_in(key, step), temperature, top_p)[0]

    is_sampled_B, has_top_p_B = rows.temperature_B > 0, (rows.temperature_B > 0) & (rows.top_p_B < 1)
    given = (scores_BV, key_B, step_B, jnp.where(is_sampled_B, rows.temperature_B, 1.0))

    def sampled():
        all_B = jax.vmap(sample)(*given)
        nucleus_B = jax.lax.cond(has_top_p_B.any(), lambda: jax.vmap(sample)(*given, rows.top_p_B), lambda: all_B)
        return jnp.where(has_top_p_B, nucleus_B, all_B)

    greedy_B = argmax(scores_BV)
    return jnp.where(is_sampled_B, jax.lax.cond(is_sampled_B.any(), sampled, lambda: greedy_B), greedy_B)


def choose_token(
    logits_BV: Array,
    seen_BV: Array | None,
    step: Array | int,
    config: GenerationConfig,
    key: Array | None,
    rows: RowSampling | None = None,
) -> tuple[Array, Array | None, Array]:
    """(tokens (B,), their log-probabilities (B,) with `config.output_logprobs`, else None, whether scores are finite).

    Greedy, or sampled. `step`: tokens generated so far, one number or (B, 1). `key`: one for the batch, or one for each
    row, (B,); the choice of a row with a key of its own does not depend on the other rows. `rows`: the settings of each
    row, with `config.row_sampling`.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    scores_BV = process_logits(logits_BV, seen_BV, step, config)
    if rows is not None:
        token_B = sample_rows(scores_BV, config, key, jnp.broadcast_to(jnp.reshape(step, -1), key.shape), rows)
    elif not config.do_sample:
        token_B = argmax(scores_BV)
    elif key.ndim:
        step_B = jnp.broadcast_to(jnp.reshape(step, -1), key.shape)

        def sample_row(scores_V, key, step):
            return sample_token(scores_V[None], config, jax.random.fold_in(key, step))[0]

        token_B = jax.vmap(sample_row)(scores_BV, key, step_B)
    else:
        token_B = sample_token(scores_BV, config, jax.random.fold_in(key, step))
    logprob_B = None
    if config.output_logprobs:
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    # The maximum is NaN where any score is; a greedy step computes it anyway.
    return token_B, logprob_B, jnp.isfinite(scores_BV.max(axis=-1))


def row_keys(seeds) -> Array:
    """A random key (B,) for each of some seeds."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def argmax(scores_BV: Array) -> Array:
    """Index of the first highest score of each row, as two reductions that XLA vectorizes on CPUs (6 times faster)."""
    ids_V = jnp.arange(scores_BV.shape[-1], dtype=jnp.int32)
    highest_B1 = scores_BV.max(axis=-1, keepdims=True)
    return jnp.where(scores_BV >= highest_B1, ids_V, ids_V[-1]).min(axis=-1)


def top_k(scores_BV: Array, k: int) -> tuple[Array, Array]:
    """The k highest scores of each row, descending, and their indices: equals `jax.lax.top_k`, faster on long rows.

    The k best are in the k blocks with the highest maxima, so only these blocks are searched. Equal scores are ordered
    by index, as in `jax.lax.top_k`.
    """
    rows, length = scores_BV.shape
    if length < 4 * TOP_K_BLOCK_SIZE * k:
        top_Bk, index_Bk = jax.lax.top_k(scores_BV, k)
    else:
        padding = ((0, 0), (0, -length % TOP_K_BLOCK_SIZE))
        blocks_BRC = jnp.pad(scores_BV, padding, constant_values=NEG_INF)
        blocks_BRC = blocks_BRC.reshape(rows, -1, TOP_K_BLOCK_SIZE)
        block_Bk = jnp.sort(jax.lax.top_k(blocks_BRC.max(axis=-1), k)[1], axis=-1)
        candidate_BC = gather_rows(blocks_BRC, block_Bk).reshape(rows, k * TOP_K_BLOCK_SIZE)
        top_Bk, index_Bk = jax.lax.top_k(candidate_BC, k)
        index_Bk = gather_rows(block_Bk, index_Bk // TOP_K_BLOCK_SIZE) * TOP_K_BLOCK_SIZE + index_Bk % TOP_K_BLOCK_SIZE
    # The barrier stops XLA from turning a sliced top-k into a full sort (50 times slower on a CPU).
    return jax.lax.optimization_barrier((top_Bk, index_Bk))


def gather_rows(tree, indices_BK: Array):
    """For every leaf (B, J, ...) of a tree: the entries `indices_BK` of axis 1, per prompt, as (B, K, ...)."""

    def row(leaf_J, index_K):
        return jnp.take(leaf_J, index_K, axis=0, mode="clip")

    return jax.tree.map(lambda leaf: jax.vmap(row)(leaf, indices_BK), tree)
