# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP: embeddings of images and texts, and how well each text fits each image.

`load` opens a run, a converted folder, or a released one: Hugging Face's, or OpenAI's file beside its merges. Texts are
cut to the tower's length and keep their end token. All embeddings have norm 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.convert.formats.clip import OPENAI_CLIP_FILES
from lionjax.convert.formats.image_settings import read_image_settings
from lionjax.core.types import Params, UserError
from lionjax.data.image_fit import ImageFit
from lionjax.data.images import require_image_list, require_size, to_pil_image
from lionjax.data.processor_config import CLIP_MEAN, CLIP_STD
from lionjax.data.tokenizer import Tokenizer
from lionjax.inference import expert_folder, loading
from lionjax.inference.engine import InferenceEngine, round_up_to_bucket
from lionjax.inference.guidance import ImageScorer
from lionjax.inference.packed_texts import pack
from lionjax.inference.sampling import require_finite
from lionjax.models.language.clip_text import pooled_position
from lionjax.models.vlm.clip import Clip

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # a few sizes limit the number of compilations
TEXT_BATCH_SIZES = (1, 4, 16, 48, 64, 128, 256, 512)  # MAGIC has 45 candidates, ZeroCap 512
PACKED_BATCH_SIZES = (1, 2, 3, 4, 6, 8)  # rows of texts that begin alike
TEXT_LENGTHS = (16, 32, 48, 64)
MIN_SIDE = 2  # pixels
CONTENT = "the weights of a CLIP or SigLIP with both towers, and its tokenizer"


@dataclasses.dataclass(frozen=True)
class EncoderImages:
    """How images are resized and normalized."""

    fit: ImageFit = ImageFit("shortest_edge")
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The texts of one image by falling fit: their places among the given ones, cosines and probabilities.

    Probabilities are a softmax over the texts, or with SigLIP's objective each text's own.
    """

    order: tuple[int, ...]
    texts: tuple[str, ...]
    cosines: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class DualEncoder:
    """A CLIP or SigLIP with its parameters, tokenizer and image settings."""

    config: Clip
    params: Params
    tokenizer: Tokenizer
    images: EncoderImages = EncoderImages()

    @functools.cached_property
    def logit_scale(self) -> float:
        """The factor of the cosines in the logits."""
        return math.exp(float(np.asarray(self.params["logit_scale"], np.float32)))

    @functools.cached_property
    def logit_bias(self) -> float:
        """What SigLIP adds to the scaled cosines; 0 in CLIP."""
        is_sigmoid = self.config.objective == "sigmoid"
        return float(np.asarray(self.params["logit_bias"], np.float32)) if is_sigmoid else 0.0

    def embed_images(self, images: Sequence[object]) -> np.ndarray:
        """Embeddings (N, E) in float32 of images (paths, PIL images or uint8 arrays).

        Raises UserError for a single image, and for one with a side of one pixel.
        """
        image_NE = self.image_projections(images)
        return image_NE / np.maximum(np.linalg.norm(image_NE, axis=1, keepdims=True), 1e-12)

    def image_projections(self, images: Sequence[object]) -> np.ndarray:
        """As `embed_images`, not divided by their norms: what ZeroCap adds and subtracts."""
        require_image_list(images)
        rows = [np.zeros((0, self.config.embed_dim), np.float32)]
        for start, size in _batches(len(images), BATCH_SIZES):
            pixels = np.stack([self.preprocess(image) for image in images[start : start + size]])
            pixels, settings = _padded(pixels, BATCH_SIZES), (self.images.mean, self.images.std)
            rows.append(self._finite(_project_images(self.config, self.params, *settings, pixels), size))
        return np.concatenate(rows)

    def embed_texts(self, texts: Iterable[str], allow_empty: bool = False) -> np.ndarray:
        """Embeddings (N, E) in float32 of texts.

        Raises UserError for a single text, and for one without words, unless `allow_empty`: a search over texts may
        begin with one.
        """
        if isinstance(texts, str):
            raise UserError(f"texts is the single text {texts!r}; give a list of texts")
        ids_NL = self.encode(list(texts), allow_empty)
        rows = [np.zeros((0, self.config.embed_dim), np.float32)]
        for start, size in _batches(len(ids_NL), TEXT_BATCH_SIZES):
            ids_BL = ids_NL[start : start + size]
            ids_BL = _padded(ids_BL, TEXT_BATCH_SIZES)
            rows.append(self._finite(_embed_texts(self.config, self.params, ids_BL), size))
        return np.concatenate(rows)

    def embed_candidates(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed_texts`, of texts that begin alike, such as those with the candidates for a next word.

        A causal text tower reads each shared beginning once. Texts may have no words.
        """
        if not self.config.reads_packed_texts:
            return self.embed_texts(texts, allow_empty=True)
        ids_NL = self.encode(list(texts), allow_empty=True)
        last_N = np.asarray(pooled_position(self.config.text, ids_NL))
        packed = pack([ids[: last + 1].tolist() for ids, last in zip(ids_NL, last_N)], self.config.text.eos_token_id)
        fields = (packed.ids_BL, packed.position_BL, packed.segment_BL, packed.beginning_BL)
        rows = []
        for start, size in _batches(len(packed.ids_BL), PACKED_BATCH_SIZES):
            batch = [_padded(field[start : start + size], PACKED_BATCH_SIZES) for field in fields]
            rows.append(np.asarray(_embed_packed_texts(self.config, self.params, *batch))[:size])
        text_NE = np.concatenate(rows)[packed.row_N, packed.column_N]
        return self._finite(text_NE, len(text_NE))

    def logits(self, images: Sequence[object], texts: Iterable[str]) -> np.ndarray:
        """Logits (N, M) in float32 of N images and M texts: scaled cosines, with SigLIP's bias."""
        return self.logit_scale * (self.embed_images(images) @ self.embed_texts(texts).T) + self.logit_bias

    def rank(self, images: Sequence[object], texts: Sequence[str]) -> list[Ranking]:
        """The texts by how well they fit each image. Raises UserError where there are none, and as `embed_*`."""
        texts = texts if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("there are no texts to rank; give at least one")
        image_NE, text_ME = self.embed_images(images), self.embed_texts(texts)
        results = []
        for cosine_M in image_NE @ text_ME.T:
            logits_M = self.logit_scale * cosine_M.astype(np.float64) + self.logit_bias
            probs_M = np.exp(logits_M - np.logaddexp.reduce(logits_M))
            if self.config.objective == "sigmoid":
                probs_M = np.exp(-np.logaddexp(0, -logits_M))
            order = np.argsort(-cosine_M, kind="stable")
            columns = ([texts[k] for k in order], cosine_M[order].tolist(), probs_M[order].tolist())
            results.append(Ranking(tuple(order.tolist()), *map(tuple, columns)))
        return results

    def scorer(self, images: Sequence[object]) -> ImageScorer:
        """For rows of candidate texts, one row for each of `images`: scaled cosines (B, K) with their row's image.

        They are what MAGIC takes (`guidance.guided_search`). Texts may have no words.
        """
        return self.embedding_scorer(self.embed_images(images))

    def embedding_scorer(self, image_BE: np.ndarray) -> ImageScorer:
        """As `scorer`, of embeddings (B, E) of norm 1."""

        def score(rows: Sequence[Sequence[str]]) -> np.ndarray:
            if len(rows) != len(image_BE):
                raise UserError(f"{len(rows)} rows of texts were given for {len(image_BE)} images; give one for each")
            text_NE = self.embed_candidates([text for row in rows for text in row])
            text_BKE = text_NE.reshape(len(rows), -1, text_NE.shape[1])
            return self.logit_scale * np.einsum("BE,BKE->BK", image_BE, text_BKE)

        return score

    def preprocess(self, image: object) -> np.ndarray:
        """An image as uint8 (side, side, 3) of the image tower's size."""
        pil_image = require_size(to_pil_image(image), MIN_SIDE, "the image tower")
        return self.images.fit.apply(pil_image, self.config.vision.image_size)

    def encode(self, texts: Sequence[str], allow_empty: bool = False) -> np.ndarray:
        """Ids (N, L) of texts, each with its start and end token, cut to the text tower's length.

        Raises UserError for a text without words, unless `allow_empty`.
        """
        c, tokens = self.config.text, self.tokenizer
        rows = []
        for text in texts:
            if not isinstance(text, str) or not (text.strip() or allow_empty):
                raise UserError(f"a text is {text!r}; give a text with at least one word")
            rows.append(tokens.truncate_and_add_special(tokens.encode(text, parse_special=True), c.max_positions))
        longest = max(map(len, rows), default=1)
        is_fixed = c.pooling == "last"
        length = c.max_positions if is_fixed else round_up_to_bucket(longest, TEXT_LENGTHS, c.max_positions)
        ids_NL = np.full((len(rows), length), tokens.pad_id if is_fixed else c.eos_token_id, np.int32)
        for row, ids in zip(ids_NL, rows):
            row[: len(ids)] = ids
        return ids_NL

    def _finite(self, embedding_BE: jax.Array, count: int) -> np.ndarray:
        embedding_NE = np.asarray(embedding_BE)[:count]
        require_finite(np.isfinite(embedding_NE).all(axis=1), "embeddings")
        return embedding_NE


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _project_images(config: Clip, params: Params, mean, std, pixels_BHWC) -> jax.Array:
    image_BHWC = (pixels_BHWC.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    return config.image_projections(params, image_BHWC)


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(config: Clip, params: Params, ids_BL) -> jax.Array:
    return config.embed_texts(params, ids_BL)


@functools.partial(jax.jit, static_argnums=0)
def _embed_packed_texts(config: Clip, params: Params, ids_BL, position_BL, segment_BL, beginning_BL) -> jax.Array:
    is_own_BLL = segment_BL[:, :, None] == segment_BL[:, None]
    is_beginning_BLL = beginning_BL[:, :, None] == segment_BL[:, None]
    is_past_BLL = position_BL[:, :, None] >= position_BL[:, None]
    mask_BLL = (is_own_BLL | is_beginning_BLL) & is_past_BLL
    return config.embed_packed_texts(params, ids_BL, position_BL, mask_BLL)


def _batches(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, size) of batches of at most the largest of `sizes`."""
    return [(start, min(sizes[-1], count - start)) for start in range(0, count, sizes[-1])]


def _padded(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The rows with the last one repeated up to one of `sizes`."""
    size = round_up_to_bucket(len(rows), sizes, sizes[-1])
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def load(folder: str | Path) -> DualEncoder:
    """The CLIP or SigLIP of a folder: a run, converted weights, or released ones with their tokenizer.

    Raises UserError if weights or tokenizer are missing or of another model.
    """
    folder = expert_folder.check_folder(folder, CONTENT)
    if expert_folder.holds_experiment(folder):
        return from_engine(loading.load(folder).engine, str(folder))
    config, params, files = expert_folder.load_weights(folder, Clip, CONTENT, OPENAI_CLIP_FILES)
    tokens = expert_folder.load_tokenizer(folder, "those of its release", from_files=True)
    check_tokenizer(tokens, config)
    return DualEncoder(config, jax.device_put(params), tokens, read_images(files, config))


def from_engine(engine: InferenceEngine, name: str = "the model") -> DualEncoder:
    """The encoder that a run trained, with the image settings of its data. Raises UserError for another model."""
    if not engine.model.info.is_dual_encoder:
        raise UserError(
            f"{name} is a {type(engine.model).__name__}; give a folder with a CLIP or SigLIP of both towers"
        )
    c = engine.processor.config
    images = EncoderImages(c.image_fit, tuple(c.image_mean), tuple(c.image_std))
    config, tokens = engine.model, engine.processor.tokenizer
    check_tokenizer(tokens, config)
    return DualEncoder(config, engine.params, tokens, images)


def check_tokenizer(tokens: Tokenizer, config: Clip) -> None:
    """Raise UserError where a tokenizer is not that of the text tower: too many tokens, or another start or end."""
    c = config.text
    largest = max(tokens.backend.get_vocab(with_added_tokens=True).values())
    if largest >= c.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the text tower's table has {c.vocab_size} rows; use the "
            "tokenizer that belongs to these weights"
        )
    own, expected = [*tokens.bos_ids, tokens.eos_id], [c.bos_token_id, c.eos_token_id]
    if c.pooling != "last" and own != (expected := [token for token in expected if token is not None]):
        raise UserError(
            f"the tokenizer begins and ends a text with the ids {own}, but the text tower was trained with {expected}; "
            "use the tokenizer that belongs to these weights"
        )


def read_images(folder: Path, config: Clip) -> EncoderImages:
    """The image settings of a folder's preprocessor files; without them CLIP's, or SigLIP's as the model's kind."""
    fields, fit = read_image_settings(folder, config.vision.image_size)
    if fields:
        return EncoderImages(ImageFit(**fit), fields["image_mean"], fields["image_std"])
    half = (0.5, 0.5, 0.5)
    return EncoderImages(ImageFit(), half, half) if config.vision.attention_pool else EncoderImages()
