# SPDX-License-Identifier: Apache-2.0
"""Flamingo (arXiv 2204.14198) and OpenFlamingo (arXiv 2308.01390): gated cross-attention to images in a frozen LM.

A frozen vision tower encodes each image and a Perceiver resampler reduces it to a few image tokens. Before every n-th
layer of the language model, text tokens attend to them through tanh gates that start at 0. An image token in the text
marks the position of each image.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.renamed import renamed_fields
from lionjax.core.types import VLM, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping, rename_torch_keys, with_prefix
from lionjax.models.connectors.perceiver import Resampler, ResamplerConfig, resampler_weight_map
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import MPT_1B, MPT_7B, Decoder, DecoderConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import CLIP_VIT_L, ViT, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.nn import losses
from lionjax.nn.adapters import GatedCrossAttentionConfig, gated_cross_attention_weight_map

MEDIA_ATTENTION = ("immediate", "all_previous")


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Flamingo(VLM):
    """Config of a Flamingo; the defaults are those of OpenFlamingo 9B (arXiv 2308.01390).

    - `media_attention`: "immediate": a token attends to the last image before it, and a token before all images to
      none. "all_previous": a token attends to all images before it, and a token before all images to all images of
      its row with equal weights, later ones too, as in OpenFlamingo.
    - `image_token_id`: the k-th one in a row marks the k-th image of (B, K, H, W, C); excluded from the loss.
    - `dataset_loss_weights`: weight of the mean loss of each entry of a stage's mixture; empty: one mean over all
      tokens.
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
        check_choices(self, media_attention=MEDIA_ATTENTION)
        if self.language.cross_attention is None:
            raise ValueError("language.cross_attention is None; set it to a GatedCrossAttentionConfig")

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            default_image_fit={"mode": "shortest_edge"},  # and a center crop, as open_clip's evaluation transform
        )

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules."""
        return FlamingoModule(self).init(key, batch, None)["params"]

    def extract_features(self, params: Params, batch: Batch):
        """Patches (B, P, D) from the frozen tower, or (B, K, P, D) for rows with several images."""
        return FlamingoModule(self).apply({"params": params}, batch, method=FlamingoModule.encode_image)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer tokens without image tokens, and metrics.

        With `dataset_loss_weights`, the weighted sum of the mean of each dataset.
        """
        loss_mask_BM = batch.loss_mask_BM * (batch.target_BM != self.image_token_id)
        logits_BMV = self.logits(params, batch, key)
        if self.dataset_loss_weights and batch.dataset_B is not None:
            weights = self.dataset_loss_weights
            return losses.per_dataset_cross_entropy(logits_BMV, batch.target_BM, loss_mask_BM, batch.dataset_B, weights)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, loss_mask_BM)

    def logits(self, params: Params, batch: Batch, key=None):
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return FlamingoModule(self).apply({"params": params}, batch, key, method=FlamingoModule.__call__)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the first answer token, and a cache of images and prompt with `cache_length` free slots.

        Generated tokens attend to the same images as the last token of the prompt.
        """
        return FlamingoModule(self).apply({"params": params}, batch, cache_length, method=FlamingoModule.prefill)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""
        return FlamingoModule(self).apply({"params": params}, token_B, cache, method=FlamingoModule.extend)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the OpenFlamingo code: decoder layers and gated layers apart, the tower as in OpenAI's CLIP code."""
        c, every = self.language, self.language.cross_attention.every_n_layers
        layers = ("model.decoder.layers.", "model.layers.", "transformer.blocks.", "transformer.h.")
        language = rename_torch_keys(decoder_weights.weight_map(c), *((name, "old_decoder_blocks.") for name in layers))
        layer = f"{{{every}i+{every - 1}}}" if every > 1 else "{i}"
        gated = with_prefix(
            f"lang_encoder.gated_cross_attn_layers.{layer}.",
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
        """The tower's patches without the class token: (B, K, P, D), or (B, P, D) for rows with one image."""
        image = batch.image_BHWC
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        image_BPD, _, _ = self.vision(image.reshape(-1, *image.shape[-3:]).astype(self.c.dtype))
        return image_BPD[:, 1:].reshape(*image.shape[:-3], -1, image_BPD.shape[-1])

    def resample_images(self, batch: Batch, ids_BL, mask_BL):
        """Image tokens (B, K Q, D), their mask (B, L, K Q) for each text token, and whether it attends at all (B, L).

        The three are the `media` of `GatedCrossAttentionBlock`.
        """
        features = self.encode_image(batch)
        features_BKFPD = features.reshape(len(features), -1, 1, *features.shape[-2:])
        image_BKQD = self.resampler(features_BKFPD)
        rows, num_images, num_latents, _ = image_BKQD.shape
        media_time_BL1 = jnp.cumsum((ids_BL == self.c.image_token_id) & mask_BL, axis=1)[..., None]
        image_time_S = jnp.arange(num_images * num_latents) // num_latents + 1
        if self.c.media_attention == "immediate":
            mask_BLS = media_time_BL1 == image_time_S
            attends_BL = mask_BLS.any(axis=-1)
        else:
            mask_BLS, attends_BL = media_time_BL1 >= image_time_S, jnp.ones(ids_BL.shape, bool)
        return image_BKQD.reshape(rows, num_images * num_latents, -1), mask_BLS, attends_BL

    def __call__(self, batch: Batch, key):
        """Logits (B, M, V) in float32; position m predicts target token m."""
        ids_BL = jnp.concatenate([batch.prompt_BL, batch.target_BM], axis=1)
        mask_BL = jnp.concatenate([batch.prompt_mask_BL, batch.target_mask_BM], axis=1).astype(bool)
        media = self.resample_images(batch, ids_BL, mask_BL)
        dtype = media[0].dtype
        prompt_BLD, target_BMD = (
            self.language.embed(batch.prompt_BL, dtype),
            self.language.embed(batch.target_BM, dtype),
        )
        before_BMD, _ = self.language.forward(
            prompt_BLD, batch.prompt_mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, (key, None), media
        )
        return self.language.logits(before_BMD)

    def prefill(self, batch: Batch, cache_length: int):
        mask_BL = batch.prompt_mask_BL.astype(bool)
        media = self.resample_images(batch, batch.prompt_BL, mask_BL)
        x_BLD = self.language.embed(batch.prompt_BL, media[0].dtype)
        state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B, media)
        return self.language.logits(state_BD), cache

    def extend(self, token_B, cache: Cache):
        state_BD, cache = self.language.extend(self.language.embed_next(token_B, cache), cache)
        return self.language.logits(state_BD), cache
