# SPDX-License-Identifier: Apache-2.0
"""A language model with box and mask heads (pix2emb, arXiv 2311.04498), shared by NExT-Chat and LION with region heads.

A subclass supplies how its inputs are embedded; this file decodes boxes at region query tokens, prompts SAM with their
hidden states, adds the losses of both heads, and tracks the boxes of an answer during generation. LISA, which has masks
without boxes, shares all but those heads (see `lisa`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.types import IMAGE_TOKEN, VLM, Batch, Cache, Metrics, Params
from lionjax.core.weight_map import WeightMapping
from lionjax.models.heads import region
from lionjax.models.heads.region import BoxEncoderDecoder, MaskPromptProjector, RegionHeadConfig
from lionjax.models.language.backend import language_model, token_loss
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import sam_decoder
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.vit import ViT
from lionjax.nn.layers import MLP, Dense, dense_weight_map, normal
from lionjax.nn.positions import last_token


class RegionLM(VLM):
    """Base config with the pure functions of the model. A subclass is a frozen dataclass and implements `module`.

    It has fields or properties `language`, `sam`, `objective` and `region_head` (see `heads.region.RegionHeadConfig`;
    None: no box head, and no masks by boxes).
    """

    language: T5Config | DecoderConfig
    sam: SamConfig | None
    objective: str
    dtype: str
    region_head: RegionHeadConfig | None
    box_scale: float
    identity_init_scale: float | None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder (T5)."""
        return False

    @property
    def num_mask_prompt_tokens(self) -> int:
        """Prompt tokens of SAM's mask decoder from one state."""
        return self.region_head.num_mask_prompt_tokens

    def module(self) -> RegionModule:
        """The flax module of this config."""
        raise NotImplementedError

    def _apply(self, params: Params, run: Callable[[RegionModule], Any]):
        return self.module().apply({"params": params}, method=run)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules and heads, independent of `objective`."""
        return self.module().init(key, batch, method=RegionModule.init_all)["params"]

    def extract_features(self, params: Params, batch: Batch):
        """Outputs of the frozen towers, with SAM's image embedding under "map" if the batch has images for SAM."""
        return self._apply(params, lambda module: module.extract_features(batch))

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean loss and metrics: answer cross entropy plus box losses, the mask losses, or all three by `objective`."""
        return self._apply(params, lambda module: module.loss(batch, key))

    def logits(self, params: Params, batch: Batch, key=None):
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return self._apply(params, lambda module: module.logits(batch, key))

    def predict_boxes(self, params: Params, batch: Batch):
        """Boxes (B, K, 4) in 0..1 at the region queries of the target, their states (B, K, D) and mask (B, K)."""
        return self._apply(params, lambda module: module.predict_boxes(batch))

    def predict_masks(self, params: Params, batch: Batch, box_BK4, state_BKD, valid_BK=None):
        """Mask logits (B, K, h, w) and predicted IoUs (B, K) of boxes and the states they were decoded from."""
        return self._apply(params, lambda module: module.predict_masks(batch, box_BK4, state_BKD, valid_BK))

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the first answer token, and a cache of image and prompt with `cache_length` free slots."""
        return self._apply(params, lambda module: module.prefill(batch, cache_length))

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token.

        A box token must follow a region query; its input embedding is that of the predicted box.
        `cache.generated["kept"]` holds the boxes of the answer so far, their states and their number.
        """
        return self._apply(params, lambda module: module.extend(token_B, cache))


class RegionModule(nn.Module):
    """The flax module of a `RegionLM`; subclasses implement `encode_image`, `embed_inputs` and `split_keys`."""

    c: RegionLM

    def setup_language(self):
        """Submodules for the language model and the configured heads; subclasses call it in `setup`."""
        c = self.c
        width = c.language.width
        self.language = language_model(c.language)
        if c.region_head is not None:
            self.locations = BoxEncoderDecoder(width, c.region_head.box_mlp_dim)
        if c.sam is not None:
            self.mask_prompts = MaskPromptProjector(width, c.num_mask_prompt_tokens, c.sam.prompt_embed_dim)
            self.sam = Sam(c.sam)

    # Implemented by subclasses

    def encode_image(self, batch: Batch):
        """The output of the frozen tower, or `batch.features` if present."""
        raise NotImplementedError

    def embed_inputs(self, batch: Batch, key):
        """Image and prompt embeddings (B, L', D) and their mask (B, L')."""
        raise NotImplementedError

    def embed_row(self, batch: Batch):
        """Image and text embeddings (B, L, D) of rows with several examples, of a model with `ModelInfo.row_layout`."""
        raise NotImplementedError

    def split_keys(self, key):
        """Dropout keys for (input embedding, encoder or decoder-only model, decoder of an encoder-decoder)."""
        raise NotImplementedError

    # Embeddings

    def embed_text(self, ids_BL, batch: Batch, dtype, first_B=0):
        """Token embeddings (B, L, D) with box embeddings at box tokens, from box number `first_B` of each row on."""
        return self.embed_boxes(self.language.embed(ids_BL, dtype), ids_BL, batch, first_B)

    def embed_boxes(self, x_BLD, ids_BL, batch: Batch, first_B=0):
        """x (B, L, D) with box embeddings at the box tokens in `ids_BL`."""
        head = self.c.region_head
        if head is None or batch.boxes_BK4 is None:
            return x_BLD
        box_BKD = self.locations.encode(batch.boxes_BK4)
        return region.scatter_embeddings(x_BLD, ids_BL == head.box_token_id, box_BKD, first_B)

    def embed_target(self, batch: Batch, dtype):
        """Embeddings (B, M, D) of the target; its boxes come after those of the prompt in `batch.boxes_BK4`."""
        first_B = 0
        if self.c.region_head is not None:
            first_B = (batch.prompt_BL == self.c.region_head.box_token_id).sum(axis=1)
        return self.embed_text(batch.target_BM, batch, dtype, first_B)

    def encode_sam_image(self, batch: Batch):
        """SAM's image embedding, shared by all boxes of an image."""
        if batch.features is not None:
            return batch.features["map"].astype(self.c.dtype)
        return self.sam.encode(batch.sam_image_BHWC.astype(self.c.dtype))

    # Training

    def hidden_states(self, batch: Batch, key):
        """States (B, M, D) that predict each target token, and states (B, M, D) after it (see `LanguageBackend`)."""
        input_key, *keys = self.split_keys(key)
        if batch.segment_BL is not None:
            x_BLD = self.embed_row(batch)
            return self.language.forward_segments(x_BLD, batch.segment_BL, batch.target_index_BM, keys[0])
        x_BLD, mask_BL = self.embed_inputs(batch, input_key)
        after = {"after": self.c.region_head is not None} if self.c.is_encoder_decoder else {}
        target_BMD = self.embed_target(batch, x_BLD.dtype)
        return self.language.forward(x_BLD, mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, keys, **after)

    def logits(self, batch: Batch, key=None):
        return self.language.logits(self.hidden_states(batch, key)[0])

    def loss(self, batch: Batch, key):
        head = self.c.region_head
        if self.c.objective == "masks":
            return self.mask_loss(batch, key)
        before_BMD, after_BMD = self.hidden_states(batch, key)
        loss_mask_BM = batch.loss_mask_BM if head is None else region.text_loss_mask(head, batch)
        loss, metrics = token_loss(self.language, before_BMD, batch.target_BM, loss_mask_BM)
        if head is None or batch.boxes_BK4 is None:
            return loss, metrics
        queries = region.gather_region_queries(head, batch, after_BMD)
        terms, more = region.box_losses(head, self.locations, batch, queries)
        terms = {"text": loss} | terms
        metrics |= {f"loss_{name}": term for name, term in terms.items()} | more
        if self.c.objective == "all":
            terms["masks"], more = self.mask_loss(batch, key, queries)
            metrics = more | metrics
        return sum(terms.values()), metrics

    def mask_loss(self, batch: Batch, key, queries=None):
        """Sum of focal, Dice and IoU losses at the region `queries` (gathered if None), and metrics."""
        head, side = self.c.region_head, region.mask_side(batch)
        if queries is None:
            queries = region.gather_region_queries(head, batch, self.hidden_states(batch, key)[1])
        state_BKD = queries[0]
        box_BK4, valid_BK = self.locations.decode(state_BKD), region.has_mask(batch, queries)
        logits_BKHW, iou_BK = self.predict_masks(batch, box_BK4, state_BKD, valid_BK)
        enlarge = functools.partial(sam_decoder.resize_mask_logits, size=side)
        return region.mask_loss(head, batch, queries, logits_BKHW, iou_BK, enlarge)

    # Prediction

    def extract_features(self, batch: Batch):
        features = self.encode_image(batch)
        if batch.sam_image_BHWC is None or self.c.sam is None:
            return features
        features = features if isinstance(features, dict) else {"taps": features}
        return features | {"map": self.encode_sam_image(batch)}

    def predict_boxes(self, batch: Batch):
        after_BMD = self.hidden_states(batch, None)[1]
        state_BKD, _, valid_BK = region.gather_region_queries(self.c.region_head, batch, after_BMD)
        return self.locations.decode(state_BKD), state_BKD, valid_BK

    def predict_masks(self, batch: Batch, box_BK4, state_BKD, valid_BK=None):
        """The first mask of SAM's decoder, prompted with mask tokens from the states and with the box corners."""
        prompt_BKTC = self.mask_prompts(state_BKD.astype(jnp.float32))
        return self.sam.decode_boxes(self.encode_sam_image(batch), box_BK4 * self.c.box_scale, prompt_BKTC, valid_BK)

    # Generation

    def prefill(self, batch: Batch, cache_length: int):
        c = self.c
        x_BLD, mask_BL = self.embed_inputs(batch, None)
        state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B)
        if c.region_head is None:
            return self.language.logits(state_BD), cache
        last_B = last_token(batch.prompt_BL[..., None], batch.prompt_mask_BL)[:, 0]
        is_query_B = (last_B == c.region_head.trigger_token_id) & (not c.is_encoder_decoder)
        regions = region.init_region_state(c.region_head, *state_BD.shape, state_BD.dtype)
        return self._region_logits(state_BD, is_query_B, regions, cache)

    def extend(self, token_B, cache: Cache):
        head, generated = self.c.region_head, cache.generated
        x_BD = self.language.embed_next(token_B, cache)
        if head is None:
            state_BD, cache = self.language.extend(x_BD, cache)
            return self.language.logits(state_BD), cache
        is_query_B = (token_B == head.trigger_token_id) & ~generated["triggered"][0]
        state_BD, cache = self.language.extend(region.next_embedding(self.locations, x_BD, generated), cache)
        return self._region_logits(state_BD, is_query_B, generated["kept"], cache)

    def _region_logits(self, state_BD, is_query_B, regions: dict, cache: Cache):
        logits_BV = self.language.logits(state_BD)
        head = self.c.region_head
        logits_BV, new = region.constrain_logits(head, self.locations, state_BD, logits_BV, is_query_B, regions)
        return logits_BV, dataclasses.replace(cache, generated=cache.generated | new)

    def init_all(self, batch: Batch):
        """Outputs of all submodules, so that `init` creates all parameters."""
        c, outputs = self.c, [self.logits(batch, None)]
        box_B14 = jnp.zeros((1, 1, 4))
        if c.region_head is not None:
            outputs.append(self.locations.decode(self.locations.encode(box_B14)))
        if c.sam is not None:
            image = jnp.zeros((1, c.sam.image_size, c.sam.image_size, 3))
            dense = self.sam.prompts.embed_mask(jnp.zeros((1, 4 * c.sam.grid_size, 4 * c.sam.grid_size)))
            state_B1D = jnp.zeros((1, 1, c.language.width))
            sparse = jnp.concatenate([self.mask_prompts(state_B1D), self.sam.prompts.embed_boxes(box_B14)], axis=2)
            outputs.append(self.sam.decode(self.sam.encode(image), sparse, dense))
        return outputs


class PatchRegionModule(RegionModule):
    """A `RegionModule` whose prompt has an image token for each of CLIP's patches (NExT-Chat, LISA).

    Its config has fields `vision`, `feature_layer` (index of CLIP's hidden state, as in transformers),
    `projector_depth` and `image_token_id`. With its `identity_init_scale` a projector of one layer starts as the
    identity times this, for a ViT that is aligned to the language model's embeddings.
    """

    def setup(self):
        c, width = self.c, self.c.language.width
        self.vision = ViT(c.vision, (c.vision.depth + c.feature_layer,))
        if c.projector_depth == 1:
            init = normal(0.02) if c.identity_init_scale is None else identity_init(c.identity_init_scale)
            self.projector = Dense(c.vision.width, width, ("embed", None), kernel_init=init)
        else:
            self.projector = MLP(c.vision.width, width, "gelu", out_features=width)
        self.setup_language()

    def encode_image(self, batch: Batch):
        """{"patches": CLIP's patches (B, P, D) of `feature_layer` without the class token}, or `batch.features`."""
        if batch.features is not None:
            return jax.tree.map(lambda leaf: leaf.astype(self.c.dtype), batch.features)
        image = batch.image_BHWC
        _, tap_TBPD, _ = self.vision(image.reshape(-1, *image.shape[-3:]).astype(self.c.dtype))
        return {"patches": tap_TBPD[0, :, 1:]}

    def embed_inputs(self, batch: Batch, key):
        """Prompt embeddings (B, L, D) with patches at image tokens and boxes at box tokens, and their mask (B, L)."""
        is_image_BL = batch.prompt_BL == self.c.image_token_id
        image_BPD = repeat_images(self.projector(self.encode_image(batch)["patches"]), batch)
        # The image token may lie outside the vocabulary, so look up id 0 in its place.
        x_BLD = self.language.embed(jnp.where(is_image_BL, 0, batch.prompt_BL), image_BPD.dtype)
        x_BLD = region.scatter_embeddings(x_BLD, is_image_BL, image_BPD)
        return self.embed_boxes(x_BLD, batch.prompt_BL, batch), batch.prompt_mask_BL

    def embed_row(self, batch: Batch):
        is_image_BL = batch.prompt_BL == IMAGE_TOKEN
        image_BPD = self.projector(self.encode_image(batch)["patches"])
        image_BPD = image_BPD.reshape(len(batch.prompt_BL), -1, image_BPD.shape[-1])
        x_BLD = self.language.embed(jnp.where(is_image_BL, 0, batch.prompt_BL), image_BPD.dtype)
        return self.embed_boxes(region.scatter_embeddings(x_BLD, is_image_BL, image_BPD), batch.prompt_BL, batch)

    def split_keys(self, key):
        return None, key, None


def identity_init(scale: float):
    """Initializer of a kernel as `scale` times the identity."""
    return lambda key, shape, dtype=jnp.float32: scale * jnp.eye(*shape, dtype=dtype)


def repeat_images(image, batch: Batch):
    """An array of the images repeated for the rows of text that belong to each (see `Batch`)."""
    rows = len(batch.prompt_BL)
    return image if len(image) == rows else jnp.repeat(image, rows // len(image), axis=0)


def patch_projector_weight_map(projector_depth: int) -> tuple[WeightMapping, ...]:
    """LLaVA's names of the projector of a `PatchRegionModule`."""
    if projector_depth == 1:
        return dense_weight_map("model.mm_projector", "projector")
    layers = (("0", "up"), ("2", "down"))
    return tuple(
        row for torch, flax in layers for row in dense_weight_map(f"model.mm_projector.{torch}", f"projector/{flax}")
    )
