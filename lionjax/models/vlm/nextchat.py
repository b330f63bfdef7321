# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat (arXiv 2311.04498): a language model that reads and says places as embeddings (pix2emb).

The picture's patches stand as words where the prompt has its image tokens, and a box stands where it has a location
token, as an embedding. To say a place, the model writes the trigger token: its state there is read as a box, the box
goes back in as the next word, and the same state with the box asks SAM for a mask.
"""

from __future__ import annotations

import dataclasses

import jax

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
from lionjax.models.vlm.region_lm import RegionLM, RegionModule
from lionjax.nn.layers import MLP, Dense, dense_weight_map

LOSS_VARIANTS = ("paper", "released_code")


@renamed_fields(
    location_hidden="box_mlp_dim",
    mask_tokens="num_mask_prompt_tokens",
    image_token="image_token_id",
    trigger_token="trigger_token_id",
    location_token="box_token_id",
    losses=Renamed("loss_variant", {"intended": "paper", "original": "released_code"}),
)
@dataclasses.dataclass(frozen=True)
class NextChat(RegionLM):
    """A NExT-Chat by its parts' sizes; the defaults are those of the 7B release.

    `feature_layer` counts CLIP's hidden states as transformers does: -2 is the output of the last block but one.
    `objective` is "language" in stages 1 and 2 (words and boxes) and "masks" in stage 3; "all" learns both at once, as
    LISA does (arXiv 2308.00692), from one reading. `loss_variant`: "released_code" has the
    constants that the released code has by mistake (see `losses.mask_losses`, `losses.giou_loss`). The paper's
    `giou_weight` is 0.8, the code's 0.2. `box_scale`: what 1 of a box is in the pixels that SAM's prompts are told in.
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
    max_boxes: int = 8  # kept of an answer
    l1_weight: float = 2.0
    giou_weight: float = 0.2
    cycle_weight: float = 1.0
    focal_weight: float = 20.0
    objective: str = "language"
    loss_variant: str = "paper"
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        known = {"objective": OBJECTIVES, "loss_variant": LOSS_VARIANTS, "projector_depth": (1, 2)}
        for field, values in known.items():
            if getattr(self, field) not in values:
                text = ", ".join(map(str, values))
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")

    @property
    def is_encoder_decoder(self) -> bool:
        return False

    @property
    def region_head(self) -> RegionHeadConfig:
        names = {field.name for field in dataclasses.fields(RegionHeadConfig)}
        return RegionHeadConfig(**{name: getattr(self, name) for name in names})

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.language.vocab_size,
            embedding_rows=self.language.padded_vocab_size,
            end_token=self.language.eos_token_id,
            is_encoder_decoder=False,
            splices_images=True,
            image_token=self.image_token_id,
            box_token=self.box_token_id,
            image_size=self.vision.image_size,
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
        """CLIP's patches (B, P, D) of the feature layer, without the class token, under "patches"."""
        if batch.features is not None:
            return jax.tree.map(lambda leaf: leaf.astype(self.c.dtype), batch.features)
        _, tap_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return {"patches": tap_TBPD[0, :, 1:]}

    def embed_inputs(self, batch: Batch, key):
        """The prompt (B, L, D) with image tokens and boxes at their places, and its mask."""
        image_BPD = self.projector(self.encode_image(batch)["patches"])
        x_BLD = self.language.embed(batch.prompt_BL, image_BPD.dtype)
        x_BLD = region.scatter_embeddings(x_BLD, batch.prompt_BL == self.c.image_token_id, image_BPD)
        return self.embed_boxes(x_BLD, batch.prompt_BL, batch), batch.prompt_mask_BL

    def split_keys(self, key):
        return None, key, None


def weight_map(c: NextChat) -> tuple[WeightMapping, ...]:
    """The release's state dict, with CLIP and SAM inside."""
    if c.projector_depth == 1:
        projector = dense_weight_map("model.mm_projector", "projector")
    else:
        projector = (
            *dense_weight_map("model.mm_projector.0", "projector/up"),
            *dense_weight_map("model.mm_projector.2", "projector/down"),
        )
    # A tower that is no CLIP keeps its own names within.
    vision = vit.clip_weight_map(c.vision) if c.vision.pre_layernorm else vit.eva_weight_map(c.vision)
    return (
        *with_prefix("model.vision_tower.vision_model.", "vision/", vision),
        *projector,
        *with_prefix("", "language/", decoder_weights.llama_weight_map(c.language)),
        *with_prefix("", "locations/", region.box_coder_weight_map()),
        *with_prefix("", "mask_prompts/", region.mask_prompt_weight_map()),
        *with_prefix("sam.model.", "sam/", sam_decoder.original_weight_map(c.sam)),
    )
