# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 stage 1 (arXiv 2301.12597): Q-Former pre-training without a language model.

Three losses in one forward pass: image-text contrast (ITC) over the batch, image-text matching (ITM) against hard
negatives, and image-grounded captioning (ITG).
"""

from __future__ import annotations

import dataclasses

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

SELF_PAIR_LOGIT = -10000.0  # logit of the true pair when hard negatives are sampled, so that it is never drawn


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Blip2Stage1(VLM):
    """Config of the stage; the defaults are those of the release.

    Texts are the targets of the batch in BERT's vocabulary, closed by `[SEP]`. The model prepends `cls_token_id`
    (`[CLS]`), and `decoder_start_token_id` (`[DEC]`) for captioning. `label_smoothing` applies to contrast and
    captioning.
    """

    vision: ViTConfig = EVA_VIT_G
    qformer: QFormerConfig = QFormerConfig()
    vision_norm_eps: float = 1e-5
    embed_dim: int = 256  # width of the image and text embeddings that the contrastive loss compares
    temperature: float = 0.07
    label_smoothing: float = 0.1
    cls_token_id: int = 101
    decoder_start_token_id: int = 30522
    dtype: str = "float32"  # of the computation

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(end_token=102, image_size=self.vision.image_size)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules."""
        return Blip2Stage1Module(self).init(key, batch, None)["params"]

    def extract_features(self, params: Params, batch: Batch):
        """Output (B, 1 + P, D) of the frozen tower, with the class token."""
        return Blip2Stage1Module(self).apply({"params": params}, batch, method=Blip2Stage1Module.encode_image)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """The sum of the three losses, and metrics. Without a key, the hard negatives are the most similar pairs."""
        return Blip2Stage1Module(self).apply({"params": params}, batch, key, method=Blip2Stage1Module.__call__)

    def similarity(self, params: Params, batch: Batch):
        """Cosine similarity (B, B) of images (rows) and texts (columns) in -1..1, the maximum over all queries."""
        return Blip2Stage1Module(self).apply({"params": params}, batch, method=Blip2Stage1Module.similarity)

    def itm_logits(self, params: Params, batch: Batch):
        """Image-text matching logits (B, 2) of each image and its text; column 1 is "match"."""
        return Blip2Stage1Module(self).apply({"params": params}, batch, method=Blip2Stage1Module.itm_logits)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the first caption token, and a cache with `cache_length` free slots. There is no prompt.

        Caption tokens attend to the keys and values of the queries.
        """
        return Blip2Stage1Module(self).apply({"params": params}, batch, cache_length, method=Blip2Stage1Module.prefill)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""
        return Blip2Stage1Module(self).apply({"params": params}, token_B, cache, method=Blip2Stage1Module.extend)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of LAVIS's blip2_pretrained.pth."""
        embeddings, head = "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions."
        rows = with_prefix("Qformer.bert.", "qformer/", qformer.lavis_weight_map(self.qformer))
        return (
            *with_prefix("visual_encoder.", "vision/", vit.lavis_weight_map(self.vision)),
            *norm_weight_map("ln_vision", "vision_norm"),
            *with_prefix("", "qformer/", qformer.query_tokens_weight_map(self.qformer)),
            *(
                dataclasses.replace(row, tied_keys=(f"{head}decoder.weight",)) if row.torch == embeddings else row
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
        """Output (B, P, D) of the tower, with the class token; `batch.features` if present."""
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        return self.vision(batch.image_BHWC.astype(self.c.dtype))[0]

    def text(self, batch: Batch, first: int):
        """Ids (B, 1 + M) of the texts after the token `first`, and their mask."""
        first_B1 = jnp.full_like(batch.target_BM[:, :1], first)
        ids_BL = jnp.concatenate([first_B1, batch.target_BM], axis=1)
        mask_BM = batch.target_mask_BM.astype(bool)
        return ids_BL, jnp.concatenate([jnp.ones_like(mask_BM[:, :1]), mask_BM], axis=1)

    def encode_queries(self, image_BPD, key=None):
        """Projected unit-norm queries (B, Q, E) of the images alone, and the keys and values of all their layers."""
        query_BQD, _, query_kv = self.qformer.run_blocks(self.vision_norm(image_BPD), None, None, key)
        return normalize(self.picture_projection(query_BQD)), query_kv

    def encode_text(self, batch: Batch, dtype, key=None):
        """Projected unit-norm embeddings (B, E) of the texts alone, from their `[CLS]` tokens."""
        ids_BL, mask_BL = self.text(batch, self.c.cls_token_id)
        text_BLD = self.qformer.embed_text(ids_BL, dtype)
        _, text_BLD, _ = self.qformer.run_blocks(None, text_BLD, key_padding_mask(mask_BL), key)
        return normalize(self.text_projection(text_BLD[:, 0]))

    def similarity(self, batch: Batch):
        query_BQE, _ = self.encode_queries(self.encode_image(batch))
        return max_similarity(query_BQE, self.encode_text(batch, query_BQE.dtype))

    def itm_logits(self, batch: Batch):
        return self.match_logits(self.encode_image(batch), *self.text(batch, self.c.cls_token_id))

    def match_logits(self, image_BPD, ids_BL, mask_BL, key=None):
        """Matching logits (B, 2), the mean over all queries, which attend to image and text."""
        state_BLD = self.qformer(self.vision_norm(image_BPD), ids_BL, mask_BL, key)
        return self.match_head(state_BLD[:, : self.c.qformer.num_query_tokens]).mean(axis=1).astype(jnp.float32)

    def __call__(self, batch: Batch, key):
        c, keys = self.c, split_key(key, 6)
        image_BPD = self.encode_image(batch)
        query_BQE, query_kv = self.encode_queries(image_BPD, keys[0])
        text_BE = self.encode_text(batch, image_BPD.dtype, keys[1])
        rows = jnp.arange(len(text_BE))
        # As in LAVIS, whose all_gather stops gradients: each side learns from its own rows only.
        stop_gradient = jax.lax.stop_gradient
        image_to_text_BB = max_similarity(query_BQE, stop_gradient(text_BE)) / self.temperature
        text_to_image_BB = max_similarity(stop_gradient(query_BQE), text_BE).T / self.temperature
        contrast = sum(
            label_smoothed_cross_entropy(x, rows, jnp.ones_like(rows), c.label_smoothing)[0] / 2
            for x in (image_to_text_BB, text_to_image_BB)
        )
        self_BB = jnp.eye(len(rows)) * SELF_PAIR_LOGIT
        negative_text_B = sample_hard_negative(stop_gradient(image_to_text_BB) * (self_BB == 0) + self_BB, keys[2])
        negative_image_B = sample_hard_negative(stop_gradient(text_to_image_BB) * (self_BB == 0) + self_BB, keys[3])
        ids_BL, mask_BL = self.text(batch, c.cls_token_id)
        logits_B2 = self.match_logits(
            jnp.concatenate([image_BPD, image_BPD[negative_image_B], image_BPD]),
            jnp.concatenate([ids_BL, ids_BL, ids_BL[negative_text_B]]),
            jnp.concatenate([mask_BL, mask_BL, mask_BL[negative_text_B]]),
            keys[4],
        )
        label_B = (jnp.arange(len(logits_B2)) < len(rows)).astype(jnp.int32)
        matching, match_metrics = label_smoothed_cross_entropy(logits_B2, label_B, jnp.ones_like(label_B), 0.0)
        captions, caption_metrics = label_smoothed_cross_entropy(
            self.caption_logits(batch, query_kv, keys[5]), batch.target_BM, batch.loss_mask_BM, c.label_smoothing
        )
        return contrast + matching + captions, {
            "weight": jnp.asarray(len(rows), jnp.float32),
            "loss_contrast": contrast,
            "loss_matching": matching,
            "loss_captions": captions,
            "match_accuracy": match_metrics["token_accuracy"],
            "token_accuracy": caption_metrics["token_accuracy"],
        }

    def caption_logits(self, batch: Batch, query_kv, key=None):
        """Logits (B, M, V) of the texts; token m attends to the queries' keys and values and to the tokens up to m."""
        ids_BL, mask_BL = self.text(batch, self.c.decoder_start_token_id)
        ids_BM, mask_BM = ids_BL[:, :-1], mask_BL[:, :-1]
        rows, length = ids_BM.shape
        text_mask = causal_mask(mask_BM).to_dense(length)
        query_mask = jnp.ones((rows, 1, length, self.c.qformer.num_query_tokens), bool)
        mask = jnp.concatenate([query_mask, text_mask], axis=-1)
        text_BMD = self.qformer.embed_text(ids_BM, self.c.dtype)
        _, text_BMD, _ = self.qformer.run_blocks(None, text_BMD, mask, key, query_kv)
        return self.lm_logits(text_BMD)

    def lm_logits(self, text_BMD):
        """Logits (..., V) in float32 of states (..., D)."""
        h_BMD = self.word_norm(gelu(self.word_dense(text_BMD)))
        return self.qformer.words.attend(h_BMD).astype(jnp.float32) + self.word_bias

    def prefill(self, batch: Batch, cache_length: int):
        _, query_kv = self.encode_queries(self.encode_image(batch))
        padding = ((0, 0), (0, 0), (0, cache_length + 1), (0, 0), (0, 0))
        generated = jax.tree.map(lambda leaf: jnp.pad(leaf, padding), query_kv)
        start_B = jnp.full(len(batch.target_BM), self.c.decoder_start_token_id, jnp.int32)
        return self.extend(start_B, Cache(generated, {}, jnp.zeros((), jnp.int32)))

    def extend(self, token_B, cache: Cache):
        past_kv, end = cache.generated, self.c.qformer.num_query_tokens + cache.step
        leaf = jax.tree.leaves(past_kv)[0]
        valid_S = (jnp.arange(leaf.shape[2] + 1) < end).at[-1].set(True)
        text_B1D = self.qformer.embed_text(token_B[:, None], leaf.dtype, cache.step)
        _, text_B1D, new_kv = self.qformer.run_blocks(None, text_B1D, valid_S[None, None, None], None, past_kv)
        generated = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, end, 0, 0)), past_kv, new_kv
        )
        return self.lm_logits(text_B1D[:, 0]), Cache(generated, cache.static, cache.step + 1)


def normalize(x):
    """x divided by its L2 norm over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def max_similarity(query_BQE, text_BE):
    """Dot products (B, B) of images (rows) and texts (columns), the maximum over the queries of each image."""
    return jnp.einsum("iqe,je->ijq", query_BQE, text_BE).max(axis=-1)


def sample_hard_negative(score_BB, key):
    """One column index (B,) per row, sampled from the softmax of the scores; without a key the argmax."""
    return score_BB.argmax(axis=1) if key is None else jax.random.categorical(key, score_BB)
