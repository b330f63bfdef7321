# SPDX-License-Identifier: Apache-2.0
"""LION (CVPR 2024, arXiv 2311.11860): two visual streams, tags as soft prompts, routed adapters.

The picture goes through the frozen ViT once. Its last layer goes to the Q-Former together with the bare question; its
tapped layers go to the vision aggregator; both become words of the language model's width. In the prompt, one token
gives way to a learned hint of how far to trust the tags that follow it. T5 reads the picture words and the prompt, its
adapters mixed by the task of each row.

With `places` it is more than the original: NExT-Chat's heads on the same language model, so that boxes go in and out as
embeddings and masks follow from them. The language model may then also be a decoder alone.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import Batch, ModelInfo
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
from lionjax.models.vlm.region_lm import RegionLM, RegionModule
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_weight_map, norm_weight_map, normal, split_key

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
PROJECTION_EPS = 1e-5  # torch's default, unlike the ViT's 1e-6


@renamed_fields(soft_prompt_token="soft_prompt_token_id", places="region_head", word_scale="identity_init_scale")
@dataclasses.dataclass(frozen=True)
class Lion(RegionLM):
    """A LION by its parts' sizes. `visual_input`: the streams that run; stage 1 QFORMER, 2 AGGREGATOR, then ALL.

    `identity_init_scale`: for a ViT aligned with the language model's words, how large these are: the aggregator's projector
    begins by handing on what the ViT says, at this size. None: small random projectors, as the original.
    `region_head`: boxes as embeddings; `sam`: masks from them, learned where `objective` is not "language" (see `nextchat`).
    """

    vision: ViTConfig
    qformer: QFormerConfig
    aggregator: AggregatorConfig
    language: T5Config | DecoderConfig
    soft_prompt_token_id: int | None = 32099  # <extra_id_0>; None: no hint, tags are not used
    visual_input: str = "ALL"
    dtype: str = "float32"  # of the computation
    region_head: RegionHeadConfig | None = None
    sam: SamConfig | None = None
    objective: str = "language"
    identity_init_scale: float | None = None

    def __post_init__(self):
        for field, known in {"visual_input": VISUAL_INPUTS, "objective": OBJECTIVES}.items():
            if getattr(self, field) not in known:
                text = ", ".join(known)
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")
        widths = self.vision.width, self.language.width, self.aggregator.projector_mlp_dim / 2
        if self.identity_init_scale is not None and len(set(widths)) > 1:
            raise ValueError(
                "identity_init_scale wants a ViT as wide as the language model and a projector of twice that, "
                f"not {self.vision.width}, {self.language.width} and {self.aggregator.projector_mlp_dim}"
            )
        if (self.sam is not None and self.region_head is None) or (self.objective != "language" and self.sam is None):
            raise ValueError("masks want both region_head and sam; give the config the one it lacks")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model reads the prompt in an encoder."""
        return is_encoder_decoder(self.language)

    @property
    def taps(self) -> tuple[int, ...]:
        """ViT layers whose output is used: the aggregator's contexts, then its query."""
        return (*self.aggregator.context_layers, self.aggregator.query_layer)

    @property
    def box_scale(self) -> float:
        """Pixels of SAM's input that 1 of a box is."""
        return float(self.sam.image_size)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.language.vocab_size,
            embedding_rows=self.language.padded_vocab_size,
            end_token=self.language.eos_token_id,
            is_encoder_decoder=self.is_encoder_decoder,
            box_token=None if self.region_head is None else self.region_head.box_token_id,
            image_size=self.vision.image_size,
            reads_question=self.qformer.use_text_input,
        )

    def module(self) -> LionModule:
        return LionModule(self)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the LION release; the ViT and T5 rows are those of eva_vit_g.pth and Hugging Face's T5."""
        return weight_map(self)


def handing_on(scale: float):
    """First weights of an MLP of twice its width that is the identity times `scale`: gelu(x) - gelu(-x) = x."""

    def init(key, shape, dtype=jnp.float32):
        narrow = min(shape)
        both_ways = jnp.concatenate([jnp.eye(narrow), -jnp.eye(narrow)], axis=1) * scale**0.5
        return (both_ways if shape[0] == narrow else both_ways.T).astype(dtype)

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
            small = normal(0.02 if c.identity_init_scale is None else c.identity_init_scale * c.qformer.width**-0.5)
            self.qformer_projector = Dense(c.qformer.width, width, ("embed", None), kernel_init=small)
        if c.visual_input != "QFORMER":
            self.aggregator = Aggregator(c.aggregator)
            self.aggregator_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            init = normal(0.02) if c.identity_init_scale is None else handing_on(c.identity_init_scale)
            self.aggregator_projector = MLP(
                c.vision.width, c.aggregator.projector_mlp_dim, out_features=width, kernel_init=init
            )
        if c.soft_prompt_token_id is not None:
            self.soft_prompt = self.param("soft_prompt", with_logical_partitioning(normal(1.0), ("embed",)), (width,))
        self.setup_language()

    def encode_image(self, batch: Batch):
        """The ViT's tapped layers (B, T, 1 + P, D)."""
        if batch.features is not None:
            kept = batch.features
            return (kept["taps"] if isinstance(kept, dict) else kept).astype(self.c.dtype)
        _, seen_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return seen_TBPD.transpose(1, 0, 2, 3)

    def embed_image(self, batch: Batch, key):
        """Image tokens (B, P', D) of the language model's width: the Q-Former's first, then the aggregator's."""
        c, keys = self.c, split_key(key, 2)
        seen_TBPD = self.encode_image(batch).transpose(1, 0, 2, 3)
        words = []
        if c.visual_input != "AGGREGATOR":
            normed_BPD = self.qformer_norm(seen_TBPD[-1])
            asked_BLD = self.qformer(normed_BPD, batch.question_BL, batch.question_mask_BL, keys[0])
            words.append(self.qformer_projector(asked_BLD[:, : c.qformer.num_query_tokens]))
        if c.visual_input != "QFORMER":
            gathered_BPD = self.aggregator(seen_TBPD[-1], seen_TBPD[:-1], keys[1])
            words.append(self.aggregator_projector(self.aggregator_norm(gathered_BPD)))
        return jnp.concatenate(words, axis=1)

    def embed_text(self, ids_BL, batch: Batch, dtype, first_B=0):
        """As in `RegionModule`; the learned soft prompt stands at its token."""
        c = self.c
        x_BLD = self.language.embed(ids_BL, dtype)
        if c.soft_prompt_token_id is not None:
            is_hint_BL1 = (ids_BL == c.soft_prompt_token_id)[..., None]
            x_BLD = jnp.where(is_hint_BL1, self.soft_prompt.astype(x_BLD.dtype), x_BLD)
        return self.embed_boxes(x_BLD, ids_BL, batch, first_B)

    def embed_inputs(self, batch: Batch, key):
        """Image tokens, then the prompt (B, L', D), and their mask (B, L')."""
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
    """LION's state dict: with one adapter (stages 1 and 2) or two and a router (stage 3), as the config says.

    The heads have NExT-Chat's names.
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
