# SPDX-License-Identifier: Apache-2.0
"""PaLM-E (arXiv 2303.03378): a language model that reads sentences with slots for images, states and objects.

The prompt has a placeholder for each token of a slot, in any order. Image tokens are a ViT's patches through an affine
map; a state vector becomes one or several tokens through an MLP; an object becomes one token, the mean of the ViT's
patches under its mask through an affine map, or the ViT's patches of the image outside of which all is zero, as in the
paper. Object tags ("Object 1 is <obj_1>.") are text. There is no released code.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from lionjax.core.errors import check_choices, check_ranges
from lionjax.core.types import VLM, Batch, ModelInfo, SentenceSlots
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.heads.region import scatter_embeddings
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import PALM_8B, DecoderConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import VIT_4B, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.region_lm import PatchRegionModule, RegionLM, identity_init
from lionjax.nn.layers import MLP, Dense, dense_weight_map, normal

OBJECT_MASKING = ("features", "pixels")
MIN_AREA = 1e-6  # added to the patches that an object covers, so that an empty mask gives zeros


@dataclasses.dataclass(frozen=True)
class PalmE(RegionLM):
    """Config of a PaLM-E; the defaults have the sizes of PaLM-E-12B (ViT-4B and PaLM 8B).

    - `feature_layer`: index of the ViT's hidden state, as in transformers: -1 is the output of the last block.
    - `state_width`, `max_states`, `num_state_tokens`, `max_objects`: see `SentenceSlots`. `state_mlp_dim`: hidden units
      of the MLP of states.
    - `object_masking`: "features", one token for each object from the patches under its mask; "pixels", a token for
      each patch of the image that is zero outside of the mask, which takes one pass of the ViT for each object.
    - `image_token_id`: placeholder of each image token; it lies outside the vocabulary. A row may have several images
      (B, K, H, W, C); objects are those of the first.
    - `identity_init_scale`: the affine maps start as the identity times this, for a ViT that is aligned to the language
      model's embeddings; it needs `vision.width` equal to `language.width`.
    """

    vision: ViTConfig = VIT_4B
    language: DecoderConfig = PALM_8B
    feature_layer: int = -1
    state_width: int = 0
    max_states: int = 0
    num_state_tokens: int = 1
    state_mlp_dim: int = 4096
    max_objects: int = 0
    object_masking: Literal["features", "pixels"] = "features"
    image_token_id: int = -200
    dtype: str = "float32"  # of the computation
    identity_init_scale: float | None = None

    def __post_init__(self):
        check_choices(self, object_masking=OBJECT_MASKING)
        check_ranges(self, "model.", state_mlp_dim=">= 1")
        _ = self.slots  # checks their numbers
        if self.image_token_id >= 0:
            raise ValueError(f"image_token_id is {self.image_token_id}; give a number below 0, outside the vocabulary")
        if self.identity_init_scale is not None and self.vision.width != self.language.width:
            raise ValueError(
                f"identity_init_scale needs vision.width ({self.vision.width}) equal to language.width "
                f"({self.language.width}); set it to None"
            )

    is_encoder_decoder = False
    objective = "text"
    projector_depth = 1
    region_head = None
    sam = None

    @property
    def slots(self) -> SentenceSlots:
        """The slots of states and objects."""
        num_object_tokens = 1 if self.object_masking == "features" else self.vision.num_patches
        counts = (self.state_width, self.max_states, self.num_state_tokens, self.max_objects)
        return SentenceSlots(*counts, num_object_tokens)

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            slots=self.slots,
            has_features=not self.max_objects or self.object_masking == "features",
            default_processor={"max_prompt_tokens": 512, "num_image_tokens": self.vision.num_patches},
        )

    def module(self) -> PalmEModule:
        return PalmEModule(self)

    def predict_boxes(self, params, batch: Batch):
        """Raises UserError: it has no boxes."""
        return VLM.predict_boxes(self, params, batch)

    def predict_masks(self, params, batch: Batch, box_BK4, state_BKD, valid_BK=None):
        """Raises UserError: it has no masks."""
        return VLM.predict_masks(self, params, batch, box_BK4, state_BKD, valid_BK)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of this project, as there is no released code: those of EVA and LLaMA in their parts."""
        return (
            *with_prefix("vision_tower.", "vision/", vit.tower_weight_map(self.vision, vit.clip_weight_map)),
            *dense_weight_map("image_projector", "projector"),
            *(dense_weight_map("object_projector", "object_projector") if self.max_objects else ()),
            *(dense_weight_map("state_encoder.0", "state_encoder/up") if self.max_states else ()),
            *(dense_weight_map("state_encoder.2", "state_encoder/down") if self.max_states else ()),
            *with_prefix("language_model.", "language/", decoder_weights.weight_map(self.language)),
        )


class PalmEModule(PatchRegionModule):
    c: PalmE

    def setup(self):
        super().setup()
        c, width = self.c, self.c.language.width
        if c.max_states:
            outputs = c.num_state_tokens * width
            self.state_encoder = MLP(c.state_width, c.state_mlp_dim, "gelu", out_features=outputs)
        if c.max_objects:
            init = normal(0.02) if c.identity_init_scale is None else identity_init(c.identity_init_scale)
            self.object_projector = Dense(c.vision.width, width, ("embed", None), kernel_init=init)

    def encode_image(self, batch: Batch):
        """The ViT's patches (B, K P, D) of K images a row without the class token; `batch.features` if present."""
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        return self.encode_pixels(batch.image_BHWC)

    def encode_pixels(self, image_BKHWC):
        """The ViT's patches (B, K P, D) of images (B, K, H, W, C) or (B, H, W, C)."""
        flat = image_BKHWC.reshape(-1, *image_BKHWC.shape[-3:]).astype(self.c.dtype)
        _, image_TBPD, _ = self.vision(flat)
        return image_TBPD[0, :, 1:].reshape(len(image_BKHWC), -1, self.c.vision.width)

    def encode_states(self, state_BKS):
        """Tokens (B, K T, D) of state vectors."""
        return self.state_encoder(state_BKS.astype(self.c.dtype)).reshape(len(state_BKS), -1, self.c.language.width)

    def encode_objects(self, batch: Batch, image_BPD):
        """Tokens (B, K, D), or (B, K P, D) with masked pixels, of the objects in the first image of each row."""
        c, mask_BKHW = self.c, batch.object_mask_BKHW
        if c.object_masking == "pixels":
            image_BHWC = batch.image_BHWC if batch.image_BHWC.ndim == 4 else batch.image_BHWC[:, 0]
            return self.object_projector(self.encode_pixels(image_BHWC[:, None] * mask_BKHW[..., None]))
        share_BKP = patch_shares(mask_BKHW, c.vision.patch_size).astype(image_BPD.dtype)
        total_BKD = share_BKP @ image_BPD[:, : c.vision.num_patches]
        return self.object_projector(total_BKD / (share_BKP.sum(axis=2, keepdims=True) + MIN_AREA))

    def embed_inputs(self, batch: Batch, key):
        """Prompt embeddings (B, L, D) with the tokens of all slots at their placeholders, and their mask (B, L)."""
        ids_BL, slots = batch.prompt_BL, self.c.slots
        image_BPD = self.encode_image(batch)
        # Placeholders lie outside the vocabulary, so look up id 0 in their places.
        x_BLD = self.language.embed(jnp.maximum(ids_BL, 0), image_BPD.dtype)
        x_BLD = scatter_embeddings(x_BLD, ids_BL == self.c.image_token_id, self.projector(image_BPD))
        if slots.max_states:
            x_BLD = scatter_embeddings(x_BLD, ids_BL == slots.state_token_id, self.encode_states(batch.state_BKS))
        if slots.max_objects:
            objects_BKD = self.encode_objects(batch, image_BPD)
            x_BLD = scatter_embeddings(x_BLD, ids_BL == slots.object_token_id, objects_BKD)
        return x_BLD, batch.prompt_mask_BL


def patch_shares(mask_BKHW, patch_size: int):
    """Masks (B, K, H, W) as the share of each patch that they cover, (B, K, P) in 0..1."""
    rows, count, height, width = mask_BKHW.shape
    grid = mask_BKHW.reshape(rows, count, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.astype(jnp.float32).mean(axis=(3, 5)).reshape(rows, count, -1)
