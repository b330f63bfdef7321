# SPDX-License-Identifier: Apache-2.0
"""Where things are: boxes into the language model's space and back, and its states into prompts for masks (pix2emb).

A box stands in a text as two tokens. At the trigger the model's state is read as a box; the location token behind it
carries the box itself, as an embedding in place of a word's (NExT-Chat, arXiv 2311.04498, section 3).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.types import Batch, Metrics, UserError
from lionjax.core.weight_map import WeightMapping
from lionjax.nn import losses
from lionjax.nn.layers import MLP, dense_weight_map, take_positions

OBJECTIVES = ("language", "masks", "all")
MASK_VALUE = -1e30  # a logit that is never chosen, and finite


@renamed_fields(
    trigger_token="trigger_token_id",
    location_token="box_token_id",
    location_hidden="box_mlp_dim",
    mask_tokens="num_mask_prompt_tokens",
    losses=Renamed("loss_variant", {"intended": "paper", "original": "released_code"}),
)
@dataclasses.dataclass(frozen=True)
class RegionHeadConfig:
    """Boxes and masks as embeddings beside any language model; NExT-Chat's sizes and weights.

    `loss_variant` "released_code" has the constants that its code has by mistake. `max_boxes` are kept of an answer.
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
    """Boxes x0 y0 x1 y1 in 0..1 <-> the language model's space, in float32: a thousandth of a picture counts."""

    width: int
    mlp_dim: int

    def setup(self):
        self.encoder = MLP(4, self.mlp_dim, "relu", out_features=self.width)
        self.decoder = MLP(self.width, self.mlp_dim, "relu", out_features=4)

    def encode(self, box_BK4):
        """(..., 4) -> (..., D): the original's G."""
        return self.encoder(box_BK4.astype(jnp.float32))

    def decode(self, state_BKD):
        """(..., D) -> (..., 4): the original's F. Nothing keeps the numbers in 0..1 or in order."""
        return self.decoder(state_BKD.astype(jnp.float32))


class MaskPromptProjector(nn.Module):
    """A trigger's state as tokens for SAM's mask decoder: (..., D) -> (..., T, C)."""

    width: int
    num_tokens: int
    prompt_embed_dim: int

    @nn.compact
    def __call__(self, state_BKD):
        mlp = MLP(self.width, self.width, "relu", out_features=self.num_tokens * self.prompt_embed_dim, name="mlp")
        return mlp(state_BKD).reshape(*state_BKD.shape[:-1], self.num_tokens, self.prompt_embed_dim)


def scatter_embeddings(x_BLD, here_BL, piece_BKD, first_B=0):
    """x with the k-th piece of a row at the k-th marked place of that row; `first_B` pieces stand elsewhere before."""
    place_BL = jnp.cumsum(here_BL, axis=1) - 1 + jnp.reshape(first_B, (-1, 1))
    place_BL = jnp.clip(place_BL, 0, piece_BKD.shape[1] - 1)
    spread_BLD = jnp.take_along_axis(piece_BKD.astype(x_BLD.dtype), place_BL[..., None], axis=1)
    return jnp.where(here_BL[..., None], spread_BLD, x_BLD)


def first_k_positions(here_BL, count: int):
    """The first `count` marked places of each row: indices (B, K), and which of them are real (B, K)."""
    count = min(count, here_BL.shape[1])
    place_BK = jnp.argsort(~here_BL.astype(bool), axis=1, stable=True)[:, :count]
    return place_BK, jnp.take_along_axis(here_BL.astype(bool), place_BK, axis=1)


def gather_region_queries(c: RegionHeadConfig, batch: Batch, state_BMD):
    """States at the answer's triggers (B, K, D), which box each of them means (B, K), and which are real (B, K).

    `state_BMD` are the states that have read each word of the answer. Triggers in what the other side says are not
    learned. A trigger means the box of the location token behind it.
    """
    count = batch.boxes_BK4.shape[1]
    said_BM = (batch.target_BM == c.trigger_token_id) & batch.loss_mask_BM.astype(bool)
    place_BK, real_BK = first_k_positions(said_BM, count)
    before_B1 = (batch.prompt_BL == c.box_token_id).sum(axis=1, keepdims=True)
    which_BM = before_B1 + jnp.cumsum(batch.target_BM == c.box_token_id, axis=1)
    which_BK = take_positions(which_BM, place_BK)
    # A trigger with which an answer breaks off means no box.
    given_BK = take_positions(batch.boxes_mask_BK.astype(bool), jnp.minimum(which_BK, count - 1))
    real_BK = real_BK & (which_BK < count) & given_BK
    return take_positions(state_BMD, place_BK), jnp.minimum(which_BK, count - 1), real_BK


def text_loss(c: RegionHeadConfig, logits_BMV, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Cross entropy of an answer. The model says where a place begins; what stands there is no word to choose."""
    learned_BM = batch.loss_mask_BM * (batch.target_BM != c.box_token_id)
    return losses.token_cross_entropy(logits_BMV, batch.target_BM, learned_BM)


def box_losses(c: RegionHeadConfig, locations: BoxEncoderDecoder, batch: Batch, found) -> tuple[dict, Metrics]:
    """Weighted L1, GIoU and cycle terms of the boxes at region queries (see `gather_region_queries`), and their IoU."""
    trigger_BKD, which_BK, real_BK = found
    trigger_BKD = trigger_BKD.astype(jnp.float32)
    box_BK4 = take_positions(batch.boxes_BK4, which_BK)
    predicted_BK4 = locations.decode(trigger_BKD)
    again_BKD = locations.encode(predicted_BK4)
    same_BK4 = locations.decode(locations.encode(batch.boxes_BK4))
    given_BK = batch.boxes_mask_BK
    terms = {
        "l1": c.l1_weight * losses.masked_mean(jnp.abs(predicted_BK4 - box_BK4), real_BK),
        "giou": c.giou_weight * losses.giou_loss(predicted_BK4, box_BK4, real_BK, c.loss_variant == "released_code"),
        "cycle_state": c.cycle_weight * losses.masked_mean(jnp.square(again_BKD - trigger_BKD), real_BK),
        "cycle_box": c.cycle_weight * losses.masked_mean(jnp.abs(same_BK4 - batch.boxes_BK4), given_BK),
    }
    return terms, {"box_iou": losses.masked_mean(losses.iou(predicted_BK4, box_BK4), real_BK)}


def mask_side(batch: Batch) -> int:
    """Pixels a side of the true masks. Raises UserError where there are none."""
    if batch.masks_BKHW is None:
        raise UserError(
            "the objective has masks, but the batch has none; mix the task res, and set processor.sam_image_size"
        )
    return batch.masks_BKHW.shape[-1]


def has_mask(batch: Batch, found):
    """At which of the triggers (`found`) a true mask is known: (B, K)."""
    _, which_BK, real_BK = found
    if batch.masks_mask_BK is None:
        return real_BK
    return real_BK & take_positions(batch.masks_mask_BK, which_BK).astype(bool)


def mask_loss(c: RegionHeadConfig, batch: Batch, found, logits_BKhw, iou_BK, enlarge) -> tuple[jax.Array, Metrics]:
    """Focal, dice and IoU losses of the masks at triggers (`found`); `enlarge` gives logits the true masks' size."""
    mask_BKHW, real_BK = take_positions(batch.masks_BKHW, found[1]), has_mask(batch, found)
    original = c.loss_variant == "released_code"
    terms = losses.mask_losses(logits_BKhw, iou_BK, mask_BKHW, real_BK, original, enlarge)
    terms["focal"] = c.focal_weight * terms["focal"]
    metrics = {f"loss_{name}": term for name, term in terms.items()}
    return sum(terms.values()), metrics | {"weight": real_BK.astype(jnp.float32).sum()}


def init_region_state(c: RegionHeadConfig, rows: int, width: int, dtype) -> dict:
    """What is kept of answers that have just begun: boxes, the states they were read from, and how many there are."""
    return {
        "box": jnp.zeros((1, rows, c.max_boxes, 4)),
        "state": jnp.zeros((1, rows, c.max_boxes, width), dtype),
        "count": jnp.zeros((1, rows), jnp.int32),
    }


def constrain_logits(c: RegionHeadConfig, locations: BoxEncoderDecoder, state_BD, word_BV, triggered_B, kept: dict):
    """(logits (B, V), what a cache remembers) of the state behind a word, which may be a trigger.

    A location token can follow a trigger only, and must. `place` is what the next word is where `triggered`.
    """
    place_B4 = locations.decode(state_BD)
    here_BK = triggered_B[:, None] & (jnp.arange(c.max_boxes) == kept["count"][0][:, None])
    kept = {
        "box": jnp.where(here_BK[None, ..., None], place_B4[None, :, None], kept["box"]),
        "state": jnp.where(here_BK[None, ..., None], state_BD[None, :, None], kept["state"]),
        "count": kept["count"] + triggered_B,
    }
    is_location_V = jnp.arange(word_BV.shape[-1]) == c.box_token_id
    word_BV = jnp.where(is_location_V, MASK_VALUE, word_BV)
    place_V = jnp.where(is_location_V, 0.0, MASK_VALUE)
    logits_BV = jnp.where(triggered_B[:, None], place_V, word_BV)
    return logits_BV, {"kept": kept, "place": place_B4[None], "triggered": triggered_B[None]}


def next_embedding(locations: BoxEncoderDecoder, word_BD, written: dict):
    """The next input (B, D): the word that was chosen, or the place where one was said."""
    place_BD = locations.encode(written["place"][0]).astype(word_BD.dtype)
    return jnp.where(written["triggered"][0][:, None], place_BD, word_BD)


def box_coder_weight_map() -> tuple[WeightMapping, ...]:
    """NExT-Chat's names of `Locations`."""
    pairs = (("loc_encoder", "encoder"), ("loc_decoder", "decoder"))
    layers = ((0, "up"), (2, "down"))
    return tuple(
        row for theirs, ours in pairs for n, x in layers for row in dense_weight_map(f"{theirs}.{n}", f"{ours}/{x}")
    )


def mask_prompt_weight_map() -> tuple[WeightMapping, ...]:
    """NExT-Chat's names of `MaskPrompts`."""
    return (*dense_weight_map("seg_prompt_mlp.0", "mlp/up"), *dense_weight_map("seg_prompt_mlp.2", "mlp/down"))
