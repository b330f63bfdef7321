# SPDX-License-Identifier: Apache-2.0
"""Flamingo: pictures are read between the layers of a language model that stays as it was (arXiv 2204.14198).

A frozen tower sees each picture, a resampler makes a few words of it, and before every n-th layer the text may look at
them through gates that begin closed. Where a picture belongs in the text, its token stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import VLM, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping, rename_torch_keys, with_prefix
from lionjax.models.connectors.perceiver import Resampler, ResamplerConfig, resampler_weight_map
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import MPT_1B, MPT_7B, Decoder, DecoderConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import CLIP_VIT_L, ViT, ViTConfig
from lionjax.nn import losses
from lionjax.nn.adapters import GatedCrossAttentionConfig, gated_cross_attention_weight_map

MEDIA_ATTENTION = ("immediate", "all_previous")


@renamed_fields(image_token="image_token_id", rule="media_attention", part_weights="dataset_loss_weights")
@dataclasses.dataclass(frozen=True)
class Flamingo(VLM):
    """A Flamingo by its parts' sizes; the defaults are those of OpenFlamingo 9B (arXiv 2308.01390).

    `rule`: a token sees the last picture before it, or all of them. By the first, one before any picture sees none; by
    the second such a token sees, as in OpenFlamingo, all pictures of its row alike, later ones too.
    A row may have several pictures, (B, K, H, W, C); the k-th `image_token` is the k-th of them, and is never learned.
    `part_weights`: how much the mean loss of each entry of a stage's mixture counts; empty: all tokens count alike.
    """

    vision: ViTConfig = dataclasses.replace(CLIP_VIT_L, image_size=224)
    resampler: ResamplerConfig = ResamplerConfig()
    language: DecoderConfig = dataclasses.replace(
        MPT_7B,
        vocab_size=50280,
        num_frozen_embeddings=50277,
        pad_token_id=50279,
        eos_token_id=50277,
        cross_attention=GatedCrossAttentionConfig(),
    )
    image_token_id: int = 50278
    media_attention: str = "immediate"
    dtype: str = "float32"  # of the computation
    dataset_loss_weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.media_attention not in MEDIA_ATTENTION:
            raise ValueError(f"rule is {self.media_attention!r}; it can be one of {', '.join(MEDIA_ATTENTION)}")
        if self.language.cross_attention is None:
            raise ValueError("language.cross is None, so nothing would look at the pictures")

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.language.vocab_size,
            embedding_rows=self.language.padded_vocab_size,
            end_token=self.language.eos_token_id,
            is_encoder_decoder=False,
            image_token=self.image_token_id,
            splices_images=True,
            image_size=self.vision.image_size,
        )

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part."""
        return FlamingoModule(self).init(key, batch, None)["params"]

    def _apply(self, params: Params, method: Callable, *args):
        return FlamingoModule(self).apply({"params": params}, *args, method=method)

    def extract_features(self, params: Params, batch: Batch):
        """The frozen tower's patches (B, P, D), or (B, K, P, D) where rows have several images."""
        return self._apply(params, FlamingoModule.encode_image, batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer's tokens but the images', or the weighted sum of each data set's."""
        learned_BM = batch.loss_mask_BM * (batch.target_BM != self.image_token_id)
        logits_BMV = self.logits(params, batch, key)
        if self.dataset_loss_weights and batch.dataset_B is not None:
            weights = self.dataset_loss_weights
            return losses.per_dataset_cross_entropy(logits_BMV, batch.target_BM, learned_BM, batch.dataset_B, weights)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, learned_BM)

    def logits(self, params: Params, batch: Batch, key=None):
        """(B, M, V) in float32, row m predicting target m."""
        return self._apply(params, FlamingoModule.__call__, batch, key)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Read images and prompt. What follows attends to the images as the prompt's last token does."""
        return self._apply(params, FlamingoModule.prefill, batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row."""
        return self._apply(params, FlamingoModule.extend, token_B, cache)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of OpenFlamingo's code: its decoder's layers beside the gated ones, the tower as CLIP's own code."""
        c, every = self.language, self.language.cross_attention.every_n_layers
        layers = ("model.decoder.layers.", "model.layers.", "transformer.blocks.", "transformer.h.")
        language = rename_torch_keys(decoder_weights.weight_map(c), *((name, "old_decoder_blocks.") for name in layers))
        place = f"{{{every}i+{every - 1}}}" if every > 1 else "{i}"
        gated = with_prefix(
            f"lang_encoder.gated_cross_attn_layers.{place}.",
            "language/groups/cross/",
            gated_cross_attention_weight_map(c.cross_attention),
        )
        return (
            *with_prefix("vision_encoder.", "vision/", vit.tower_weight_map(self.vision, vit.openai_clip_weight_map)),
            *with_prefix("perceiver.", "resampler/", resampler_weight_map(self.resampler)),
            *with_prefix("lang_encoder.", "language/", language),
            *gated,
        )


OPENFLAMINGO_9B = Flamingo()
OPENFLAMINGO_3B = Flamingo(
    language=dataclasses.replace(
        MPT_1B,
        vocab_size=50280,
        num_frozen_embeddings=50277,
        pad_token_id=50279,
        eos_token_id=50277,
        cross_attention=GatedCrossAttentionConfig(every_n_layers=1, mlp_dim=8192),
    )
)


class FlamingoModule(nn.Module):
    c: Flamingo

    def setup(self):
        self.vision = ViT(self.c.vision)
        self.resampler = Resampler(self.c.resampler)
        self.language = Decoder(self.c.language)

    def encode_image(self, batch: Batch):
        """The tower's patches, without the class token: (B, K, P, D), or (B, P, D) where rows have one picture."""
        image = batch.image_BHWC
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        seen_BPD, _, _ = self.vision(image.reshape(-1, *image.shape[-3:]).astype(self.c.dtype))
        return seen_BPD[:, 1:].reshape(*image.shape[:-3], -1, seen_BPD.shape[-1])

    def resample_images(self, batch: Batch, ids_BL, mask_BL):
        """Image tokens, which of them each text token attends to, and whether it attends to any: see `GatedCross`."""
        seen = self.encode_image(batch)
        seen_BKFPD = seen.reshape(len(seen), -1, 1, *seen.shape[-2:])
        word_BKQD = self.resampler(seen_BKFPD)
        rows, pictures, words, _ = word_BKQD.shape
        time_BL1 = jnp.cumsum((ids_BL == self.c.image_token_id) & mask_BL, axis=1)[..., None]
        time_S = jnp.arange(pictures * words) // words + 1
        if self.c.media_attention == "immediate":
            seen_BLS = time_BL1 == time_S
            real_BL = seen_BLS.any(axis=-1)
        else:
            seen_BLS, real_BL = time_BL1 >= time_S, jnp.ones(ids_BL.shape, bool)
        return word_BKQD.reshape(rows, pictures * words, -1), seen_BLS, real_BL

    def __call__(self, batch: Batch, key):
        """Logits (B, M, V) in float32, row m predicting target m."""
        ids_BL = jnp.concatenate([batch.prompt_BL, batch.target_BM], axis=1)
        mask_BL = jnp.concatenate([batch.prompt_mask_BL, batch.target_mask_BM], axis=1).astype(bool)
        media = self.resample_images(batch, ids_BL, mask_BL)
        dtype = media[0].dtype
        prompt_BLD, target_BMD = (
            self.language.embed(batch.prompt_BL, dtype),
            self.language.embed(batch.target_BM, dtype),
        )
        given = (prompt_BLD, batch.prompt_mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, (key, None), media)
        return self.language.logits(self.language.forward(*given)[0])

    def prefill(self, batch: Batch, cache_length: int):
        mask_BL = batch.prompt_mask_BL.astype(bool)
        media = self.resample_images(batch, batch.prompt_BL, mask_BL)
        x_BLD = self.language.embed(batch.prompt_BL, media[0].dtype)
        state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B, media)
        return self.language.logits(state_BD), cache

    def extend(self, token_B, cache: Cache):
        state_BD, cache = self.language.extend(self.language.embed_next(token_B, cache), cache)
        return self.language.logits(state_BD), cache
