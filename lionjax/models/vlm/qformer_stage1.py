# SPDX-License-Identifier: Apache-2.0
"""First stage of a Q-Former, without a language model: what BLIP-2 (arXiv 2301.12597) and Lyrics (2312.05278) share.

Passes over the queries, over the text, over both, and over text that reads the queries' keys and values; the losses of
image-text contrast (over the whole batch, on a mesh the global one) and of matching against hard negatives; and
captions token by token.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import VLM, Batch, Cache, Metrics, ModelInfo, Params, pytree_dataclass
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.connectors.mqformer import regions_of
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.vision.vit import EVA_VIT_G, ViT, ViTConfig
from lionjax.nn.attention import causal_mask, key_padding_mask
from lionjax.nn.layers import Dense, LayerNorm, dense_weight_map, gelu, l2_normalize, norm_weight_map, split_key
from lionjax.nn.losses import image_text_contrast, label_smoothed_cross_entropy
from lionjax.nn.positions import last_token


@pytree_dataclass
class TextRows:
    """Ids (B, L) of texts, their real tokens, and their positions; None: 0..L-1."""

    ids_BL: jax.Array
    mask_BL: jax.Array
    position_BL: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class QFormerStage1(VLM):
    """Base config: sizes, and pure functions of (params, batch). A subclass implements `module` and `weight_map`."""

    vision: ViTConfig = EVA_VIT_G
    qformer: QFormerConfig = QFormerConfig()
    vision_norm_eps: float = 1e-5
    embed_dim: int = 256  # width of the image and text embeddings that the contrastive loss compares
    temperature: float = 0.07
    label_smoothing: float = 0.1
    cls_token_id: int = 101
    decoder_start_token_id: int = 30522
    dtype: str = "float32"  # of the computation

    def module(self) -> QFormerStage1Module:
        """The flax module of this config."""
        raise NotImplementedError

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(end_token=102, image_size=self.vision.image_size, rows_can_join=False)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules."""
        return self.module().init(key, batch, None)["params"]

    def extract_features(self, params: Params, batch: Batch):
        """Output (B, 1 + P, D) of the frozen tower, with the class token."""
        return self.module().apply({"params": params}, batch, method=QFormerStage1Module.encode_image)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """The sum of the losses, and metrics. Without a key, the hard negatives are the most similar pairs."""
        return self.module().apply({"params": params}, batch, key, method=QFormerStage1Module.__call__)

    def similarity(self, params: Params, batch: Batch):
        """Cosine similarity (B, B) of images (rows) and texts (columns) in -1..1, the maximum over all queries."""
        return self.module().apply({"params": params}, batch, method=QFormerStage1Module.similarity)

    def itm_logits(self, params: Params, batch: Batch):
        """Image-text matching logits (B, 2) of each image and its text; column 1 is "match"."""
        return self.module().apply({"params": params}, batch, method=QFormerStage1Module.itm_logits)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the first caption token, and a cache with `cache_length` free slots. There is no prompt.

        Caption tokens attend to the keys and values of the queries.
        """
        return self.module().apply({"params": params}, batch, cache_length, method=QFormerStage1Module.prefill)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""
        return self.module().apply({"params": params}, token_B, cache, method=QFormerStage1Module.extend)


class QFormerStage1Module(nn.Module):
    c: QFormerStage1

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

    # ------------------------------------------------------------------ what a subclass supplies

    def text_rows(self, batch: Batch) -> TextRows:
        """The texts after `[CLS]`."""
        raise NotImplementedError

    def caption_prefix(self, batch: Batch) -> TextRows:
        """What comes before a caption, from the token that starts decoding on."""
        raise NotImplementedError

    def negative_logits(self, score_BB):
        """Logits (B, B) of drawing each column as a hard negative of its row, from similarities over temperature."""
        raise NotImplementedError

    def word_losses(self, batch: Batch, query_kv, key) -> tuple[dict, Metrics]:
        """({name: loss} of the losses on words, their metrics)."""
        raise NotImplementedError

    # ------------------------------------------------------------------ passes

    def encode_image(self, batch: Batch):
        """Output (B, P, D) of the tower, with the class token; `batch.features` if present."""
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        return self.vision(batch.image_BHWC.astype(self.c.dtype))[0]

    def sources(self, batch: Batch):
        """What the queries attend to: image features (B, P, D) after the norm, and regions (see `regions_of`)."""
        return self.vision_norm(self.encode_image(batch)), regions_of(self.c.qformer, batch)

    def encode_queries(self, sources, key=None):
        """States (B, Q, D) of the queries alone, and the keys and values of all their layers."""
        image_BPD, regions = sources
        query_BQD, _, query_kv = self.qformer.run_blocks(image_BPD, None, None, key, regions=regions)
        return query_BQD, query_kv

    def encode_text(self, rows: TextRows, key=None):
        """States (B, L, D) of the texts alone."""
        text_BLD = self.qformer.embed_text(rows.ids_BL, self.c.dtype, rows.position_BL)
        return self.qformer.run_blocks(None, text_BLD, key_padding_mask(rows.mask_BL), key)[1]

    def project_queries(self, query_BQD):
        """Unit-norm embeddings (B, Q, E) of the queries."""
        return l2_normalize(self.picture_projection(query_BQD))

    def project_text(self, text_BLD):
        """Unit-norm embeddings (B, E) of the texts, from their first token."""
        return l2_normalize(self.text_projection(text_BLD[:, 0]))

    def similarity(self, batch: Batch):
        query_BQD, _ = self.encode_queries(self.sources(batch))
        text_BLD = self.encode_text(self.text_rows(batch))
        return max_similarity(self.project_queries(query_BQD), self.project_text(text_BLD))

    def itm_logits(self, batch: Batch):
        return self.match_logits(self.encode_pairs(self.sources(batch), self.text_rows(batch)))

    def encode_pairs(self, sources, rows: TextRows, key=None):
        """States (B, Q, D) of the queries, which attend to image and text."""
        image_BPD, regions = sources
        state_BLD = self.qformer(image_BPD, rows.ids_BL, rows.mask_BL, key, regions, rows.position_BL)
        return state_BLD[:, : self.c.qformer.num_query_tokens]

    def match_logits(self, query_BQD):
        """Matching logits (B, 2), the mean over all queries."""
        return self.match_head(query_BQD).mean(axis=1).astype(jnp.float32)

    def read_queries(self, rows: TextRows, query_kv, causal: bool, key=None):
        """States (B, L, D) of text that attends to the queries and to itself, and the text's keys and values.

        `query_kv`: keys and values of the queries, which do not attend to the text. `causal`: token l attends to the
        text up to l, else to all of it.
        """
        (num_rows, length), num_queries = rows.ids_BL.shape, self.c.qformer.num_query_tokens
        if causal:
            query_mask = jnp.ones((num_rows, 1, length, num_queries), bool)
            mask = jnp.concatenate([query_mask, causal_mask(rows.mask_BL).to_dense(length)], axis=-1)
        else:
            query_mask = jnp.ones((num_rows, num_queries), bool)
            mask = key_padding_mask(jnp.concatenate([query_mask, rows.mask_BL], axis=1))
        text_BLD = self.qformer.embed_text(rows.ids_BL, self.c.dtype, rows.position_BL)
        _, text_BLD, text_kv = self.qformer.run_blocks(None, text_BLD, mask, key, query_kv)
        return text_BLD, text_kv

    def lm_logits(self, text_BMD):
        """Logits (..., V) in float32 of states (..., D)."""
        h_BMD = self.word_norm(gelu(self.word_dense(text_BMD)))
        return self.qformer.words.attend(h_BMD).astype(jnp.float32) + self.word_bias

    # ------------------------------------------------------------------ losses

    def __call__(self, batch: Batch, key, negatives=None):
        """(loss, metrics); `negatives`: image and text (B,) that do not belong to each text and image; None: drawn."""
        keys = split_key(key, 6)
        sources, rows = self.sources(batch), self.text_rows(batch)
        query_BQD, query_kv = self.encode_queries(sources, keys[0])
        text_BLD = self.encode_text(rows, keys[1])
        contrast, scores = self.contrastive_loss(self.project_queries(query_BQD), self.project_text(text_BLD))
        if negatives is None:
            # A text for every image, then an image for every text; keys as in earlier versions.
            negatives = tuple(sample_hard_negative(self.negative_logits(s), k) for s, k in zip(scores, keys[2:4]))[::-1]
        matching, match_accuracy = self.matching_loss(sources, rows, negatives, keys[4])
        words, metrics = self.word_losses(batch, query_kv, keys[5])
        losses = {"contrast": contrast, "matching": matching, **words}
        metrics = {"match_accuracy": match_accuracy, **metrics}
        metrics |= {f"loss_{name}": loss for name, loss in losses.items()}
        return sum(losses.values()), metrics | {"weight": jnp.asarray(len(query_BQD), jnp.float32)}

    def contrastive_loss(self, query_BQE, text_BE):
        """Image-text contrast, and the similarities over temperature of images (rows) and of texts, no gradient."""
        stop_gradient = jax.lax.stop_gradient
        # As in LAVIS, whose all_gather stops gradients: each side learns from its own rows only.
        image_to_text_BB = max_similarity(query_BQE, stop_gradient(text_BE)) / self.temperature
        text_to_image_BB = max_similarity(stop_gradient(query_BQE), text_BE).T / self.temperature
        scores = (image_to_text_BB, text_to_image_BB)
        return image_text_contrast(*scores, self.c.label_smoothing), stop_gradient(scores)

    def matching_loss(self, sources, rows: TextRows, negatives, key=None):
        """Matching of all pairs, of each text with another image, and of each image with another text; its accuracy."""
        logits_B2 = self.match_logits(self.encode_pairs(*self.matching_triples(sources, rows, negatives), key))
        label_B = (jnp.arange(len(logits_B2)) < len(negatives[0])).astype(jnp.int32)
        loss, metrics = label_smoothed_cross_entropy(logits_B2, label_B, jnp.ones_like(label_B), 0.0)
        return loss, metrics["token_accuracy"]

    def matching_triples(self, sources, rows: TextRows, negatives):
        """Sources and texts (3B, ...): the pairs, then with the negative image, then with the negative text."""
        image_B, text_B = negatives
        triple_sources = jax.tree.map(lambda x: jnp.concatenate([x, jnp.take(x, image_B, axis=0), x]), sources)
        return triple_sources, jax.tree.map(lambda x: jnp.concatenate([x, x, jnp.take(x, text_B, axis=0)]), rows)

    # ------------------------------------------------------------------ captions

    def prefill(self, batch: Batch, cache_length: int):
        _, query_kv = self.encode_queries(self.sources(batch))
        prefix = self.caption_prefix(batch)
        text_BLD, text_kv = self.read_queries(prefix, query_kv, causal=True)
        padding = ((0, 0), (0, 0), (0, cache_length), (0, 0), (0, 0))
        past_kv = jax.tree.map(lambda *kv: jnp.pad(jnp.concatenate(kv, axis=2), padding), query_kv, text_kv)
        query_mask_BQ = jnp.ones((len(text_BLD), self.c.qformer.num_query_tokens), bool)
        static = {"valid": jnp.concatenate([query_mask_BQ, prefix.mask_BL], axis=1)[None]}
        return self.lm_logits(last_token(text_BLD, prefix.mask_BL)), Cache(past_kv, static, jnp.ones((), jnp.int32))

    def extend(self, token_B, cache: Cache):
        past_kv, valid_BS = cache.generated, cache.static["valid"][0]
        end = valid_BS.shape[1] + cache.step - 1
        leaf = jax.tree.leaves(past_kv)[0]
        free = leaf.shape[2] - valid_BS.shape[1]
        said_BM = jnp.broadcast_to(jnp.arange(free) < cache.step - 1, (len(token_B), free))
        itself_B1 = jnp.ones((len(token_B), 1), bool)
        mask = key_padding_mask(jnp.concatenate([valid_BS, said_BM, itself_B1], axis=1))
        position_B1 = jnp.broadcast_to(cache.step, (len(token_B), 1))
        text_B1D = self.qformer.embed_text(token_B[:, None], leaf.dtype, position_B1)
        _, text_B1D, new_kv = self.qformer.run_blocks(None, text_B1D, mask, None, past_kv)
        generated = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, end, 0, 0)), past_kv, new_kv
        )
        return self.lm_logits(text_B1D[:, 0]), dataclasses.replace(cache, generated=generated, step=cache.step + 1)


def max_similarity(query_BQE, text_BE):
    """Dot products (B, B) of images (rows) and texts (columns), the maximum over the queries of each image."""
    return jnp.einsum("iqe,je->ijq", query_BQE, text_BE).max(axis=-1)


def sample_hard_negative(score_BB, key):
    """One column index (B,) per row, sampled from the softmax of the scores; without a key the argmax."""
    return score_BB.argmax(axis=1) if key is None else jax.random.categorical(key, score_BB)


def heads_weight_map(qformer_prefix: str, c: QFormerConfig, qformer_map) -> tuple[WeightMapping, ...]:
    """Names of the stage without its towers: the queries, the Q-Former at `qformer_prefix`, and all heads.

    The words of the Q-Former are tied to the head of the language model beside it. `qformer_map`: its names.
    """
    words_key, lm_head = f"{qformer_prefix}bert.embeddings.word_embeddings.weight", f"{qformer_prefix}cls.predictions."
    qformer_map = with_prefix(f"{qformer_prefix}bert.", "qformer/", qformer_map)
    return (
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c)),
        *(
            dataclasses.replace(row, tied_keys=(f"{lm_head}decoder.weight",)) if row.torch == words_key else row
            for row in qformer_map
        ),
        *dense_weight_map(f"{lm_head}transform.dense", "word_dense"),
        *norm_weight_map(f"{lm_head}transform.LayerNorm", "word_norm"),
        WeightMapping(f"{lm_head}bias", "word_bias", tied_keys=(f"{lm_head}decoder.bias",)),
        *dense_weight_map("vision_proj", "picture_projection"),
        *dense_weight_map("text_proj", "text_projection"),
        *dense_weight_map("itm_head", "match_head"),
        WeightMapping("temp", "temperature"),
    )
