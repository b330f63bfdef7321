# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO (arXiv 2303.05499): boxes of what a text names, with a logit for each pair of box and text token.

Swin's feature maps and BERT's text features are fused in the enhancer; the positions that fit the text best become
queries, whose boxes the decoder refines layer by layer. Each row of a batch has its own phrases, where the released
code mixes the rows' phrase masks, so that a row's result does not depend on the others.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import pytree_dataclass
from lionjax.models.language.bert import Bert, phrase_masks
from lionjax.models.vision.grounding_dino_decoder import (
    DecoderInputs,
    DecoderLayer,
    QuerySelection,
    Selection,
    box_head,
    contrastive_logits,
    encode_boxes,
    inverse_sigmoid,
    position_head,
    proposal_boxes,
    valid_proposals,
)
from lionjax.models.vision.grounding_dino_encoder import (
    GROUNDING_DINO_SWIN_B,
    GROUNDING_DINO_SWIN_T,
    EnhancerInputs,
    EnhancerLayer,
    FeatureLevels,
    GroundingDinoConfig,
    image_positions,
    pixel_centers,
    resize_mask,
    valid_sizes,
    xavier,
)
from lionjax.models.vision.swin import Swin
from lionjax.nn import layers
from lionjax.nn.positions import interleaved_sinusoids

__all__ = ["GROUNDING_DINO_SWIN_B", "GROUNDING_DINO_SWIN_T", "DetectorOutput", "GroundingDino", "GroundingDinoConfig"]


@pytree_dataclass
class DetectorOutput:
    """Boxes are cx cy w h in 0..1 of the valid part of the image; logits are -inf where the text mask is 0.

    `features_BQD`: states of the last layer behind the final norm, with its refined box as 4 further values; that box
    comes from the states before the norm, so it differs from `boxes_BQ4`. For training: `layer_*` of all T decoder
    layers, the last included, and `proposal_*` of the selected queries before the decoder.
    """

    logits_BQL: jax.Array
    boxes_BQ4: jax.Array
    features_BQD: jax.Array
    layer_logits_TBQL: jax.Array
    layer_boxes_TBQ4: jax.Array
    proposal_logits_BQL: jax.Array
    proposal_boxes_BQ4: jax.Array


@pytree_dataclass
class EncodedInputs:
    """Image and text before the enhancer, flattened over levels."""

    image_BPD: jax.Array
    text_BLD: jax.Array
    center_BP2: jax.Array  # of the positions, in parts of the valid size
    is_proposal_BP: jax.Array  # positions whose proposal is valid
    ratio_BT2: jax.Array  # valid parts of the width and height of each level
    shared: EnhancerInputs


class GroundingDino(nn.Module):
    """DetectorOutput for images (B, H, W, 3), masks of their valid pixels, and token ids (B, L) with their mask.

    Images are padded with zeros to one size, right and below. Texts are right-padded lower-case phrases that each end
    with a delimiter; of more than `max_text_len` tokens the rest is cut, so L of the logits is at most that. `key`
    drives dropout and stochastic depth. Raises ValueError where the levels have fewer positions than `num_queries`.
    """

    c: GroundingDinoConfig

    def setup(self):
        c = self.c
        self.swin, self.text = Swin(c.swin), Bert(c.text)
        self.text_projection = layers.Dense(c.text.width, c.width, ("embed", None), kernel_init=xavier)
        self.levels = FeatureLevels(c)
        position = with_logical_partitioning(layers.normal(1.0), ("position", "embed"))
        self.level_embed = self.param("level_embed", position, (c.num_levels, c.width))
        self.queries = self.param("queries", position, (c.num_queries, c.width))
        self.enhancer = layers.scan_blocks(layers.remat_block(EnhancerLayer, c.remat), c.encoder_depth, 1)(c)
        self.selection = QuerySelection(c)
        self.decoder = layers.scan_blocks(layers.remat_block(DecoderLayer, c.remat), c.decoder_depth, 1)(c)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.boxes, self.positions = box_head(None, c), position_head(None, c)

    def encode_text(self, ids_BL, text_mask_BL, dtype, key=None):
        """(text features (B, L, D), allowed pairs (B, L, L), positions (B, L, D)), cut to `max_text_len` tokens."""
        c = self.c
        phrase_BLL, position_BL = phrase_masks(ids_BL, c.delimiter_ids)
        phrase_BLL, position_BL = phrase_BLL[:, : c.max_text_len, : c.max_text_len], position_BL[:, : c.max_text_len]
        states_BLD, _ = self.text(ids_BL[:, : c.max_text_len], phrase_BLL, position_BL, key=key, dtype=dtype)
        return self.text_projection(states_BLD), phrase_BLL, interleaved_sinusoids(position_BL, c.width).astype(dtype)

    def encode(self, image_BHWC, pixel_mask_BHW, ids_BL, text_mask_BL, key=None) -> EncodedInputs:
        """Backbones and projections of both inputs."""
        c, dtype, keys = self.c, image_BHWC.dtype, layers.split_key(key, 2)
        text_mask_BL = text_mask_BL[:, : c.max_text_len].astype(bool)
        text_BLD, phrase_BLL, text_position_BLD = self.encode_text(ids_BL, text_mask_BL, dtype, keys[0])
        levels = self.levels(self.swin(image_BHWC, keys[1])[1])
        shapes = tuple(level.shape[1:3] for level in levels)
        masks = [resize_mask(pixel_mask_BHW.astype(bool), *shape) for shape in shapes]
        positions = [image_positions(mask, c.width, c.position_temperature) for mask in masks]
        positions = [x_BHWD + self.level_embed[level] for level, x_BHWD in enumerate(positions)]
        size_BT2 = valid_sizes(masks)
        ratio_BT2 = size_BT2 / np.array(shapes, np.float32)[:, ::-1]
        center_BP2 = pixel_centers(shapes, size_BT2)
        is_proposal_BP = flatten(masks) & valid_proposals(shapes, size_BT2)
        shared = EnhancerInputs(
            flatten(positions).astype(dtype),
            center_BP2[:, :, None] * ratio_BT2[:, None],
            flatten(masks),
            text_position_BLD,
            text_mask_BL,
            phrase_BLL,
            shapes,
        )
        return EncodedInputs(flatten(levels), text_BLD, center_BP2, is_proposal_BP, ratio_BT2, shared)

    def enhance(self, inputs: EncodedInputs, key=None):
        """Image (B, P, D) and text (B, L, D) behind the enhancer."""
        keys = None if key is None else jax.random.split(key, self.c.encoder_depth)
        states, _ = self.enhancer((inputs.image_BPD, inputs.text_BLD), keys, inputs.shared)
        return states

    def select(self, image_BPD, text_BLD, inputs: EncodedInputs) -> Selection:
        """The queries of the decoder."""
        c, shared = self.c, inputs.shared
        if image_BPD.shape[1] < c.num_queries:
            raise ValueError(
                f"the levels of the image have {image_BPD.shape[1]} positions, fewer than the {c.num_queries} queries; "
                "resize or pad the image to a larger size"
            )
        proposal_BP4 = proposal_boxes(inputs.center_BP2, shared.shapes)
        return self.selection(image_BPD, text_BLD, shared.text_mask_BL, proposal_BP4, inputs.is_proposal_BP)

    def decode(self, image_BPD, text_BLD, box_BQ4, inputs: EncodedInputs, key=None):
        """States (T, B, Q, D) and refined boxes (T, B, Q, 4) of all layers; the boxes `box_BQ4` start them."""
        c, keys = self.c, None if key is None else jax.random.split(key, self.c.decoder_depth)
        query_BQD = jnp.broadcast_to(self.queries.astype(image_BPD.dtype), (len(image_BPD), *self.queries.shape))
        if self.is_initializing():  # the layers read the parameters of both heads, which must exist before
            self.boxes(query_BQD), self.positions(encode_boxes(box_BQ4, c.width))
        heads, masks = (self.boxes.variables["params"], self.positions.variables["params"]), inputs.shared
        sources = (image_BPD, masks.valid_BP, text_BLD, masks.text_mask_BL)
        shared = DecoderInputs(*sources, inputs.ratio_BT2, *heads, masks.shapes)
        return self.decoder((query_BQD, jax.lax.stop_gradient(box_BQ4)), keys, shared)[1]

    def __call__(self, image_BHWC, pixel_mask_BHW, ids_BL, text_mask_BL, key=None) -> DetectorOutput:
        keys = layers.split_key(key, 3)
        inputs = self.encode(image_BHWC, pixel_mask_BHW, ids_BL, text_mask_BL, keys[0])
        image_BPD, text_BLD = self.enhance(inputs, keys[1])
        selection = self.select(image_BPD, text_BLD, inputs)
        state_TBQD, refined_TBQ4 = self.decode(image_BPD, text_BLD, selection.box_BQ4, inputs, keys[2])
        return self.predict(state_TBQD, refined_TBQ4, selection, text_BLD, inputs.shared.text_mask_BL)

    def predict(self, state_TBQD, refined_TBQ4, selection: Selection, text_BLD, text_mask_BL) -> DetectorOutput:
        """The output from the states and refined boxes of all decoder layers."""
        c, state_TBQD = self.c, self.norm(state_TBQD)
        previous_TBQ4 = refined_TBQ4[:-1] if c.look_forward_twice else jax.lax.stop_gradient(refined_TBQ4[:-1])
        previous_TBQ4 = jnp.concatenate([jax.lax.stop_gradient(selection.box_BQ4)[None], previous_TBQ4])
        delta_TBQ4 = self.boxes(state_TBQD).astype(jnp.float32)
        boxes_TBQ4 = jax.nn.sigmoid(delta_TBQ4 + inverse_sigmoid(previous_TBQ4, c.inverse_sigmoid_eps))
        logits_TBQL = jax.vmap(contrastive_logits, (0, None, None))(state_TBQD, text_BLD, text_mask_BL)
        features_BQD = jnp.concatenate([state_TBQD[-1], refined_TBQ4[-1].astype(state_TBQD.dtype)], axis=-1)
        layer_outputs = logits_TBQL[-1], boxes_TBQ4[-1], features_BQD, logits_TBQL, boxes_TBQ4
        return DetectorOutput(*layer_outputs, selection.logits_BQL, selection.box_BQ4)


def example_inputs(c: GroundingDinoConfig) -> tuple:
    """Shapes of inputs that initialize the parameters: one image large enough for all queries, and two tokens."""
    stride = c.swin.patch_size << c.swin.output_stages[0]
    side = stride * math.isqrt(c.num_queries - 1) + stride
    shapes = ((1, side, side, 3), "float32"), ((1, side, side), "bool"), ((1, 2), "int32"), ((1, 2), "bool")
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def flatten(levels):
    """(B, P, ...): the levels (B, H', W', ...), each row-major, one after the other."""
    return jnp.concatenate([x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:]) for x in levels], axis=1)
