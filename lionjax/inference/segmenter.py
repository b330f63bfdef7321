# SPDX-License-Identifier: Apache-2.0
"""Region features of SAM's segments (arXiv 2304.02643): one row for each box, as Lyrics' MQ-Former reads regions.

The paper of Lyrics (arXiv 2312.05278) names SAM, but its released code has none, so this is our design: SAM's image
embedding is averaged over the mask that a box prompts, each position weighted by the mask's probability there, and the
box follows as center and size. The image is centered in SAM's square, as in NExT-Chat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.types import Params
from lionjax.data.boxes import Box
from lionjax.data.images import to_pil_image
from lionjax.data.letterbox import Letterbox, preprocess_sam_image
from lionjax.inference import expert_folder
from lionjax.inference.engine import round_up_to_bucket
from lionjax.inference.sampling import require_finite
from lionjax.models.vision.sam_decoder import Sam, postprocess_masks
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.training.checksum import params_digest

MAX_BOXES = (1, 4, 16, 64)  # boxes of one call; a few sizes limit the number of compilations


@dataclasses.dataclass(frozen=True, eq=False)
class Segmenter:
    """SAM with its parameters."""

    config: SamConfig
    params: Params

    @property
    def feature_width(self) -> int:
        """Width of the rows: that of the image embedding, and 4 for the box."""
        return self.config.prompt_embed_dim + 4

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of the parameters and sizes, by which kept features are recognized."""
        return params_digest(self.params, repr(self.config))

    def segment(self, image: object, box: Box) -> np.ndarray:
        """bool (height, width): the mask that a box prompts, x0 y0 x1 y1 in 0..1 of the image.

        Of SAM's masks its first, as for prompts that mean one thing. Raises UserError where SAM computes NaN.
        """
        image = to_pil_image(image)
        side, square = self.config.image_size, Letterbox(*image.size)
        box_114 = np.array([[square.to_padded(box)]], np.float32) * side
        image_1HWC = preprocess_sam_image(image, side)[None]
        logits_1HW = np.asarray(_mask_logits(self.config, self.params, image_1HWC, box_114))[0]
        require_finite(np.isfinite(logits_1HW).all(axis=(1, 2)), "segments")
        inside = square.pixel_rect(side)
        return (postprocess_masks(logits_1HW, side, inside, (image.height, image.width)) > 0)[0]

    def segment_features(self, image: object, boxes: Sequence[Box]) -> np.ndarray:
        """float32 (K, width + 4): the features of the segments in the boxes, x0 y0 x1 y1 in 0..1 of the image.

        Raises UserError where SAM computes NaN or infinity.
        """
        rows = [np.zeros((0, self.feature_width), np.float32)]
        image = to_pil_image(image)
        side, square = self.config.image_size, Letterbox(*image.size)
        image_1HWC = preprocess_sam_image(image, side)[None] if boxes else None
        for part, padded_K4 in _box_batches(boxes, square, side):
            pooled_KC = np.asarray(_pooled(self.config, self.params, image_1HWC, padded_K4))[0, : len(part)]
            size_K2 = part[:, 2:] - part[:, :2]
            rows.append(np.concatenate([pooled_KC, part[:, :2] + size_K2 / 2, size_K2], axis=1))
        features_KD = np.concatenate(rows)
        require_finite(np.isfinite(features_KD).all(axis=1), "segments")
        return features_KD

    def masks(self, image: object, boxes: Sequence[Box]) -> np.ndarray:
        """bool (K, height, width): SAM's mask for each box, x0 y0 x1 y1 in 0..1 of the image.

        Raises UserError where SAM computes NaN or infinity.
        """
        image = to_pil_image(image)
        side, square = self.config.image_size, Letterbox(*image.size)
        masks = [np.zeros((0, image.height, image.width), bool)]
        image_1HWC = preprocess_sam_image(image, side)[None] if boxes else None
        for part, padded_K4 in _box_batches(boxes, square, side):
            logits_KHW = np.asarray(_mask_logits(self.config, self.params, image_1HWC, padded_K4))[0, : len(part)]
            require_finite(np.isfinite(logits_KHW).all(axis=(1, 2)), "masks")
            rect = square.pixel_rect(side)
            masks.append(postprocess_masks(logits_KHW, side, rect, (image.height, image.width)) > 0)
        return np.concatenate(masks)


def _box_batches(boxes: Sequence[Box], square: Letterbox, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(boxes (K, 4) in 0..1 of the image, the same in pixels of SAM's square with padding (1, N, 4)), in batches."""
    for start in range(0, len(boxes), MAX_BOXES[-1]):
        part = np.clip(np.array(boxes[start : start + MAX_BOXES[-1]], np.float32), 0, 1)
        padded_K4 = np.zeros((1, round_up_to_bucket(len(part), MAX_BOXES, MAX_BOXES[-1]), 4), np.float32)
        padded_K4[0, : len(part)] = np.array([square.to_padded(box) for box in part]) * side
        yield part, padded_K4


@functools.partial(jax.jit, static_argnums=0)
def _mask_logits(config: SamConfig, params: Params, image_BHWC, box_BK4):
    """Mask logits (B, K, h, w) of boxes in pixels of SAM's square."""

    def run(sam: Sam):
        return sam.decode(sam.encode(image_BHWC), sam.prompts.embed_boxes(box_BK4))[0][:, :, 0]

    return Sam(config).apply({"params": params}, method=run).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _pooled(config: SamConfig, params: Params, image_BHWC, box_BK4):
    """(B, K, C): the image embedding averaged over the mask of each box (in pixels of SAM's square)."""
    image_BhwC, logits_BKHW = _embed_and_segment(config, params, image_BHWC, box_BK4)
    side = config.grid_size
    prob_BKHW = jax.nn.sigmoid(logits_BKHW.astype(jnp.float32))
    weight_BKhw = prob_BKHW.reshape(*prob_BKHW.shape[:2], side, 4, side, 4).mean((3, 5))
    total_BK = weight_BKhw.sum((2, 3))[..., None]
    return jnp.einsum("BKhw,BhwC->BKC", weight_BKhw, image_BhwC.astype(jnp.float32)) / total_BK


@functools.partial(jax.jit, static_argnums=0)
def _mask_logits(config: SamConfig, params: Params, image_BHWC, box_BK4):
    """(B, K, h, w) mask logits of boxes in pixels of SAM's square."""
    return _embed_and_segment(config, params, image_BHWC, box_BK4)[1].astype(jnp.float32)


def _embed_and_segment(config: SamConfig, params: Params, image_BHWC, box_BK4):
    """(image embedding (B, h, w, C), mask logits (B, K, H, W)) of boxes in pixels of SAM's square."""

    def run(sam: Sam):
        image_BhwC = sam.encode(image_BHWC)
        return image_BhwC, sam.decode(image_BhwC, sam.prompts.embed_boxes(box_BK4))[0][:, :, 0]

    return Sam(config).apply({"params": params}, method=run)


def load(folder: str | Path) -> Segmenter:
    """The segmenter of a folder with SAM's weights, released or converted. Raises UserError for another model."""
    folder = expert_folder.check_folder(folder, "SAM's weights")
    config, params, _ = expert_folder.load_weights(folder, SamConfig, "SAM's weights")
    return Segmenter(config, jax.device_put(params))
