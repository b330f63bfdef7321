# SPDX-License-Identifier: Apache-2.0
"""BLIP-2's first stage: a Q-Former learns what of a picture belongs to a text, without any language model (2301.12597).

Three losses in one pass: pictures find their texts among those of the whole batch (contrast), a true pair is told from
one that looks alike (matching), and the text is written from what the queries saw (captioning).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import VLM, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import EVA_VIT_G, ViT, ViTConfig
from lionjax.nn.attention import causal_mask, key_padding_mask
from lionjax.nn.layers import Dense, LayerNorm, dense_weight_map, gelu, norm_weight_map, split_key
from lionjax.nn.losses import label_smoothed_cross_entropy

SELF_PAIR_LOGIT = -10000.0  # what a pair's own place in the batch scores where others are drawn


@renamed_fields(
    vision_eps="vision_norm_eps",
    shared="embed_dim",
    smoothing="label_smoothing",
    start_token="cls_token_id",
    write_token="decoder_start_token_id",
)
@dataclasses.dataclass(frozen=True)
class Blip2Stage1(VLM):
    """The stage by its parts' sizes; the defaults are the released ones.

    Texts are the batch's targets in BERT's words, closed by `[SEP]`; `start_token` (`[CLS]`) is put before them, and
    `write_token` (`[DEC]`) where they are to be written. `smoothing`: of the contrast's and the captions' labels.
    """

    vision: ViTConfig = EVA_VIT_G
    qformer: QFormerConfig = QFormerConfig()
    vision_norm_eps: float = 1e-5
    embed_dim: int = 256  # width in which pictures and texts are compared
    temperature: float = 0.07
    label_smoothing: float = 0.1
    cls_token_id: int = 101
    decoder_start_token_id: int = 30522
    dtype: str = "float32"  # of the computation

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(end_token=102, image_size=self.vision.image_size)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part."""
        return Blip2Stage1Module(self).init(key, batch, None)["params"]

    def _apply(self, params: Params, method: Callable, *args):
        return Blip2Stage1Module(self).apply({"params": params}, *args, method=method)

    def extract_features(self, params: Params, batch: Batch):
        """The frozen tower's output (B, 1 + P, D), with the class token."""
        return self._apply(params, Blip2Stage1Module.encode_image, batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """The sum of the three losses. Without a key the pairs that look most alike are those to be told apart."""
        return self._apply(params, Blip2Stage1Module.__call__, batch, key)

    def similarity(self, params: Params, batch: Batch):
        """How alike each picture and each text are, the best of all queries: (B, B), pictures by texts, in -1..1."""
        return self._apply(params, Blip2Stage1Module.similarity, batch)

    def itm_logits(self, params: Params, batch: Batch):
        """Whether each picture and its text belong together: logits (B, 2), the second for yes."""
        return self._apply(params, Blip2Stage1Module.itm_logits, batch)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Read the pictures; what is written then sees the queries' keys and values. There is no prompt."""
        return self._apply(params, Blip2Stage1Module.prefill, batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row."""
        return self._apply(params, Blip2Stage1Module.extend, token_B, cache)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of LAVIS's blip2_pretrained.pth."""
        words, head = "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions."
        rows = with_prefix("Qformer.bert.", "qformer/", qformer.lavis_weight_map(self.qformer))
        return (
            *with_prefix("visual_encoder.", "vision/", vit.lavis_weight_map(self.vision)),
            *norm_weight_map("ln_vision", "vision_norm"),
            *with_prefix("", "qformer/", qformer.query_tokens_weight_map(self.qformer)),
            *(
                dataclasses.replace(row, tied_keys=(f"{head}decoder.weight",)) if row.torch == words else row
                for row in rows
            ),
            *dense_weight_map(f"{head}transform.dense", "word_dense"),
            *norm_weight_map(f"{head}transform.LayerNorm", "word_norm"),
            WeightMapping(f"{head}bias", "word_bias", tied_keys=(f"{head}decoder.bias",)),
            *dense_weight_map("vision_proj", "picture_projection"),
            *dense_weight_map("text_proj", "text_projection"),
            *dense_weight_map("itm_head", "match_head"),
            WeightMapping("temp", "temperature"),
        )


class Blip2Stage1Module(nn.Module):
    c: Blip2Stage1

    def setup(self):
        c = self.c
        width = c.qformer.width
        self.vision = ViT(c.vision)
        self.vision_norm = LayerNorm(c.vision.width, c.vision_norm_eps)
        self.qformer = QFormer(c.qformer)
        self.picture_projection = Dense(width, c.embed_dim, ("embed", None))
        self.text_projection = Dense(width, c.embed_dim, ("embed", None))
        self.match_head = Dense(width, 2, ("embed", None))
        self.word_dense = Dense(width, width, ("embed", None))
        self.word_norm = LayerNorm(width, c.qformer.norm_eps)
        self.word_bias = self.param(
            "word_bias", with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (c.qformer.vocab_size,)
        )
        start = nn.initializers.constant(c.temperature)
        self.temperature = self.param("temperature", with_logical_partitioning(start, ()), ())

    def encode_image(self, batch: Batch):
        """What the tower makes of the pictures, the class token too: (B, P, D)."""
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        return self.vision(batch.image_BHWC.astype(self.c.dtype))[0]

    def text(self, batch: Batch, first: int):
        """Ids (B, 1 + M) of the texts behind this token, and which are real."""
        first_B1 = jnp.full_like(batch.target_BM[:, :1], first)
        ids_BL = jnp.concatenate([first_B1, batch.target_BM], axis=1)
        real_BM = batch.target_mask_BM.astype(bool)
        return ids_BL, jnp.concatenate([jnp.ones_like(real_BM[:, :1]), real_BM], axis=1)

    def encode_queries(self, seen_BPD, key=None):
        """The queries' states and keys and values, from the pictures alone; of unit length, to be compared, too."""
        asked_BQD, _, kept = self.qformer.run_blocks(self.vision_norm(seen_BPD), None, None, key)
        return normalize(self.picture_projection(asked_BQD)), kept

    def encode_text(self, batch: Batch, dtype, key=None):
        """The texts alone, of unit length (B, E)."""
        ids_BL, mask_BL = self.text(batch, self.c.cls_token_id)
        text_BLD = self.qformer.embed_text(ids_BL, dtype)
        _, text_BLD, _ = self.qformer.run_blocks(None, text_BLD, key_padding_mask(mask_BL), key)
        return normalize(self.text_projection(text_BLD[:, 0]))

    def similarity(self, batch: Batch):
        asked_BQE, _ = self.encode_queries(self.encode_image(batch))
        return max_similarity(asked_BQE, self.encode_text(batch, asked_BQE.dtype))

    def itm_logits(self, batch: Batch):
        return self.match_logits(self.encode_image(batch), *self.text(batch, self.c.cls_token_id))

    def match_logits(self, seen_BPD, ids_BL, mask_BL, key=None):
        """Picture and text read together: logits (B, 2), the mean over all queries."""
        state_BLD = self.qformer(self.vision_norm(seen_BPD), ids_BL, mask_BL, key)
        return self.match_head(state_BLD[:, : self.c.qformer.num_query_tokens]).mean(axis=1).astype(jnp.float32)

    def __call__(self, batch: Batch, key):
        c, keys = self.c, split_key(key, 6)
        seen_BPD = self.encode_image(batch)
        asked_BQE, kept = self.encode_queries(seen_BPD, keys[0])
        told_BE = self.encode_text(batch, seen_BPD.dtype, keys[1])
        rows = jnp.arange(len(told_BE))
        # Each side learns from its own row; what it is compared with stands still, as where it was gathered.
        still = jax.lax.stop_gradient
        to_text_BB = max_similarity(asked_BQE, still(told_BE)) / self.temperature
        to_picture_BB = max_similarity(still(asked_BQE), told_BE).T / self.temperature
        contrast = sum(
            label_smoothed_cross_entropy(x, rows, jnp.ones_like(rows), c.label_smoothing)[0] / 2
            for x in (to_text_BB, to_picture_BB)
        )
        own_BB = jnp.eye(len(rows)) * SELF_PAIR_LOGIT
        other_text_B = sample_hard_negative(still(to_text_BB) * (own_BB == 0) + own_BB, keys[2])
        other_picture_B = sample_hard_negative(still(to_picture_BB) * (own_BB == 0) + own_BB, keys[3])
        ids_BL, mask_BL = self.text(batch, c.cls_token_id)
        logits_B2 = self.match_logits(
            jnp.concatenate([seen_BPD, seen_BPD[other_picture_B], seen_BPD]),
            jnp.concatenate([ids_BL, ids_BL, ids_BL[other_text_B]]),
            jnp.concatenate([mask_BL, mask_BL, mask_BL[other_text_B]]),
            keys[4],
        )
        true_B = (jnp.arange(len(logits_B2)) < len(rows)).astype(jnp.int32)
        matching, matched = label_smoothed_cross_entropy(logits_B2, true_B, jnp.ones_like(true_B), 0.0)
        captions, words = label_smoothed_cross_entropy(
            self.caption_logits(batch, kept, keys[5]), batch.target_BM, batch.loss_mask_BM, c.label_smoothing
        )
        return contrast + matching + captions, {
            "weight": jnp.asarray(len(rows), jnp.float32),
            "loss_contrast": contrast,
            "loss_matching": matching,
            "loss_captions": captions,
            "match_accuracy": matched["token_accuracy"],
            "token_accuracy": words["token_accuracy"],
        }

    def caption_logits(self, batch: Batch, kept, key=None):
        """Logits (B, M, V) of the texts, which see the queries' keys and values, and themselves up to each word."""
        ids_BL, mask_BL = self.text(batch, self.c.decoder_start_token_id)
        ids_BM, mask_BM = ids_BL[:, :-1], mask_BL[:, :-1]
        rows, length = ids_BM.shape
        before_BM = causal_mask(mask_BM).to_dense(length)
        queries_BQ = jnp.ones((rows, 1, length, self.c.qformer.num_query_tokens), bool)
        mask = jnp.concatenate([queries_BQ, before_BM], axis=-1)
        text_BMD = self.qformer.embed_text(ids_BM, self.c.dtype)
        _, text_BMD, _ = self.qformer.run_blocks(None, text_BMD, mask, key, kept)
        return self.lm_logits(text_BMD)

    def lm_logits(self, text_BMD):
        """(..., D) -> (..., V) in float32."""
        h_BMD = self.word_norm(gelu(self.word_dense(text_BMD)))
        return self.qformer.words.attend(h_BMD).astype(jnp.float32) + self.word_bias

    def prefill(self, batch: Batch, cache_length: int):
        _, kept = self.encode_queries(self.encode_image(batch))
        room = ((0, 0), (0, 0), (0, cache_length + 1), (0, 0), (0, 0))
        written = jax.tree.map(lambda leaf: jnp.pad(leaf, room), kept)
        first_B = jnp.full(len(batch.target_BM), self.c.decoder_start_token_id, jnp.int32)
        return self.extend(first_B, Cache(written, {}, jnp.zeros((), jnp.int32)))

    def extend(self, token_B, cache: Cache):
        earlier, end = cache.generated, self.c.qformer.num_query_tokens + cache.step
        some = jax.tree.leaves(earlier)[0]
        seen_S = (jnp.arange(some.shape[2] + 1) < end).at[-1].set(True)
        text_B1D = self.qformer.embed_text(token_B[:, None], some.dtype, cache.step)
        _, text_B1D, new = self.qformer.run_blocks(None, text_B1D, seen_S[None, None, None], None, earlier)
        written = jax.tree.map(
            lambda old, leaf: jax.lax.dynamic_update_slice(old, leaf, (0, 0, end, 0, 0)), earlier, new
        )
        return self.lm_logits(text_B1D[:, 0]), Cache(written, cache.static, cache.step + 1)


def normalize(x):
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def max_similarity(asked_BQE, told_BE):
    """The best that any query of a picture finds in a text: (B, B), pictures by texts."""
    return jnp.einsum("iqe,je->ijq", asked_BQE, told_BE).max(axis=-1)


def sample_hard_negative(score_BB, key):
    """One column per row, drawn by its score's exponential; the highest without a key."""
    return score_BB.argmax(axis=1) if key is None else jax.random.categorical(key, score_BB)
