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

from lionjax.core.sharding import sharded
from lionjax.core.types import Batch, ModelInfo
from lionjax.core.weight_map import Row, under
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import Aggregator, AggregatorConfig, QFormer, QFormerConfig
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, PlaceConfig
from lionjax.models.language import decoder_weights, t5
from lionjax.models.language.backend import is_encoder_decoder
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.vit import ViT, ViTConfig
from lionjax.models.vlm.region_lm import RegionLM, RegionModule
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_rows, norm_rows, normal, split_key

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
PROJECTION_EPS = 1e-5  # torch's default, unlike the ViT's 1e-6


@dataclasses.dataclass(frozen=True)
class Lion(RegionLM):
    """A LION by its parts' sizes. `visual_input`: the streams that run; stage 1 QFORMER, 2 AGGREGATOR, then ALL.

    `word_scale`: for a ViT aligned with the language model's words, how large these are: the aggregator's projector
    begins by handing on what the ViT says, at this size. None: small random projectors, as the original.
    `places`: boxes as embeddings; `sam`: masks from them, learned where `objective` is not "language" (see `nextchat`).
    """

    vision: ViTConfig
    qformer: QFormerConfig
    aggregator: AggregatorConfig
    language: T5Config | DecoderConfig
    soft_prompt_token: int | None = 32099  # <extra_id_0>; None: no hint, tags are not used
    visual_input: str = "ALL"
    dtype: str = "float32"  # of the computation
    places: PlaceConfig | None = None
    sam: SamConfig | None = None
    objective: str = "language"
    word_scale: float | None = None

    def __post_init__(self):
        for field, known in {"visual_input": VISUAL_INPUTS, "objective": OBJECTIVES}.items():
            if getattr(self, field) not in known:
                text = ", ".join(known)
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")
        widths = self.vision.width, self.language.width, self.aggregator.projector / 2
        if self.word_scale is not None and len(set(widths)) > 1:
            raise ValueError(
                "word_scale wants a ViT as wide as the language model and a projector of twice that, "
                f"not {self.vision.width}, {self.language.width} and {self.aggregator.projector}"
            )
        if (self.sam is not None and self.places is None) or (self.objective != "language" and self.sam is None):
            raise ValueError("masks want both places and sam; give the config the one it lacks")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model reads the prompt in an encoder."""
        return is_encoder_decoder(self.language)

    @property
    def taps(self) -> tuple[int, ...]:
        """ViT layers whose output is used: the aggregator's contexts, then its query."""
        return (*self.aggregator.context_layers, self.aggregator.query_layer)

    @property
    def region_head(self) -> PlaceConfig | None:
        return self.places

    @property
    def box_scale(self) -> float:
        """Pixels of SAM's input that 1 of a box is."""
        return float(self.sam.image)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.language.vocab,
            embedding_rows=self.language.rows,
            end_token=self.language.end_token,
            is_encoder_decoder=self.is_encoder_decoder,
            box_token=None if self.places is None else self.places.location_token,
            image_size=self.vision.image,
            reads_question=self.qformer.text,
        )

    def module(self) -> LionModule:
        return LionModule(self)

    def torch_rows(self) -> tuple[Row, ...]:
        """Names of the LION release; the ViT and T5 rows are those of eva_vit_g.pth and Hugging Face's T5."""
        return torch_rows(self)


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
            small = normal(0.02 if c.word_scale is None else c.word_scale * c.qformer.width**-0.5)
            self.qformer_projector = Dense(c.qformer.width, width, ("embed", None), init=small)
        if c.visual_input != "QFORMER":
            self.aggregator = Aggregator(c.aggregator)
            self.aggregator_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            init = normal(0.02) if c.word_scale is None else handing_on(c.word_scale)
            self.aggregator_projector = MLP(c.vision.width, c.aggregator.projector, features=width, init=init)
        if c.soft_prompt_token is not None:
            self.soft_prompt = self.param("soft_prompt", sharded(normal(1.0), ("embed",)), (width,))
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
            words.append(self.qformer_projector(asked_BLD[:, : c.qformer.queries]))
        if c.visual_input != "QFORMER":
            gathered_BPD = self.aggregator(seen_TBPD[-1], seen_TBPD[:-1], keys[1])
            words.append(self.aggregator_projector(self.aggregator_norm(gathered_BPD)))
        return jnp.concatenate(words, axis=1)

    def embed_text(self, ids_BL, batch: Batch, dtype, first_B=0):
        """As in `RegionModule`; the learned soft prompt stands at its token."""
        c = self.c
        x_BLD = self.language.embed(ids_BL, dtype)
        if c.soft_prompt_token is not None:
            is_hint_BL1 = (ids_BL == c.soft_prompt_token)[..., None]
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


def torch_rows(c: Lion) -> tuple[Row, ...]:
    """LION's state dict: with one adapter (stages 1 and 2) or two and a router (stage 3), as the config says.

    The heads have NExT-Chat's names.
    """
    rows = [*under("visual_encoder.", "vision/", vit.eva_rows(c.vision))]
    if c.visual_input != "AGGREGATOR":
        rows += [
            *under("", "qformer/", qformer.query_rows(c.qformer)),
            *under("Qformer.bert.", "qformer/", qformer.torch_rows(c.qformer)),
            *norm_rows("ln_vision", "qformer_norm"),
            *dense_rows("t5_proj", "qformer_projector"),
        ]
    if c.visual_input != "QFORMER":
        rows += [
            *under("fusion_adapter.", "aggregator/", qformer.aggregator_rows(c.aggregator)),
            *norm_rows("ln_adapter", "aggregator_norm"),
            *dense_rows("adapter_proj.0", "aggregator_projector/up"),
            *dense_rows("adapter_proj.2", "aggregator_projector/down"),
        ]
    if c.soft_prompt_token is not None:
        rows.append(Row("soft_prompt_hint", "soft_prompt"))
    if c.places is not None:
        rows += under("", "locations/", region.location_rows())
    if c.sam is not None:
        rows += under("", "mask_prompts/", region.mask_prompt_rows())
        rows += under("sam.model.", "sam/", sam_decoder.torch_rows(c.sam))
    if not c.is_encoder_decoder:
        return (*rows, *under("llm_model.", "language/", decoder_weights.llama_rows(c.language)))
    return (*rows, *under("t5_model.", "language/", t5.torch_rows(c.language)))
