# SPDX-License-Identifier: Apache-2.0
"""ZeroCap (arXiv 2111.14447): zero-shot captions by a frozen language model that CLIP guides.

At each step the keys and values of the context (the paper's context cache) are shifted by a few gradient steps, so that
the likeliest next tokens make texts that match the image (CLIP loss, `image_weight`), while the distribution stays near
the unshifted one (cross entropy, `fluency_weight`). The next tokens of the beams are chosen from both distributions,
after edits of the logits.

Shapes are fixed: each function is compiled once for the first step, which has one row for each image, and once for the
others. Between them the texts of the candidates are embedded on the host; a text is embedded only once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.errors import check_choices, check_ranges
from lionjax.core.types import VLM, Array, Batch, Cache, Params, UserError, pytree_dataclass
from lionjax.inference.sampling import require_finite, top_k

EmbedTexts = Callable[[Sequence[str]], np.ndarray]  # texts -> embeddings (N, E); their norms do not matter
# (context with the prompt, candidates for its next token) -> the text with each candidate.
CandidateTexts = Callable[[Sequence[int], Sequence[int]], Sequence[str]]
NORMALIZATIONS = ("row", "batch")


@dataclasses.dataclass(frozen=True)
class ZeroCapConfig:
    """Settings of ZeroCap; the defaults are the released ones. Raises UserError for values out of their range.

    - `num_candidates`: the likeliest tokens whose texts are compared with the image.
    - `temperature`: of the softmax over their cosines, which is the target of the image loss.
    - `step_size`, `norm_power`: a shift changes by step_size * gradient / norm ** norm_power.
    - `fusion`: the next token is drawn from p ** fusion * unshifted ** (1 - fusion).
    - `normalization`: "row": each beam's distribution sums to 1. "batch": all beams' together do, as in the released
      code, where a running beam loses about log(beams) at each step after the first and a finished one nothing.
    - `repetition_penalty` divides positive logits of the last `repetition_window` tokens and multiplies negative ones,
      `first_end_penalty` those of the end tokens at the first step, `forbidden_penalty` those of `forbidden_token_ids`;
      `end_factor` multiplies positive logits of the end tokens at later steps and divides negative ones.
    - `finished_token_id`: what a beam that has ended goes on with, at no cost.
    """

    max_new_tokens: int = 15
    num_beams: int = 5
    num_iterations: int = 5
    num_candidates: int = 512
    temperature: float = 0.01
    image_weight: float = 1.0
    fluency_weight: float = 0.2
    step_size: float = 0.3
    norm_power: float = 0.9
    fusion: float = 0.99
    normalization: str = "row"
    repetition_penalty: float = 1.0
    repetition_window: int = 4
    end_token_ids: tuple[int, ...] = ()
    first_end_penalty: float = 1.6
    end_factor: float = 1.01
    forbidden_token_ids: tuple[int, ...] = ()
    forbidden_penalty: float = 20.0
    finished_token_id: int = 0

    def __post_init__(self):
        check_choices(self, normalization=NORMALIZATIONS)
        counts = ("max_new_tokens", "num_beams", "num_candidates", "repetition_window")
        weights = ("image_weight", "fluency_weight", "step_size", "norm_power", "num_iterations")
        factors = ("temperature", "repetition_penalty", "first_end_penalty", "end_factor", "forbidden_penalty")
        ranges = dict.fromkeys(counts, ">= 1") | dict.fromkeys(weights, ">= 0") | dict.fromkeys(factors, "> 0")
        check_ranges(self, "zerocap.", fusion=">= 0 and <= 1", **ranges)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """One gradient step: what it was computed from, its losses (R,) with their weights, and the new shift (k, v)."""

    token_ids_RK: Array
    target_RK: np.ndarray
    log_prob_RV: Array
    image_loss_R: Array
    fluency_loss_R: Array
    shift: tuple[Array, Array]  # of keys and values, each (layers, R, heads, slots, head size)


@dataclasses.dataclass(frozen=True)
class ZeroCapStep:
    """One token. R rows: one for each image at the first step, then `num_beams` for each.

    `contexts`: ids of each row before the step, with the prompt. `log_prob_RV`: the distribution that the beams choose
    from, made of the shifted logits, edited, and the unshifted ones. `beams`: after the choice.
    """

    contexts: Sequence[tuple[int, ...]]
    unshifted_RV: Array  # log-probabilities
    iterations: Sequence[Iteration]
    logits_RV: Array
    edited_logits_RV: Array
    log_prob_RV: Array
    beams: Beams


@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of all images, R = images * num_beams rows, in the order of the search.

    `length_R`: tokens up to and including the end token; `ids_RM` goes on behind it. `score_R`: sum of their
    log-probabilities.
    """

    ids_RM: np.ndarray
    length_R: np.ndarray
    score_R: np.ndarray
    done_R: np.ndarray

    @property
    def mean_log_prob_R(self) -> np.ndarray:
        return self.score_R / self.length_R


@dataclasses.dataclass(frozen=True)
class Caption:
    """A finished beam: `similarity` is the cosine of its text, without the prompt, and the image."""

    token_ids: tuple[int, ...]
    text: str
    mean_log_prob: float
    similarity: float


@pytree_dataclass
class _State:
    """The search between two tokens; the model has read all tokens but the last of each row."""

    cache: Cache
    token_R: Array
    length_R: Array
    score_R: Array
    done_R: Array


def combine_images(image_NE: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Visual-semantic arithmetic of images: the weighted sum (E,) of CLIP's embeddings, not divided by their norms.

    Embeddings of texts can be added the same way. Raises UserError where nothing is left.
    """
    image_NE = np.asarray(image_NE, np.float32)
    if len(image_NE) != len(weights):
        raise UserError(f"{len(weights)} weights were given for {len(image_NE)} images; give one each")
    combined_E = np.asarray(weights, np.float32) @ image_NE
    if not np.linalg.norm(combined_E) > 1e-6 * np.linalg.norm(image_NE):
        raise UserError("the sum of the images is zero; subtract another image than was added")
    return combined_E


def zerocap(
    model: VLM,
    params: Params,
    batch: Batch,
    image_BE: np.ndarray,
    embed_texts: EmbedTexts,
    candidate_texts: CandidateTexts,
    config: ZeroCapConfig,
) -> Iterator[ZeroCapStep]:
    """Continue the prompts of a batch by texts that match the images with the embeddings `image_BE`.

    Yields at most `config.max_new_tokens` steps and stops when all beams have ended; `rank_captions` makes captions of
    the last step's beams. Raises UserError for more candidates or beams than words, and for non-finite numbers.
    """
    _require_words(config, model.info.vocab_size)
    similarities = _Similarities(image_BE, embed_texts, candidate_texts)
    state = _start(model, params, batch, config.max_new_tokens)
    mask_BL = np.asarray(batch.prompt_mask_BL, bool)
    prompts = [tuple(np.asarray(ids)[mask].tolist()) for ids, mask in zip(np.asarray(batch.prompt_BL), mask_BL)]
    contexts, lengths = list(prompts), [len(prompt) for prompt in prompts]
    for number in range(config.max_new_tokens):
        logits_RV, unshifted_RV, candidates, cache, shift = _read(model, params, state, config.num_candidates)
        images = np.arange(len(contexts)) // (len(contexts) // len(prompts))
        log_prob_RV, iterations = unshifted_RV, []
        for _ in range(config.num_iterations):
            target_RK = similarities.targets(images, contexts, np.asarray(candidates), config.temperature)
            given = (candidates, target_RK, log_prob_RV)
            logits_RV, log_prob_RV, candidates, losses, shift = _shift(
                model, params, state, shift, unshifted_RV, *given[:2], _rates(config)
            )
            iterations.append(Iteration(*given, *losses, shift))
        edits = _edits(config, contexts, number, unshifted_RV.shape[1])
        edited_RV, log_prob_RV = _fuse(logits_RV, unshifted_RV, *edits, config.fusion, _groups(config, len(prompts)))
        require_finite(np.isfinite(np.asarray(log_prob_RV[:, 0])), "probabilities")
        state, parent_R = _choose(
            dataclasses.replace(state, cache=cache), log_prob_RV, len(prompts), _end_arrays(config), config.num_beams
        )
        before, tokens = contexts, np.asarray(state.token_R).tolist()
        contexts = [(*before[parent], token) for parent, token in zip(np.asarray(parent_R).tolist(), tokens)]
        images = np.arange(len(contexts)) // config.num_beams
        ids_RM = np.array([context[lengths[image] :] for context, image in zip(contexts, images)])
        beams = Beams(ids_RM, *(np.asarray(leaf) for leaf in (state.length_R, state.score_R, state.done_R)))
        yield ZeroCapStep(before, unshifted_RV, iterations, logits_RV, edited_RV, log_prob_RV, beams)
        if beams.done_R.all():
            return


def rank_captions(
    beams: Beams, image_BE: np.ndarray, embed_texts: EmbedTexts, decode: Callable[[Sequence[int]], str]
) -> list[list[Caption]]:
    """The captions of each image, the one with the largest mean log-probability first.

    The released code keeps this one and the one with the largest similarity.
    """
    image_BE = _unit(image_BE)
    ids = [tuple(row[:length].tolist()) for row, length in zip(beams.ids_RM, beams.length_R)]
    texts = [decode(row) for row in ids]
    text_RE = _unit(embed_texts(texts))
    image_RE = np.repeat(image_BE, len(texts) // len(image_BE), axis=0)
    cosine_R = np.einsum("RE,RE->R", text_RE, image_RE)
    found = [Caption(*fields) for fields in zip(ids, texts, beams.mean_log_prob_R.tolist(), cosine_R.tolist())]
    width = len(found) // len(image_BE)
    groups = [found[place : place + width] for place in range(0, len(found), width)]
    return [sorted(group, key=lambda caption: -caption.mean_log_prob) for group in groups]


class _Similarities:
    """Cosines of images and of texts with candidates; each text is embedded once in a search."""

    def __init__(self, image_BE: np.ndarray, embed_texts: EmbedTexts, candidate_texts: CandidateTexts):
        self.image_BE = _unit(image_BE)
        self.embed_texts, self.candidate_texts = embed_texts, candidate_texts
        self.cosines: dict[tuple[int, tuple[int, ...]], dict[int, float]] = {}

    def targets(self, images, contexts, token_ids_RK: np.ndarray, temperature: float) -> np.ndarray:
        """Softmax (R, K) over the cosines of each row's candidates, divided by the temperature."""
        rows = list(zip(images.tolist(), contexts))
        new = {row: [] for row in rows}
        for row, tokens in zip(rows, token_ids_RK.tolist()):
            known = self.cosines.setdefault(row, {})
            new[row] += [token for token in dict.fromkeys(tokens) if token not in known and token not in new[row]]
        self._embed({row: tokens for row, tokens in new.items() if tokens})
        cosine_RK = np.array(
            [[self.cosines[row][token] for token in tokens] for row, tokens in zip(rows, token_ids_RK.tolist())],
            np.float32,
        )
        exp_RK = np.exp((cosine_RK - cosine_RK.max(axis=1, keepdims=True)) / temperature)
        return exp_RK / exp_RK.sum(axis=1, keepdims=True)

    def _embed(self, new: dict) -> None:
        """Embed the texts of new candidates, all in one batch."""
        if not new:
            return
        texts = {row: self.candidate_texts(row[1], tokens) for row, tokens in new.items()}
        places = {text: place for place, text in enumerate(dict.fromkeys(t for some in texts.values() for t in some))}
        text_NE = np.asarray(self.embed_texts(list(places)), np.float32)
        if text_NE.shape != (len(places), self.image_BE.shape[1]):
            raise UserError(
                f"the embeddings of {len(places)} texts have shape {text_NE.shape}; those of the images have "
                f"{self.image_BE.shape[1]} numbers"
            )
        text_NE = _unit(text_NE)
        for (image, context), tokens in new.items():
            row_NE = text_NE[[places[text] for text in texts[image, context]]]
            cosine_N = row_NE @ self.image_BE[image]
            self.cosines[image, context] |= dict(zip(tokens, cosine_N.tolist()))


def _require_words(config: ZeroCapConfig, vocab_size: int | None) -> None:
    for name in ("num_candidates", "num_beams"):
        if vocab_size is not None and getattr(config, name) > vocab_size:
            raise UserError(f"zerocap.{name} is {getattr(config, name)}; the model has only {vocab_size} words")
    for name in ("end_token_ids", "forbidden_token_ids"):
        outside = [i for i in getattr(config, name) if vocab_size is not None and not 0 <= i < vocab_size]
        if outside:
            raise UserError(f"zerocap.{name} holds {outside[0]}; the model's words are 0 to {vocab_size - 1}")


def _rates(config: ZeroCapConfig) -> dict[str, float]:
    return {name: getattr(config, name) for name in ("image_weight", "fluency_weight", "step_size", "norm_power")}


def _groups(config: ZeroCapConfig, num_images: int) -> int | None:
    """The number of parts of the batch whose probabilities sum to 1; None: each row."""
    return num_images if config.normalization == "batch" else None


def _end_arrays(config: ZeroCapConfig) -> tuple[np.ndarray, np.ndarray]:
    return np.array(config.end_token_ids, np.int32), np.array(config.finished_token_id, np.int32)


def _edits(config: ZeroCapConfig, contexts, number: int, vocab_size: int):
    """Masks of logits to edit, (R, V) or (V,), and the factors that multiply positive ones, in their order."""
    repeated_RV = np.zeros((len(contexts), vocab_size), bool)
    for row, context in enumerate(contexts):
        repeated_RV[row, list(context[-config.repetition_window :])] = True
    end_V, forbidden_V = np.zeros((2, vocab_size), bool)
    end_V[list(config.end_token_ids)] = True
    forbidden_V[list(config.forbidden_token_ids)] = True
    end_factor = config.end_factor if number else 1 / config.first_end_penalty
    factors = np.array([1 / config.repetition_penalty, end_factor, 1 / config.forbidden_penalty], np.float32)
    return (repeated_RV, end_V, forbidden_V), factors


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _start(model: VLM, params: Params, batch: Batch, max_new_tokens: int) -> _State:
    """The prompts but their last tokens in a cache."""
    mask_BL = jnp.asarray(batch.prompt_mask_BL, bool)
    is_last_BL = mask_BL & (mask_BL[:, ::-1].cumsum(axis=1)[:, ::-1] == 1)
    read = dataclasses.replace(batch, prompt_mask_BL=mask_BL & ~is_last_BL)
    _, cache = model.prefill(params, read, max_new_tokens)
    token_B = (batch.prompt_BL * is_last_BL).sum(axis=1).astype(jnp.int32)
    zeros_B = jnp.zeros(len(token_B), jnp.int32)
    return _State(cache, token_B, zeros_B, zeros_B.astype(jnp.float32), zeros_B.astype(bool))


@functools.partial(jax.jit, static_argnames=("model", "num_candidates"))
def _read(model: VLM, params: Params, state: _State, num_candidates: int):
    """Unshifted logits and log-probabilities (R, V), the likeliest tokens, the cache with the last token, no shift."""
    logits_RV, cache = model.extend(params, state.token_R, state.cache)
    shift = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model.cached_context(state.cache))
    return *_likeliest(logits_RV, num_candidates), cache, shift


def _likeliest(logits_RV: Array, num_candidates: int) -> tuple[Array, Array, Array]:
    """Logits in float32, log-probabilities, and the ids of the likeliest tokens."""
    logits_RV = logits_RV.astype(jnp.float32)
    log_prob_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    return logits_RV, log_prob_RV, top_k(log_prob_RV, num_candidates)[1]


@functools.partial(jax.jit, static_argnames=("model",))
def _shift(model: VLM, params: Params, state: _State, shift, unshifted_RV, token_ids_RK, target_RK, rates):
    """One gradient step on the shift of keys and values.

    Returns logits, log-probabilities and likeliest tokens with the new shift, the losses before, and the new shift.
    """
    context = model.cached_context(state.cache)

    def logits_of(shift):
        cache = model.with_context(state.cache, jax.tree.map(jnp.add, context, shift))
        return model.extend(params, state.token_R, cache)[0].astype(jnp.float32)

    def loss(shift):
        log_prob_RV = jax.nn.log_softmax(logits_of(shift), axis=-1)
        candidate_RK = jnp.take_along_axis(log_prob_RV, token_ids_RK, axis=1)
        image_R = -rates["image_weight"] * (target_RK * candidate_RK).sum(axis=1)
        fluency_R = rates["fluency_weight"] * (jnp.exp(log_prob_RV) * (log_prob_RV - unshifted_RV)).sum(axis=1)
        return (image_R + fluency_R).sum(), (image_R, fluency_R)

    grads, losses = jax.grad(loss, has_aux=True)(shift)

    def moved(shift, grad):
        norm = jnp.sqrt(jnp.square(grad).sum(axis=(2, 3, 4), keepdims=True))  # of one layer of one row
        return shift - rates["step_size"] * grad / (norm + 1e-15) ** rates["norm_power"]

    shift = jax.tree.map(moved, shift, grads)
    return *_likeliest(logits_of(shift), token_ids_RK.shape[1]), losses, shift


@functools.partial(jax.jit, static_argnames=("num_groups",))
def _fuse(logits_RV, unshifted_RV, masks, factors, fusion, num_groups: int | None):
    """Edited logits, and log-probabilities of both distributions together."""
    edited_RV = logits_RV
    for mask, factor in zip(masks, factors):
        scaled_RV = jnp.where(edited_RV > 0, edited_RV * factor, edited_RV / factor)
        edited_RV = jnp.where(mask, scaled_RV, edited_RV)
    log_prob_RV = fusion * jax.nn.log_softmax(edited_RV, axis=-1) + (1 - fusion) * unshifted_RV
    grouped = log_prob_RV.reshape(num_groups or len(log_prob_RV), -1)
    return edited_RV, jax.nn.log_softmax(grouped, axis=-1).reshape(log_prob_RV.shape)


@functools.partial(jax.jit, static_argnames=("num_images", "num_beams"))
def _choose(state: _State, log_prob_RV, num_images: int, ends, num_beams: int) -> tuple[_State, Array]:
    """The best continuations of each image by mean log-probability, and the row that each continues.

    A beam that has ended goes on with one token at no cost, and its length stays.
    """
    end_ids, finished_id = ends
    vocab_size = log_prob_RV.shape[1]
    finished_V = jnp.where(jnp.arange(vocab_size) == finished_id, 0.0, -jnp.inf)
    total_RV = state.score_R[:, None] + jnp.where(state.done_R[:, None], finished_V, log_prob_RV)
    length_R = state.length_R + ~state.done_R
    mean_BJ = (total_RV / length_R[:, None]).reshape(num_images, -1)
    mean_BK, index_BK = top_k(mean_BJ, num_beams)
    width = len(length_R) // num_images
    parent_R = (jnp.arange(num_images)[:, None] * width + index_BK // vocab_size).reshape(-1)
    token_R = (index_BK % vocab_size).reshape(-1).astype(jnp.int32)
    length_R = length_R[parent_R]
    done_R = state.done_R[parent_R] | (token_R[:, None] == end_ids).any(axis=1)
    cache = state.cache
    parts = (cache.generated, cache.static, cache.prompt)
    generated, static, prompt = jax.tree.map(lambda leaf: jnp.take(leaf, parent_R, axis=1), parts)
    cache = Cache(generated, static, cache.step, prompt)
    return _State(cache, token_R, length_R, mean_BK.reshape(-1) * length_R, done_R), parent_R


def _unit(rows: np.ndarray) -> np.ndarray:
    """Embeddings in float32 divided by their norms."""
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
