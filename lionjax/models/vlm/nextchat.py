# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat (arXiv 2311.04498): boxes as input and output embeddings of a language model (pix2emb).

Projected patches replace the image tokens of the prompt, and box embeddings its box tokens. To predict a region, the
model generates the trigger token (region query): its hidden state is decoded to a box, the embedding of that box is
the next input, and SAM decodes a mask from state and box.
"""

from __future__ import annotations

import dataclasses

import jax

from lionjax.core.errors import check_choices
from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.types import Batch, ModelInfo
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, RegionHeadConfig
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import VICUNA_7B, DecoderConfig
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_encoder import SAM_VIT_H, SamConfig
from lionjax.models.vision.vit import CLIP_VIT_L, ViT, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.region_lm import RegionLM, RegionModule
from lionjax.nn.layers import MLP, Dense, dense_weight_map

LOSS_VARIANTS = ("paper", "released_code")


@renamed_fields(losses=Renamed("loss_variant", {"intended": "paper", "original": "released_code"}))
@dataclasses.dataclass(frozen=True)
class NextChat(RegionLM):
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
    box_mlp_dim: int = 2048
    num_mask_prompt_tokens: int = 4
    box_scale: float = 1024.0
    image_token_id: int = 32000
    trigger_token_id: int = 32003
    box_token_id: int = 32004
    max_boxes: int = 8  # in one answer
    l1_weight: float = 2.0
    giou_weight: float = 0.2
    cycle_weight: float = 1.0
    focal_weight: float = 20.0
    objective: str = "language"
    loss_variant: str = "paper"
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        check_choices(self, objective=OBJECTIVES, loss_variant=LOSS_VARIANTS, projector_depth=(1, 2))

    @property
    def is_encoder_decoder(self) -> bool:
        return False

    @property
    def region_head(self) -> RegionHeadConfig:
        names = {field.name for field in dataclasses.fields(RegionHeadConfig)}
        return RegionHeadConfig(**{name: getattr(self, name) for name in names})

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            box_token=self.box_token_id,
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

    def module(self) -> NextChatModule:
        return NextChatModule(self)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the NExT-Chat release."""
        return weight_map(self)


class NextChatModule(RegionModule):
    c: NextChat

    def setup(self):
        c, width = self.c, self.c.language.width
        self.vision = ViT(c.vision, (c.vision.depth + c.feature_layer,))
        if c.projector_depth == 1:
            self.projector = Dense(c.vision.width, width, ("embed", None))
        else:
            self.projector = MLP(c.vision.width, width, "gelu", out_features=width)
        self.setup_language()

    def encode_image(self, batch: Batch):
        """{"patches": CLIP's patches (B, P, D) of `feature_layer` without the class token}, or `batch.features`."""
        if batch.features is not None:
            return jax.tree.map(lambda leaf: leaf.astype(self.c.dtype), batch.features)
        _, tap_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return {"patches": tap_TBPD[0, :, 1:]}

    def embed_inputs(self, batch: Batch, key):
        """Prompt embeddings (B, L, D) with patches at image tokens and boxes at box tokens, and their mask (B, L)."""
        image_BPD = self.projector(self.encode_image(batch)["patches"])
        x_BLD = self.language.embed(batch.prompt_BL, image_BPD.dtype)
        x_BLD = region.scatter_embeddings(x_BLD, batch.prompt_BL == self.c.image_token_id, image_BPD)
        return self.embed_boxes(x_BLD, batch.prompt_BL, batch), batch.prompt_mask_BL

    def split_keys(self, key):
        return None, key, None


def weight_map(c: NextChat) -> tuple[WeightMapping, ...]:
    """Names of the release's state dict, which includes CLIP and SAM."""
    if c.projector_depth == 1:
        projector = dense_weight_map("model.mm_projector", "projector")
    else:
        projector = (
            *dense_weight_map("model.mm_projector.0", "projector/up"),
            *dense_weight_map("model.mm_projector.2", "projector/down"),
        )
    # A tower other than CLIP keeps its own names inside.
    vision = vit.clip_weight_map(c.vision) if c.vision.pre_layernorm else vit.eva_weight_map(c.vision)
    return (
        *with_prefix("model.vision_tower.vision_model.", "vision/", vision),
        *projector,
        *with_prefix("", "language/", decoder_weights.llama_weight_map(c.language)),
        *with_prefix("", "locations/", region.box_coder_weight_map()),
        *with_prefix("", "mask_prompts/", region.mask_prompt_weight_map()),
        *with_prefix("sam.model.", "sam/", sam_decoder.original_weight_map(c.sam)),
    )
