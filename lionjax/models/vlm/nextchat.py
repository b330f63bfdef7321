# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat (arXiv 2311.04498): boxes as input and output embeddings of a language model (pix2emb).

Projected patches replace the image tokens of the prompt, and box embeddings its box tokens. To predict a region, the
model generates the trigger token (region query): its hidden state is decoded to a box, the embedding of that box is
the next input, and SAM decodes a mask from state and box.
"""

from __future__ import annotations

import dataclasses

from lionjax.core.errors import check_choices
from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.types import ModelInfo, RowLayout
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, RegionHeadConfig
from lionjax.models.language import decoder_weights
from lionjax.models.language.backend import row_layout
from lionjax.models.language.decoder import VICUNA_7B, DecoderConfig
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_encoder import SAM_VIT_H, SamConfig
from lionjax.models.vision.vit import CLIP_VIT_L, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.region_lm import PatchRegionModule, RegionLM, patch_projector_weight_map

LOSS_VARIANTS = ("paper", "released_code")


@renamed_fields(losses=Renamed("loss_variant", {"intended": "paper", "original": "released_code"}))
@dataclasses.dataclass(frozen=True)
class NextChat(RegionHeadConfig, RegionLM):
    """Config of a NExT-Chat; the defaults are those of the 7B release.

    - `feature_layer`: index of CLIP's hidden state, as in transformers: -2 is the output of the last block but one.
    - `objective`: "language" in stages 1 and 2 (text and boxes), "masks" in stage 3; "all" trains both in one forward
      pass, as LISA does (arXiv 2308.00692).
    - `loss_variant`: "released_code" keeps the mistaken constants of the released code (see `losses.mask_losses` and
      `losses.giou_loss`). `giou_weight` is 0.8 in the paper and 0.2 in the code.
    - `box_scale`: boxes in 0..1 times this are pixels of SAM's input.
    """

    vision: ViTConfig = CLIP_VIT_L
    language: DecoderConfig = dataclasses.replace(VICUNA_7B, vocab_size=32005)
    sam: SamConfig = SAM_VIT_H
    feature_layer: int = -2
    projector_depth: int = 2
    box_scale: float = 1024.0
    image_token_id: int = 32000
    objective: str = "language"
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        check_choices(self, objective=OBJECTIVES, loss_variant=LOSS_VARIANTS, projector_depth=(1, 2))

    @property
    def identity_init_scale(self) -> None:
        """Its projector starts at random."""
        return None

    @property
    def region_head(self) -> RegionHeadConfig:
        names = {field.name for field in dataclasses.fields(RegionHeadConfig)}
        return RegionHeadConfig(**{name: getattr(self, name) for name in names})

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            box_token=self.box_token_id,
            row_layout=self._row_layout(),
            default_processor={
                "pad_to_square": True,
                "max_prompt_tokens": 768,
                "num_image_tokens": self.vision.num_patches,
                "box_format": "embeddings",
                "max_boxes": self.max_boxes,
                "sam_image_size": self.sam.image_size,
            },
            prompt_format="nextchat",
        )

    def _row_layout(self) -> RowLayout | None:
        """None where masks are trained: SAM reads one image for each row."""
        if self.objective != "language":
            return None
        return row_layout(
            self.language,
            image_token_id=self.image_token_id,
            tokens_per_image=self.vision.num_patches,
            is_expanded=True,
            box_token_id=self.box_token_id,
        )

    def module(self) -> NextChatModule:
        return NextChatModule(self)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the NExT-Chat release."""
        return weight_map(self)


class NextChatModule(PatchRegionModule):
    c: NextChat


def weight_map(c: NextChat) -> tuple[WeightMapping, ...]:
    """Names of the release's state dict, which includes CLIP and SAM."""
    return (
        *with_prefix(
            "model.vision_tower.vision_model.", "vision/", vit.tower_weight_map(c.vision, vit.clip_weight_map)
        ),
        *patch_projector_weight_map(c.projector_depth),
        *with_prefix("", "language/", decoder_weights.llama_weight_map(c.language)),
        *with_prefix("", "locations/", region.box_coder_weight_map()),
        *with_prefix("", "mask_prompts/", region.mask_prompt_weight_map()),
        *with_prefix("sam.model.", "sam/", sam_decoder.original_weight_map(c.sam)),
    )
