# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO as a system that trains: captions and boxes of a `Batch` to the loss of all its layers.

The parameters are those of `models.vision.grounding_dino.GroundingDino`, under the same paths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import VLM, Batch, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping
from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_T, GroundingDino, GroundingDinoConfig
from lionjax.models.vision.grounding_dino_loss import DetectionLossConfig, DetectionTargets, detection_loss
from lionjax.models.vision.grounding_dino_weights import original_weight_map


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class PhraseDetection(VLM):
    """Config of the detector and its loss. `encoder_loss`: the queries selected by the encoder are trained too."""

    detector: GroundingDinoConfig = GROUNDING_DINO_SWIN_T
    loss_config: DetectionLossConfig = DetectionLossConfig()
    encoder_loss: bool = True
    image_size: int = 800

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(image_size=self.image_size, detects_phrases=True, has_features=False, generates=False)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters."""
        return GroundingDino(self.detector).init(key, *_inputs(batch))["params"]

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """The sum of the losses of all layers, and metrics; `key` drives dropout and stochastic depth."""
        outputs = GroundingDino(self.detector).apply({"params": params}, *_inputs(batch), key=key)
        logits_TBQL, box_TBQ4 = outputs.layer_logits_TBQL, outputs.layer_boxes_TBQ4
        if self.encoder_loss:
            logits_TBQL = jnp.concatenate([logits_TBQL, outputs.proposal_logits_BQL[None]])
            box_TBQ4 = jnp.concatenate([box_TBQ4, outputs.proposal_boxes_BQ4[None]])
        length = logits_TBQL.shape[-1]
        targets = DetectionTargets(batch.boxes_BK4, batch.boxes_mask_BK, batch.box_tokens_BKL[..., :length])
        return detection_loss(self.loss_config, logits_TBQL, box_TBQ4, batch.question_mask_BL[:, :length], targets)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of groundingdino_swint_ogc.pth."""
        return original_weight_map(self.detector)


def _inputs(batch: Batch):
    """Images, masks of their valid pixels, and captions with their masks; a batch's images have one size."""
    pixel_mask_BHW = jnp.ones(batch.image_BHWC.shape[:3], bool)
    return batch.image_BHWC, pixel_mask_BHW, batch.question_BL, batch.question_mask_BL
