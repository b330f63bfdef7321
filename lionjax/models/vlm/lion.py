# SPDX-License-Identifier: Apache-2.0
"""LION (CVPR 2024, arXiv 2311.11860): Q-Former and vision aggregator, tags with a soft prompt, routed adapters.

The frozen ViT encodes the image once. The Q-Former reads its last layer and the question; the vision aggregator reads
several of its layers; both outputs are projected to image tokens of the language model's width. In the prompt, a
learned embedding (the soft prompt) replaces one token before the image tags. T5 reads image tokens and prompt; its
adapters are mixed by the task of each row.

Beyond the paper, `region_head` adds NExT-Chat's heads (arXiv 2311.04498): boxes as input and output embeddings, and
masks from them. The language model may also be a decoder-only one.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import Batch, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import Aggregator, AggregatorConfig, QFormer, QFormerConfig
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, RegionHeadConfig
from lionjax.models.language import decoder_weights, t5
from lionjax.models.language.backend import is_encoder_decoder
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.vit import ViT, ViTConfig
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.region_lm import RegionLM, RegionModule
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_weight_map, norm_weight_map, normal, split_key

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
PROJECTION_EPS = 1e-5  # torch's default, unlike the ViT's 1e-6


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Lion(RegionLM):
    """Config of a LION.

    - `visual_input`: connectors in use: "QFORMER" in stage 1, "AGGREGATOR" in stage 2, "ALL" in stage 3.
    - `identity_init_scale`: for a ViT aligned to the language model's embeddings: the aggregator's projector starts as
      the identity times this scale. None: projectors with small random weights, as in the original.
    - `region_head`: boxes as embeddings; `sam`: masks from them, trained if `objective` is not "language" (see
      `nextchat.NextChat`).
    """

    vision: ViTConfig
    qformer: QFormerConfig
    aggregator: AggregatorConfig
    language: T5Config | DecoderConfig
    soft_prompt_token_id: int | None = 32099  # <extra_id_0>; None: no soft prompt and no tags
    visual_input: str = "ALL"
    dtype: str = "float32"  # of the computation
    region_head: RegionHeadConfig | None = None
    sam: SamConfig | None = None
    objective: str = "language"
    identity_init_scale: float | None = None

    def __post_init__(self):
        check_choices(self, visual_input=VISUAL_INPUTS, objective=OBJECTIVES)
        widths = self.vision.width, self.language.width, self.aggregator.projector_mlp_dim / 2
        if self.identity_init_scale is not None and len(set(widths)) > 1:
            raise ValueError(
                f"identity_init_scale needs vision.width ({self.vision.width}) equal to language.width "
                f"({self.language.width}) and aggregator.projector_mlp_dim ({self.aggregator.projector_mlp_dim}) twice "
                "as large"
            )
        if (self.sam is not None and self.region_head is None) or (self.objective != "language" and self.sam is None):
            missing = "region_head" if self.region_head is None else "sam"
            raise ValueError(f"{missing} is None, but masks need both region_head and sam; set {missing}")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder (T5)."""
        return is_encoder_decoder(self.language)

    @property
    def taps(self) -> tuple[int, ...]:
        """Indices of the ViT layers in use: those of the aggregator's context, then that of its queries."""
        return (*self.aggregator.context_layers, self.aggregator.query_layer)

    @property
    def box_scale(self) -> float:
        """Side of SAM's input in pixels; boxes in 0..1 are multiplied by it."""
        return float(self.sam.image_size)

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            box_token=None if self.region_head is None else self.region_head.box_token_id,
            reads_question=self.qformer.use_text_input,
            question_vocab_size=self.qformer.vocab_size,
            default_processor=self.qformer.default_processor,
            prompt_format="lion",
        )

    def answer_features(self, params: Params, batch: Batch):
        """{"taps": the layer that the Q-Former reads (B, 1, 1 + P, D), "aggregated": the aggregator's image tokens}."""
        return self._apply(params, lambda module: module.answer_features(batch))

    def module(self) -> LionModule:
        return LionModule(self)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the LION release, with those of eva_vit_g.pth for the ViT and of Hugging Face's T5."""
        return weight_map(self)


def identity_mlp_init(scale: float):
    """Initializer of both kernels of an MLP with hidden size 2 x width, so that it computes `scale` times the identity.

    It uses gelu(x) - gelu(-x) = x.
    """

    def init(key, shape, dtype=jnp.float32):
        width = min(shape)
        kernel = jnp.concatenate([jnp.eye(width), -jnp.eye(width)], axis=1) * scale**0.5
        return (kernel if shape[0] == width else kernel.T).astype(dtype)

    return init


class LionModule(RegionModule):
    c: Lion

    def setup(self):
        c = self.c
        width = c.language.width
        self.vision = ViT(c.vision, c.taps)
        if c.visual_input != "AGGREGATOR":
            self.qformer_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            self.qformer = QFormer(c.qformer)
            init = normal(0.02 if c.identity_init_scale is None else c.identity_init_scale * c.qformer.width**-0.5)
            self.qformer_projector = Dense(c.qformer.width, width, ("embed", None), kernel_init=init)
        if c.visual_input != "QFORMER":
            self.aggregator = Aggregator(c.aggregator)
            self.aggregator_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            init = normal(0.02) if c.identity_init_scale is None else identity_mlp_init(c.identity_init_scale)
            self.aggregator_projector = MLP(
                c.vision.width, c.aggregator.projector_mlp_dim, out_features=width, kernel_init=init
            )
        if c.soft_prompt_token_id is not None:
            self.soft_prompt = self.param("soft_prompt", with_logical_partitioning(normal(1.0), ("embed",)), (width,))
        self.setup_language()

    def encode_image(self, batch: Batch):
        """Outputs (B, T, 1 + P, D) of the ViT layers `Lion.taps`, with the class token; `batch.features` if present."""
        if batch.features is not None:
            features = batch.features
            return (features["taps"] if isinstance(features, dict) else features).astype(self.c.dtype)
        _, image_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return image_TBPD.transpose(1, 0, 2, 3)

    def embed_image(self, batch: Batch, key):
        """Image tokens (B, P', D) of the language model's width: those of the Q-Former, then of the aggregator."""
        c, keys = self.c, split_key(key, 2)
        image_TBPD = self.encode_image(batch).transpose(1, 0, 2, 3)
        tokens = []
        if c.visual_input != "AGGREGATOR":
            normed_BPD = self.qformer_norm(image_TBPD[-1])
            query_BLD = self.qformer(normed_BPD, batch.question_BL, batch.question_mask_BL, keys[0])
            tokens.append(self.qformer_projector(query_BLD[:, : c.qformer.num_query_tokens]))
        if c.visual_input != "QFORMER":
            tokens.append(self.aggregate(batch, image_TBPD, keys[1]))
        return jnp.concatenate(tokens, axis=1)

    def aggregate(self, batch: Batch, image_TBPD, key=None):
        """The aggregator's image tokens (B, 1 + P, D), those of `answer_features` if the batch has them."""
        if isinstance(batch.features, dict) and "aggregated" in batch.features:
            return batch.features["aggregated"].astype(self.c.dtype)
        aggregated_BPD = self.aggregator(image_TBPD[-1], image_TBPD[:-1], key)
        return self.aggregator_projector(self.aggregator_norm(aggregated_BPD))

    def answer_features(self, batch: Batch):
        image_BTPD = self.encode_image(batch)
        features = {"taps": image_BTPD[:, -1:]}
        if self.c.visual_input != "QFORMER":
            features["aggregated"] = self.aggregate(batch, image_BTPD.transpose(1, 0, 2, 3))
        return features

    def embed_text(self, ids_BL, batch: Batch, dtype, first_B=0):
        """As in `RegionModule`, with the learned soft prompt in place of its token."""
        c = self.c
        x_BLD = self.language.embed(ids_BL, dtype)
        if c.soft_prompt_token_id is not None:
            is_soft_prompt_BL1 = (ids_BL == c.soft_prompt_token_id)[..., None]
            x_BLD = jnp.where(is_soft_prompt_BL1, self.soft_prompt.astype(x_BLD.dtype), x_BLD)
        return self.embed_boxes(x_BLD, ids_BL, batch, first_B)

    def embed_inputs(self, batch: Batch, key):
        """Image tokens followed by the prompt (B, L', D), and their mask (B, L')."""
        image_BPD = self.embed_image(batch, key)
        prompt_BLD = self.embed_text(batch.prompt_BL, batch, image_BPD.dtype)
        mask_BP = jnp.ones(image_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([mask_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        return jnp.concatenate([image_BPD, prompt_BLD], axis=1), mask_BL

    def split_keys(self, key):
        first, second = split_key(key, 2)
        if not self.c.is_encoder_decoder:
            return first, second, None
        return *split_key(first, 2), second


def weight_map(c: Lion) -> tuple[WeightMapping, ...]:
    """Names of LION's state dict, with one adapter (stages 1 and 2) or two and a router (stage 3) as configured.

    Box and mask heads have NExT-Chat's names.
    """
    rows = [*with_prefix("visual_encoder.", "vision/", vit.eva_weight_map(c.vision))]
    if c.visual_input != "AGGREGATOR":
        rows += [
            *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
            *with_prefix("Qformer.bert.", "qformer/", qformer.lavis_weight_map(c.qformer)),
            *norm_weight_map("ln_vision", "qformer_norm"),
            *dense_weight_map("t5_proj", "qformer_projector"),
        ]
    if c.visual_input != "QFORMER":
        rows += [
            *with_prefix("fusion_adapter.", "aggregator/", qformer.aggregator_weight_map(c.aggregator)),
            *norm_weight_map("ln_adapter", "aggregator_norm"),
            *dense_weight_map("adapter_proj.0", "aggregator_projector/up"),
            *dense_weight_map("adapter_proj.2", "aggregator_projector/down"),
        ]
    if c.soft_prompt_token_id is not None:
        rows.append(WeightMapping("soft_prompt_hint", "soft_prompt"))
    if c.region_head is not None:
        rows += with_prefix("", "locations/", region.box_coder_weight_map())
    if c.sam is not None:
        rows += with_prefix("", "mask_prompts/", region.mask_prompt_weight_map())
        rows += with_prefix("sam.model.", "sam/", sam_decoder.original_weight_map(c.sam))
    if not c.is_encoder_decoder:
        return (*rows, *with_prefix("llm_model.", "language/", decoder_weights.llama_weight_map(c.language)))
    return (*rows, *with_prefix("t5_model.", "language/", t5.weight_map(c.language)))
