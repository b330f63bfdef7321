# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 stage 1 (arXiv 2301.12597): Q-Former pre-training without a language model.

Three losses in one forward pass: image-text contrast (ITC) over the batch, image-text matching (ITM) against hard
negatives, and image-grounded captioning (ITG). The passes are those of `qformer_stage1`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import Batch
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.vision import vit
from lionjax.models.vlm.qformer_stage1 import QFormerStage1, QFormerStage1Module, TextRows, heads_weight_map
from lionjax.nn.layers import norm_weight_map
from lionjax.nn.losses import label_smoothed_cross_entropy

SELF_PAIR_LOGIT = -10000.0  # logit of the true pair when hard negatives are sampled, so that it is never drawn


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Blip2Stage1(QFormerStage1):
    """Config of the stage; the defaults are those of the release.

    Texts are the targets of the batch in BERT's vocabulary, closed by `[SEP]`. The model prepends `cls_token_id`
    (`[CLS]`), and `decoder_start_token_id` (`[DEC]`) for captioning. `label_smoothing` applies to contrast and
    captioning.
    """

    def module(self) -> Blip2Stage1Module:
        """The flax module of this config."""
        return Blip2Stage1Module(self)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of LAVIS's blip2_pretrained.pth."""
        return (
            *with_prefix("visual_encoder.", "vision/", vit.lavis_weight_map(self.vision)),
            *norm_weight_map("ln_vision", "vision_norm"),
            *heads_weight_map("Qformer.", self.qformer, qformer.lavis_weight_map(self.qformer)),
        )


class Blip2Stage1Module(QFormerStage1Module):
    c: Blip2Stage1

    def text_rows(self, batch: Batch) -> TextRows:
        return self.rows_after(batch, self.c.cls_token_id)

    def rows_after(self, batch: Batch, first: int) -> TextRows:
        """Texts after the token `first`: ids (B, 1 + M) and their mask."""
        first_B1 = jnp.full_like(batch.target_BM[:, :1], first)
        mask_BM = batch.target_mask_BM.astype(bool)
        return TextRows(
            jnp.concatenate([first_B1, batch.target_BM], axis=1),
            jnp.concatenate([jnp.ones_like(mask_BM[:, :1]), mask_BM], axis=1),
        )

    def caption_prefix(self, batch: Batch) -> TextRows:
        start_B1 = jnp.full((len(batch.target_BM), 1), self.c.decoder_start_token_id, jnp.int32)
        return TextRows(start_B1, jnp.ones_like(start_B1, bool))

    def negative_logits(self, score_BB):
        return jnp.where(jnp.eye(len(score_BB), dtype=bool), SELF_PAIR_LOGIT, score_BB)

    def word_losses(self, batch: Batch, query_kv, key):
        loss, metrics = label_smoothed_cross_entropy(
            self.caption_logits(batch, query_kv, key), batch.target_BM, batch.loss_mask_BM, self.c.label_smoothing
        )
        return {"captions": loss}, {"token_accuracy": metrics["token_accuracy"]}

    def caption_logits(self, batch: Batch, query_kv, key=None):
        """Logits (B, M, V) of the texts; token m attends to the queries' keys and values and to the tokens up to m."""
        rows = self.rows_after(batch, self.c.decoder_start_token_id)
        rows = TextRows(rows.ids_BL[:, :-1], rows.mask_BL[:, :-1])
        return self.lm_logits(self.read_queries(rows, query_kv, causal=True, key=key)[0])
