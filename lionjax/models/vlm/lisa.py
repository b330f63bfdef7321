# SPDX-License-Identifier: Apache-2.0
"""LISA (arXiv 2308.00692): a language model that answers with masks, by reasoning about what is asked.

LLaVA reads the image through CLIP and writes the token [SEG] where its answer has a mask. The hidden state that
predicts the token is projected to the one prompt of SAM's mask decoder, which reads the same image in SAM's size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.types import VLM, Batch, Cache, ModelInfo
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.heads import mask_token, region
from lionjax.models.language import decoder_weights, t5
from lionjax.models.language.backend import is_encoder_decoder, token_loss
from lionjax.models.language.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_encoder import SAM_VIT_H, SamConfig
from lionjax.models.vision.vit import CLIP_VIT_L, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.region_lm import PatchRegionModule, RegionLM, patch_projector_weight_map, repeat_images
from lionjax.nn.positions import last_token, states_before


@dataclasses.dataclass(frozen=True)
class Lisa(RegionLM):
    """Config of a LISA; the defaults are those of LISA-7B-v1. Its language model may also be a T5.

    - `feature_layer`: index of CLIP's hidden state, as in transformers: -2 is the output of the last block but one.
    - `mask_token_id`: [SEG]. `max_masks`: in one answer; further ones have no mask.
    - `identity_init_scale`: see `PatchRegionModule`; it needs `vision.width` equal to `language.width`.
    - `text_weight`, `bce_weight`, `dice_weight`: of the three losses; `dice_scale`: see `losses.bce_dice_losses`.
    """

    vision: ViTConfig = dataclasses.replace(CLIP_VIT_L, image_size=224)
    language: T5Config | DecoderConfig = dataclasses.replace(VICUNA_7B, vocab_size=32003)
    sam: SamConfig = SAM_VIT_H
    feature_layer: int = -2
    projector_depth: int = 1
    image_token_id: int = -200  # LLaVA's placeholder, outside the vocabulary
    mask_token_id: int = 32000
    max_masks: int = 8
    text_weight: float = 1.0
    bce_weight: float = 2.0
    dice_weight: float = 0.5
    dice_scale: float = 1000.0
    dtype: str = "float32"  # of the computation
    identity_init_scale: float | None = None

    def __post_init__(self):
        check_choices(self, projector_depth=(1, 2))
        if self.identity_init_scale is not None and self.vision.width != self.language.width:
            raise ValueError(
                f"identity_init_scale needs vision.width ({self.vision.width}) equal to language.width "
                f"({self.language.width}); set it to None"
            )

    @property
    def is_encoder_decoder(self) -> bool:
        return is_encoder_decoder(self.language)

    @property
    def region_head(self) -> None:
        """It has no boxes."""
        return None

    @property
    def num_mask_prompt_tokens(self) -> int:
        return 1

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            mask_token=self.mask_token_id,
            default_image_fit={"mode": "shortest_edge"},  # and a center crop, as CLIP's image processor
            default_processor={
                "max_prompt_tokens": 512,
                "num_image_tokens": self.vision.num_patches,
                "box_format": "masks",
                "max_boxes": self.max_masks,
                "sam_image_size": self.sam.image_size,
                "sam_padding": "corner",
            },
            prompt_format="lisa",
        )

    def module(self) -> LisaModule:
        return LisaModule(self)

    def predict_boxes(self, params, batch: Batch):
        """Raises UserError: masks have no boxes."""
        return VLM.predict_boxes(self, params, batch)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the LISA release, whose file leaves out CLIP."""
        return weight_map(self)


LISA_7B = Lisa()
LISA_13B = Lisa(language=dataclasses.replace(VICUNA_13B, vocab_size=32003))


class LisaModule(PatchRegionModule):
    c: Lisa

    def states_before(self, batch: Batch, key=None):
        """States (B, L + M, D) that predict each token of prompt and target (see `Decoder.forward_row`).

        A T5 predicts no token of the prompt: there, 0.
        """
        if self.c.is_encoder_decoder:
            length = batch.prompt_BL.shape[1]
            return jnp.pad(self.hidden_states(batch, key)[0], ((0, 0), (length, 0), (0, 0)))
        x_BLD, mask_BL = self.embed_inputs(batch, None)
        target_BMD = self.embed_target(batch, x_BLD.dtype)
        return self.language.forward_row(x_BLD, mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, key)[0]

    def mask_states(self, batch: Batch, before_BLD, count: int):
        """States (B, K, D) of the masks of prompt and target, and their mask (B, K); with a T5 of the target alone."""
        ids_BL = jnp.concatenate([batch.prompt_BL, batch.target_BM], axis=1)
        real_BL = batch.prompt_mask_BL * (not self.c.is_encoder_decoder)
        real_BL = jnp.concatenate([real_BL, batch.target_mask_BM], axis=1).astype(bool)
        return mask_token.gather_mask_states((ids_BL == self.c.mask_token_id) & real_BL, before_BLD, count)

    def loss(self, batch: Batch, key):
        c = self.c
        before_BLD = self.states_before(batch, key)
        before_BMD = before_BLD[:, batch.prompt_BL.shape[1] :]
        text, metrics = token_loss(self.language, before_BMD, batch.target_BM, batch.loss_mask_BM)
        terms = {"text": c.text_weight * text}
        if batch.masks_BKHW is not None:
            terms |= self.mask_terms(batch, before_BLD)
        return sum(terms.values()), metrics | {f"loss_{name}": term for name, term in terms.items()}

    def mask_terms(self, batch: Batch, before_BLD) -> dict[str, jax.Array]:
        """The weighted losses of the masks."""
        c = self.c
        state_BKD, valid_BK = self.mask_states(batch, before_BLD, batch.masks_BKHW.shape[1])
        if batch.masks_mask_BK is not None:
            valid_BK = valid_BK & batch.masks_mask_BK.astype(bool)
        logits_BKHW, _ = self.predict_masks(batch, None, state_BKD, valid_BK)
        terms = mask_token.mask_token_losses(batch, logits_BKHW, valid_BK, c.sam.image_size, c.dice_scale)
        return {"bce": c.bce_weight * terms["bce"], "dice": c.dice_weight * terms["dice"]}

    def predict_masks(self, batch: Batch, box_BK4, state_BKD, valid_BK=None):
        """The first mask of SAM's decoder, prompted with one token from each state; `box_BK4` is not read."""
        prompt_BKTC = self.mask_prompts(state_BKD.astype(jnp.float32))
        return self.sam.decode_valid(repeat_images(self.encode_sam_image(batch), batch), prompt_BKTC, valid_BK)

    # Generation

    def prefill(self, batch: Batch, cache_length: int):
        x_BLD, mask_BL = self.embed_inputs(batch, None)
        if self.c.is_encoder_decoder:
            state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B)
            before_BLD = jnp.zeros_like(x_BLD)
        else:
            state_BLD, cache = self.language.prefill_states(x_BLD, mask_BL, cache_length, batch.task_B)
            state_BD, before_BLD = last_token(state_BLD, mask_BL), states_before(state_BLD)
        # A mask token of the prompt has a mask too, as in the original; with a T5 it only takes a slot.
        is_token_BL = (batch.prompt_BL == self.c.mask_token_id) & mask_BL.astype(bool)
        first_BKD, valid_BK = mask_token.gather_mask_states(is_token_BL, before_BLD, self.c.max_masks)
        missing = self.c.max_masks - first_BKD.shape[1]  # of a prompt with fewer tokens
        first_BKD = jnp.pad(first_BKD * valid_BK[..., None], ((0, 0), (0, missing), (0, 0)))
        kept = {"state": first_BKD[None], "count": valid_BK.sum(axis=1, dtype=jnp.int32)[None]}
        return self._logits_and_cache(state_BD, kept, cache)

    def extend(self, token_B, cache: Cache):
        kept = cache.generated["kept"]
        state_BD, cache = self.language.extend(self.language.embed_next(token_B, cache), cache)
        kept = kept | {"count": kept["count"] + (token_B == self.c.mask_token_id)}
        return self._logits_and_cache(state_BD, kept, cache)

    def _logits_and_cache(self, state_BD, kept: dict, cache: Cache):
        generated = cache.generated | {"kept": mask_token.keep_state(state_BD, kept)}
        return self.language.logits(state_BD), dataclasses.replace(cache, generated=generated)


def weight_map(c: Lisa) -> tuple[WeightMapping, ...]:
    """Names of LISA's state dict with LoRA merged, and of its CLIP, which the release leaves out.

    No release has a T5: its names are those of transformers behind "t5_model.".
    """
    tower = "model.vision_tower.vision_tower.vision_model."
    fcs = "model.text_hidden_fcs.0."
    if c.is_encoder_decoder:
        language_map = with_prefix("t5_model.", "language/", t5.weight_map(c.language))
    else:
        language_map = with_prefix("", "language/", decoder_weights.llama_weight_map(c.language))
    return (
        *with_prefix(tower, "vision/", vit.tower_weight_map(c.vision, vit.clip_weight_map)),
        *patch_projector_weight_map(c.projector_depth),
        *language_map,
        *with_prefix(fcs, "mask_prompts/mlp/", region.relu_mlp_weight_map()),
        *with_prefix("model.visual_model.", "sam/", sam_decoder.original_weight_map(c.sam)),
    )
