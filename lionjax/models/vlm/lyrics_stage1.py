# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of Lyrics (arXiv 2312.05278): MQ-Former pre-training without a language model.

Four losses with equal weights: image-text contrast (ITC), image-text matching (ITM), captions that read the queries
and the boxes as text (ICG), and masked elements of those boxes (MSP). The rules are those of the released code
(IDEA-CCNL/Fengshenbang-LM 1867d84): the text of contrast and matching holds the boxes too, and the two losses on words
read the queries through their keys and values. The passes are those of `qformer_stage1`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import Batch, ModelInfo, PackedText, Params, UserError
from lionjax.core.weight_map import WeightMapping
from lionjax.models.connectors import mqformer
from lionjax.models.connectors.mqformer import MQ_FORMER, MQFormerConfig
from lionjax.models.vision.grounding_dino import GroundingDinoConfig
from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.vit import EVA_VIT_G, ViTConfig
from lionjax.models.vlm import experts
from lionjax.models.vlm.qformer_stage1 import QFormerStage1, QFormerStage1Module, TextRows, heads_weight_map
from lionjax.models.vlm.visual_prefix_weights import lyrics_tower_weight_map
from lionjax.nn.layers import fold_in
from lionjax.nn.losses import label_smoothed_cross_entropy

MIN_NEGATIVE_WEIGHT = 1e-4  # added to the probabilities by which hard negatives are drawn


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class LyricsStage1(QFormerStage1):
    """Config of the stage; the defaults are those of the released code.

    Texts are `Batch.packed`, in BERT's vocabulary with `[DEC]`, and regions `Batch.region_BKD`. `tagger`, `detector`:
    the experts of the same checkpoint (see `experts`).
    """

    vision: ViTConfig = dataclasses.replace(EVA_VIT_G, norm_eps=1e-5)
    qformer: MQFormerConfig = MQ_FORMER
    tagger: RamConfig | None = None
    detector: GroundingDinoConfig | None = None

    def module(self) -> LyricsStage1Module:
        """The flax module of this config."""
        return LyricsStage1Module(self)

    @property
    def info(self) -> ModelInfo:
        fields = {"region_width": self.qformer.region_width, "experts": experts.expert_configs(self)}
        return dataclasses.replace(super().info, reads_packed_text=True, **fields)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules, experts included. The batch may lack regions and packed text."""
        batch = mqformer.with_blank_regions(self.qformer, batch)
        if batch.packed is None:
            ids_BL = jnp.zeros((len(batch.prompt_BL), 2), jnp.int32)
            batch = dataclasses.replace(batch, packed=PackedText(*(ids_BL,) * 6))
        return super().init(key, batch) | experts.init_experts(self, key)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of the released code's first stage."""
        heads_map = heads_weight_map("qformer.", self.qformer, mqformer.weight_map(self.qformer))
        return *lyrics_tower_weight_map(self), *heads_map


class LyricsStage1Module(QFormerStage1Module):
    c: LyricsStage1

    def text_rows(self, batch: Batch) -> TextRows:
        packed = packed_text(batch)
        return TextRows(packed.ids_BL, packed.mask_BL.astype(bool), packed.position_BL)

    def caption_rows(self, batch: Batch) -> TextRows:
        """The texts with the token that starts decoding in place of `[CLS]`."""
        rows = self.text_rows(batch)
        return dataclasses.replace(rows, ids_BL=rows.ids_BL.at[:, 0].set(self.c.decoder_start_token_id))

    def caption_prefix(self, batch: Batch) -> TextRows:
        """The boxes without the caption, if the batch has packed text, else only the first token."""
        if batch.packed is None:
            start_B1 = jnp.full((len(batch.prompt_BL), 1), self.c.decoder_start_token_id, jnp.int32)
            return TextRows(start_B1, jnp.ones_like(start_B1, bool))
        rows = self.caption_rows(batch)
        is_caption_BL = (packed_text(batch).icg_label_BL >= 0).at[:, 0].set(False)
        return dataclasses.replace(rows, mask_BL=rows.mask_BL & ~is_caption_BL)

    def negative_weights(self, score_BB):
        """Weights (B, B) by which each column is drawn as a hard negative of its row."""
        weight_BB = jax.nn.softmax(score_BB, axis=1) + MIN_NEGATIVE_WEIGHT
        return jnp.where(jnp.eye(len(score_BB), dtype=bool), 0, weight_BB)

    def negative_logits(self, score_BB):
        return jnp.log(self.negative_weights(score_BB))

    def word_losses(self, batch: Batch, query_kv, key):
        packed, smoothing = packed_text(batch), self.c.label_smoothing
        logits_BMV = self.lm_logits(self.caption_states(batch, query_kv, key)[:, :-1])
        captions, caption_metrics = labeled_cross_entropy(logits_BMV, packed.icg_label_BL[:, 1:], smoothing)
        logits_BLV = self.lm_logits(self.masked_states(batch, query_kv, fold_in(key, 1)))
        masked, masked_metrics = labeled_cross_entropy(logits_BLV[:, 1:], packed.msp_label_BL[:, 1:], smoothing)
        accuracies = {"token_accuracy": caption_metrics, "masked_accuracy": masked_metrics}
        losses = {"captions": captions, "masked": masked}
        return losses, {name: metrics["token_accuracy"] for name, metrics in accuracies.items()}

    def caption_states(self, batch: Batch, query_kv, key=None):
        """States (B, L, D) of boxes and caption, read from left to right."""
        return self.read_queries(self.caption_rows(batch), query_kv, causal=True, key=key)[0]

    def masked_states(self, batch: Batch, query_kv, key=None):
        """States (B, L, D) of the text with masked elements, read in both directions."""
        rows = dataclasses.replace(self.text_rows(batch), ids_BL=batch.packed.masked_ids_BL)
        return self.read_queries(rows, query_kv, causal=False, key=key)[0]


def packed_text(batch: Batch) -> PackedText:
    """The packed text of a batch. Raises UserError if it has none."""
    if batch.packed is None:
        raise UserError("the batch has no packed text, which stage 1 of Lyrics learns from; give its data captions")
    return jax.tree.map(jnp.asarray, batch.packed)


def labeled_cross_entropy(logits_BLV, label_BL, label_smoothing: float):
    """`label_smoothed_cross_entropy` of the labels that are not negative; 0 if all are."""
    return label_smoothed_cross_entropy(logits_BLV, jnp.maximum(label_BL, 0), label_BL >= 0, label_smoothing)
