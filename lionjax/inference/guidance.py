# SPDX-License-Identifier: Apache-2.0
"""Contrastive search (arXiv 2202.06417) and MAGIC (arXiv 2205.02655): the next token by a score of k candidates.

Each step reads the k likeliest tokens in one pass over one cache. Their score is

    (1 - alpha) * probability  -  alpha * largest cosine to a state before  +  beta * softmax over the k of image match

with alpha the degeneration penalty and beta the weight of the image; without an image (or beta 0) it is contrastive
search, with alpha 0 as well greedy decoding. As in the released code, all steps run: a text ends at its first end token
afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.errors import check_ranges
from lionjax.core.types import VLM, Array, Batch, Cache, Params, UserError, pytree_dataclass
from lionjax.inference.sampling import require_finite, top_k

# For each row its candidate texts -> how well each matches the row's image, (B, K): cosines times CLIP's logit scale.
ImageScorer = Callable[[Sequence[Sequence[str]]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Settings of a search; the defaults are MAGIC's for COCO. Raises UserError for values out of their range.

    `max_text_tokens`: the image is compared with the text of at most so many last tokens, the candidate included.
    """

    max_new_tokens: int = 16
    num_candidates: int = 45
    degeneration_penalty: float = 0.1
    image_weight: float = 2.0
    max_text_tokens: int = 60

    def __post_init__(self):
        counts = dict.fromkeys(("max_new_tokens", "num_candidates", "max_text_tokens"), ">= 1")
        check_ranges(self, "guidance.", degeneration_penalty=">= 0 and <= 1", image_weight=">= 0", **counts)


MAGIC_COCO = GuidanceConfig()
MAGIC_FLICKR30K = GuidanceConfig(max_new_tokens=20, num_candidates=25)
MAGIC_STORIES = GuidanceConfig(100, num_candidates=5, degeneration_penalty=0.6, image_weight=0.15)
CONTRASTIVE_SEARCH = GuidanceConfig(128, num_candidates=5, degeneration_penalty=0.6, image_weight=0.0)


@dataclasses.dataclass(frozen=True)
class GuidedStep:
    """One step of a search, arrays (B, K) over the candidates in the order of their probability; `chosen_B` places.

    `image_score` is None without an image.
    """

    token_ids: np.ndarray
    confidence: np.ndarray
    penalty: np.ndarray
    image_score: np.ndarray | None
    score: np.ndarray
    chosen_B: np.ndarray

    @property
    def chosen_ids_B(self) -> np.ndarray:
        return np.take_along_axis(self.token_ids, self.chosen_B[:, None], axis=1)[:, 0]


@pytree_dataclass
class _Candidates:
    """The candidates of a step, read by the model but not in the cache, and the states before them."""

    token_BK: Array
    confidence_BK: Array
    penalty_BK: Array
    logits_BKV: Array
    unit_BKD: Array  # last hidden states divided by their norms
    key_value: object
    cache: Cache
    context: tuple[Array, Array, Array]  # unit states (B, S, D) of the tokens so far, their mask, the next free slot
    is_finite_B: Array


def guided_search(
    model: VLM,
    params: Params,
    batch: Batch,
    config: GuidanceConfig,
    scorer: ImageScorer | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Iterator[GuidedStep]:
    """Continue the prompts of a batch; yields `config.max_new_tokens` steps, whose `chosen_ids_B` are the tokens.

    `scorer` and `decode` (ids to text, with special tokens) are needed for an image weight above 0. The prompt is no
    part of the text that the image is compared with. Raises UserError where they are missing, for more candidates than
    words, and for non-finite logits.
    """
    if config.image_weight and (scorer is None or decode is None):
        raise UserError(
            "guidance.image_weight is above 0 but there is no image to compare with; give one or set it to 0"
        )
    vocab_size = model.info.vocab_size
    if vocab_size is not None and config.num_candidates > vocab_size:
        raise UserError(f"guidance.num_candidates is {config.num_candidates}; the model has only {vocab_size} words")
    found = _first_candidates(model, params, batch, config.max_new_tokens, config.num_candidates)
    texts: list[list[int]] = [[] for _ in range(len(found.token_BK))]
    for number in range(config.max_new_tokens):
        require_finite(found.is_finite_B)
        step = _score(found, texts, config, scorer, decode)
        yield step
        for text, token in zip(texts, step.chosen_ids_B.tolist()):
            text.append(token)
        if number + 1 < config.max_new_tokens:
            found = _next_candidates(model, params, found, step.chosen_B)


def _score(found: _Candidates, texts: list[list[int]], config: GuidanceConfig, scorer, decode) -> GuidedStep:
    """The scores of a step's candidates in float32, and the first of the best of each row."""
    token_BK, confidence_BK, penalty_BK = (
        np.asarray(leaf) for leaf in (found.token_BK, found.confidence_BK, found.penalty_BK)
    )
    alpha, image_BK = config.degeneration_penalty, None
    score_BK = (1 - alpha) * confidence_BK - alpha * penalty_BK
    if config.image_weight:
        candidates = [
            [decode([*text, token][-config.max_text_tokens :]) for token in tokens]
            for text, tokens in zip(texts, token_BK.tolist())
        ]
        match_BK = np.asarray(scorer(candidates), np.float32)
        if match_BK.shape != token_BK.shape:
            raise UserError(f"the image scores have shape {match_BK.shape}; give one for each of {token_BK.shape}")
        exp_BK = np.exp(match_BK - match_BK.max(axis=1, keepdims=True))
        image_BK = exp_BK / exp_BK.sum(axis=1, keepdims=True)
        score_BK = score_BK + config.image_weight * image_BK
    return GuidedStep(token_BK, confidence_BK, penalty_BK, image_BK, score_BK, score_BK.argmax(axis=1))


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "num_candidates"))
def _first_candidates(
    model: VLM, params: Params, batch: Batch, max_new_tokens: int, num_candidates: int
) -> _Candidates:
    logits_BV, state_BLD, cache = model.prefill_states(params, batch, max_new_tokens - 1)
    free = ((0, 0), (0, max_new_tokens - 1))
    context_BSD = jnp.pad(_unit(state_BLD), (*free, (0, 0)))
    valid_BS = jnp.pad(jnp.asarray(batch.prompt_mask_BL, bool), free)
    slot = jnp.asarray(state_BLD.shape[1], jnp.int32)
    return _candidates(model, params, logits_BV, cache, (context_BSD, valid_BS, slot), num_candidates)


@functools.partial(jax.jit, static_argnames=("model",))
def _next_candidates(model: VLM, params: Params, found: _Candidates, chosen_B: Array) -> _Candidates:
    """The candidates after the chosen ones, which become a part of the cache and the states before."""
    row_B = jnp.arange(len(chosen_B))
    context_BSD, valid_BS, slot = found.context
    context_BSD = context_BSD.at[:, slot].set(found.unit_BKD[row_B, chosen_B])
    context = (context_BSD, valid_BS.at[:, slot].set(True), slot + 1)
    cache = model.keep_candidate(found.cache, found.key_value, chosen_B)
    logits_BV = found.logits_BKV[row_B, chosen_B]
    return _candidates(model, params, logits_BV, cache, context, found.token_BK.shape[1])


def _candidates(model: VLM, params: Params, logits_BV, cache: Cache, context, num_candidates: int) -> _Candidates:
    logits_BV, (context_BSD, valid_BS, _) = logits_BV.astype(jnp.float32), context
    confidence_BK, token_BK = top_k(jax.nn.softmax(logits_BV, axis=-1), num_candidates)
    logits_BKV, state_BKD, key_value = model.extend_candidates(params, token_BK, cache)
    unit_BKD = _unit(state_BKD)
    cosine_BKS = jnp.einsum("BKD,BSD->BKS", unit_BKD, context_BSD, precision="highest")
    penalty_BK = jnp.where(valid_BS[:, None], cosine_BKS, -jnp.inf).max(axis=-1)
    is_finite_B = jnp.isfinite(logits_BV.max(axis=-1)) & jnp.isfinite(penalty_BK).all(axis=-1)
    proposed = (token_BK, confidence_BK, penalty_BK, logits_BKV, unit_BKD, key_value)
    return _Candidates(*proposed, cache, context, is_finite_B)


def _unit(state):
    """States in float32 divided by their norms."""
    state = state.astype(jnp.float32)
    return state / jnp.linalg.norm(state, axis=-1, keepdims=True)
