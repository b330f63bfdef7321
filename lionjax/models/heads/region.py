# SPDX-License-Identifier: Apache-2.0
"""Box and mask heads on a language model (pix2emb; NExT-Chat, arXiv 2311.04498, section 3).

A box in a text is two tokens. The hidden state at the trigger token (region query) is decoded to the box; the input
embedding of the box token after it is that of the box. The same state is projected to prompts of SAM's mask decoder.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.types import Batch, Metrics, UserError
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.nn import losses
from lionjax.nn.layers import MLP, dense_weight_map, take_positions

OBJECTIVES = ("language", "masks", "all")
MASK_VALUE = -1e30  # a logit that is never chosen, and finite to avoid NaN


@renamed_fields(losses=Renamed("loss_variant", {"intended": "paper", "original": "released_code"}))
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionHeadConfig:
    """Config of the box and mask heads; the defaults are NExT-Chat's sizes and loss weights.

    `loss_variant`: "released_code" keeps the mistaken constants of NExT-Chat's code. `max_boxes`: in one answer.
    """

    trigger_token_id: int = 32003
    box_token_id: int = 32004
    box_mlp_dim: int = 2048
    num_mask_prompt_tokens: int = 4
    max_boxes: int = 8
    l1_weight: float = 2.0
    giou_weight: float = 0.2
    cycle_weight: float = 1.0
    focal_weight: float = 20.0
    loss_variant: str = "paper"


class BoxEncoderDecoder(nn.Module):
    """Box encoder and decoder between boxes (x0, y0, x1, y1) in 0..1 and the language model's states.

    Runs in float32: bfloat16 resolves only 1/256 of the image side.
    """

    width: int
    mlp_dim: int

    def setup(self):
        self.encoder = MLP(4, self.mlp_dim, "relu", out_features=self.width)
        self.decoder = MLP(self.width, self.mlp_dim, "relu", out_features=4)

    def encode(self, box_BK4):
        """Embeddings (..., D) of boxes (..., 4); G in the paper."""
        return self.encoder(box_BK4.astype(jnp.float32))

    def decode(self, state_BKD):
        """Boxes (..., 4) of states (..., D); F in the paper. They may lie outside 0..1 or be reversed."""
        return self.decoder(state_BKD.astype(jnp.float32))


class MaskPromptProjector(nn.Module):
    """Prompt tokens (..., T, C) for SAM's mask decoder from states (..., D) at region queries."""

    width: int
    num_tokens: int
    prompt_embed_dim: int

    @nn.compact
    def __call__(self, state_BKD):
        mlp = MLP(self.width, self.width, "relu", out_features=self.num_tokens * self.prompt_embed_dim, name="mlp")
        return mlp(state_BKD).reshape(*state_BKD.shape[:-1], self.num_tokens, self.prompt_embed_dim)


def scatter_embeddings(x_BLD, target_BL, embedding_BKD, first_B=0):
    """x (B, L, D) with embedding number `first_B` + k of each row at the k-th position that `target_BL` marks."""
    index_BL = jnp.cumsum(target_BL, axis=1) - 1 + jnp.reshape(first_B, (-1, 1))
    index_BL = jnp.clip(index_BL, 0, embedding_BKD.shape[1] - 1)
    scattered_BLD = jnp.take_along_axis(embedding_BKD.astype(x_BLD.dtype), index_BL[..., None], axis=1)
    return jnp.where(target_BL[..., None], scattered_BLD, x_BLD)


def first_k_positions(target_BL, count: int):
    """The first `count` positions of each row that `target_BL` marks: indices (B, K), and their mask (B, K)."""
    count = min(count, target_BL.shape[1])
    position_BK = jnp.argsort(~target_BL.astype(bool), axis=1, stable=True)[:, :count]
    return position_BK, jnp.take_along_axis(target_BL.astype(bool), position_BK, axis=1)


def gather_region_queries(c: RegionHeadConfig, batch: Batch, state_BMD):
    """States (B, K, D) at the region queries of the target, the index of the box of each (B, K), and their mask (B, K).

    `state_BMD`: states after each target token. Only queries in `loss_mask_BM` count (not those of other speakers). The
    box of a query is that of the next box token.
    """
    count = batch.boxes_BK4.shape[1]
    is_query_BM = (batch.target_BM == c.trigger_token_id) & batch.loss_mask_BM.astype(bool)
    position_BK, valid_BK = first_k_positions(is_query_BM, count)
    prompt_boxes_BL = jnp.cumsum(batch.prompt_BL == c.box_token_id, axis=1)
    if batch.segment_BL is None:
        index_BM = prompt_boxes_BL[:, -1:] + jnp.cumsum(batch.target_BM == c.box_token_id, axis=1)
    else:  # the prompt arrays have the whole row
        index_BM = take_positions(prompt_boxes_BL, batch.target_index_BM)
    index_BK = take_positions(index_BM, position_BK)
    # A truncated answer may end with a query that has no box.
    has_box_BK = take_positions(batch.boxes_mask_BK.astype(bool), jnp.minimum(index_BK, count - 1))
    valid_BK = valid_BK & (index_BK < count) & has_box_BK
    return take_positions(state_BMD, position_BK), jnp.minimum(index_BK, count - 1), valid_BK


def text_loss_mask(c: RegionHeadConfig, batch: Batch) -> jax.Array:
    """The loss mask (B, M) of the answer without box tokens, which always follow a trigger token."""
    return batch.loss_mask_BM * (batch.target_BM != c.box_token_id)


def box_losses(c: RegionHeadConfig, locations: BoxEncoderDecoder, batch: Batch, queries) -> tuple[dict, Metrics]:
    """Weighted L1, GIoU and cycle terms of the boxes at `queries` (see `gather_region_queries`), and their mean IoU."""
    state_BKD, index_BK, valid_BK = queries
    state_BKD = state_BKD.astype(jnp.float32)
    box_BK4 = take_positions(batch.boxes_BK4, index_BK)
    predicted_BK4 = locations.decode(state_BKD)
    cycle_state_BKD = locations.encode(predicted_BK4)
    cycle_box_BK4 = locations.decode(locations.encode(batch.boxes_BK4))
    original = c.loss_variant == "released_code"
    terms = {
        "l1": c.l1_weight * losses.masked_mean(jnp.abs(predicted_BK4 - box_BK4), valid_BK),
        "giou": c.giou_weight * losses.giou_loss(predicted_BK4, box_BK4, valid_BK, original),
        "cycle_state": c.cycle_weight * losses.masked_mean(jnp.square(cycle_state_BKD - state_BKD), valid_BK),
        "cycle_box": c.cycle_weight * losses.masked_mean(jnp.abs(cycle_box_BK4 - batch.boxes_BK4), batch.boxes_mask_BK),
    }
    return terms, {"box_iou": losses.masked_mean(losses.iou(predicted_BK4, box_BK4), valid_BK)}


def mask_side(batch: Batch) -> int:
    """Side of the true masks in pixels. Raises UserError if the batch has no masks."""
    if batch.masks_BKHW is None:
        raise UserError(
            "the objective needs masks, but the batch has none; mix the task res and set processor.sam_image_size"
        )
    return batch.masks_BKHW.shape[-1]


def has_mask(batch: Batch, queries):
    """Which of the region queries have a true mask (B, K)."""
    _, index_BK, valid_BK = queries
    if batch.masks_mask_BK is None:
        return valid_BK
    return valid_BK & take_positions(batch.masks_mask_BK, index_BK).astype(bool)


def mask_loss(
    c: RegionHeadConfig, batch: Batch, queries, logits_BKhw, iou_BK, upsample_fn
) -> tuple[jax.Array, Metrics]:
    """Weighted sum of focal, Dice and IoU losses at the region queries, and metrics.

    `upsample_fn` resizes logits to the size of the true masks.
    """
    mask_BKHW, valid_BK = take_positions(batch.masks_BKHW, queries[1]), has_mask(batch, queries)
    original = c.loss_variant == "released_code"
    terms = losses.mask_losses(logits_BKhw, iou_BK, mask_BKHW, valid_BK, original, upsample_fn)
    terms["focal"] = c.focal_weight * terms["focal"]
    metrics = {f"loss_{name}": term for name, term in terms.items()}
    return sum(terms.values()), metrics | {"weight": valid_BK.astype(jnp.float32).sum()}


def init_region_state(c: RegionHeadConfig, rows: int, width: int, dtype) -> dict:
    """Boxes of an answer that has not started: boxes, the states they were decoded from, and their number."""
    return {
        "box": jnp.zeros((1, rows, c.max_boxes, 4)),
        "state": jnp.zeros((1, rows, c.max_boxes, width), dtype),
        "count": jnp.zeros((1, rows), jnp.int32),
    }


def constrain_logits(c: RegionHeadConfig, locations: BoxEncoderDecoder, state_BD, logits_BV, is_query_B, regions: dict):
    """(logits (B, V), new entries of `Cache.generated`) of the state after a token, a trigger token where `is_query_B`.

    A box token must follow a trigger token, and may follow nothing else. `regions` is the state of
    `init_region_state`. Entry "place" is the predicted box, the next input where "triggered".
    """
    box_B4 = locations.decode(state_BD)
    slot_BK = is_query_B[:, None] & (jnp.arange(c.max_boxes) == regions["count"][0][:, None])
    regions = {
        "box": jnp.where(slot_BK[None, ..., None], box_B4[None, :, None], regions["box"]),
        "state": jnp.where(slot_BK[None, ..., None], state_BD[None, :, None], regions["state"]),
        "count": regions["count"] + is_query_B,
    }
    is_box_token_V = jnp.arange(logits_BV.shape[-1]) == c.box_token_id
    text_BV = jnp.where(is_box_token_V, MASK_VALUE, logits_BV)
    box_V = jnp.where(is_box_token_V, 0.0, MASK_VALUE)
    logits_BV = jnp.where(is_query_B[:, None], box_V, text_BV)
    return logits_BV, {"kept": regions, "place": box_B4[None], "triggered": is_query_B[None]}


def next_embedding(locations: BoxEncoderDecoder, token_BD, generated: dict):
    """The next input (B, D): the embedding of the box after a trigger token, else that of the chosen token."""
    box_BD = locations.encode(generated["place"][0]).astype(token_BD.dtype)
    return jnp.where(generated["triggered"][0][:, None], box_BD, token_BD)


def box_coder_weight_map() -> tuple[WeightMapping, ...]:
    """NExT-Chat's names of `BoxEncoderDecoder`."""
    modules = (("loc_encoder", "encoder"), ("loc_decoder", "decoder"))
    layers = ((0, "up"), (2, "down"))
    return tuple(
        mapping
        for torch, flax in modules
        for index, layer in layers
        for mapping in dense_weight_map(f"{torch}.{index}", f"{flax}/{layer}")
    )


def mask_prompt_weight_map() -> tuple[WeightMapping, ...]:
    """NExT-Chat's names of `MaskPromptProjector`."""
    return with_prefix("seg_prompt_mlp.", "mlp/", relu_mlp_weight_map())


def relu_mlp_weight_map() -> tuple[WeightMapping, ...]:
    """Names of the two linear layers of a torch Sequential with a ReLU between them."""
    return (*dense_weight_map("0", "up"), *dense_weight_map("2", "down"))
