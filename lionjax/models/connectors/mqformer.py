# SPDX-License-Identifier: Apache-2.0
"""MQ-Former of Lyrics (arXiv 2312.05278): a Q-Former whose queries read the image and a detector's regions.

The first queries ("visual") cross-attend to the image, the others ("grounding") to the regions, with weights of their
own; all queries and the text share the self-attention. The network is `qformer.QFormer` with an `MQFormerConfig`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lionjax.core.errors import check_ranges
from lionjax.core.renamed import renamed_fields
from lionjax.core.types import Batch, UserError
from lionjax.core.weight_map import WeightMapping, rename_torch_keys
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import CrossAttention, QFormerConfig


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class MQFormerConfig(QFormerConfig):
    """Config; the defaults are those of the released code: 32 visual and 64 grounding queries.

    `region_width`: of a region's features, a detector's query state with its box. `use_sam`: the regions have rows of
    SAM's segments too, which the refiner appends; the network is the same.
    """

    num_query_tokens: int = 96  # of both kinds
    num_grounding_queries: int = 64  # the last of them
    region_width: int = 260
    use_sam: bool = False

    def __post_init__(self):
        allowed = f">= 0 and < {self.num_query_tokens}"
        check_ranges(self, "qformer.", num_grounding_queries=allowed, region_width=">= 1")

    @property
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """The visual queries attend to the image, the grounding queries to the regions."""
        visual = CrossAttention("cross", self.num_query_tokens - self.num_grounding_queries, self.vision_width)
        return (visual, CrossAttention("region", self.num_grounding_queries, self.region_width))


MQ_FORMER = MQFormerConfig()


def region_width(c: QFormerConfig | None) -> int:
    """Width of the region features that a Q-Former reads; 0 if it reads none, or is None."""
    return c.region_width if isinstance(c, MQFormerConfig) else 0


def regions_of(c: QFormerConfig, batch: Batch):
    """(features (B, K, D), real regions (B, K) or None) of a batch; None if the Q-Former reads no regions.

    Rows with several images have their regions in (B, I, K, D), one set for each image. Raises UserError if the batch
    has none, or regions of another width.
    """
    if not (width := region_width(c)):
        return None
    if batch.region_BKD is None:
        raise UserError(
            f"the batch has no region features, and this model reads regions of width {width}; refine the images first "
            "(lionjax data build --refiner), or give a detector"
        )
    region_BKD, valid_BK = batch.region_BKD, batch.region_mask_BK
    if region_BKD.shape[-1] != width:
        raise UserError(
            f"regions have {region_BKD.shape[-1]} features; this model reads {width} (a detector's width and 4 for the "
            "box), so use the detector that it was trained with"
        )
    valid_BK = None if valid_BK is None else valid_BK.reshape(-1, valid_BK.shape[-1]).astype(bool)
    return region_BKD.reshape(-1, *region_BKD.shape[-2:]), valid_BK


def with_blank_regions(c: QFormerConfig | None, batch: Batch) -> Batch:
    """The batch with one region of zeros for each image if it has none, to initialize parameters."""
    if not region_width(c) or batch.region_BKD is not None:
        return batch
    *images, _, _, _ = batch.image_BHWC.shape
    return dataclasses.replace(batch, region_BKD=jnp.zeros((*images, 1, region_width(c))))


def weight_map(c: QFormerConfig) -> tuple[WeightMapping, ...]:
    """Names under `qformer.` in Lyrics' second stage, and under `qformer.bert.` in its first."""
    return rename_torch_keys(qformer.lavis_weight_map(c), ("attention.self.", "attention.attention."))
