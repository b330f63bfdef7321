# SPDX-License-Identifier: Apache-2.0
"""Letterboxing: images padded to a square for CLIP and SAM with their aspect ratio, and boxes to the square and back.

As in NExT-Chat (arXiv 2311.04498) and Shikra (arXiv 2306.15195), the image is centered in a white square whose side is
its longer edge, and boxes are fractions of that square. For SAM the padding is zero after normalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lionjax.data import images, resample
from lionjax.data.boxes import Box, box_to_text, replace_boxes, split_text_and_boxes

WHITE = (255, 255, 255)
SAM_MEAN = (123.675, 116.28, 103.53)  # for pixel values in 0..255
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Letterbox:
    """The square with an image of `width` x `height` pixels in its center, or in its upper left corner (SAM)."""

    width: int
    height: int
    corner: bool = False

    @property
    def side(self) -> int:
        """The side of the square in pixels of the image."""
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) padding in pixels of the image."""
        if self.corner:
            return 0, 0
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def to_padded(self, box: Box) -> Box:
        """The box in fractions of the square, from fractions of the image."""
        left, top = self.offset
        x0, y0, x1, y1 = box
        return (
            (x0 * self.width + left) / self.side,
            (y0 * self.height + top) / self.side,
            (x1 * self.width + left) / self.side,
            (y1 * self.height + top) / self.side,
        )

    def from_padded(self, box: Box) -> Box:
        """The box in fractions of the image, from fractions of the square; clipped to the image."""
        left, top = self.offset

        def cut(edge: float, start: int, length: int) -> float:
            return min(max((edge * self.side - start) / length, 0.0), 1.0)

        x0, y0, x1, y1 = box
        x_range, y_range = (left, self.width), (top, self.height)
        return cut(x0, *x_range), cut(y0, *y_range), cut(x1, *x_range), cut(y1, *y_range)

    def pixel_rect(self, size: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the image in a square of `size` pixels; height and width are at least 1."""
        height, width = (max(1, int(edge * size / self.side + 0.5)) for edge in (self.height, self.width))
        if self.corner:
            return 0, 0, height, width
        return (size - height) // 2, (size - width) // 2, height, width


def letterbox_image(image: Image.Image, size: int, color: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An RGB image padded to a square with `color`, as uint8 (size, size, 3); bicubic.

    Equals the resize of the padded square, which is never in memory.
    """
    square = Letterbox(*image.size)
    return resample.resize_padded(image, square.offset, square.side, size, size, color)


def letterbox_sam_image(image: Image.Image, size: int = 1024, corner: bool = False) -> np.ndarray:
    """An RGB image padded to SAM's square with zeros, as uint8 (size, size, 3); bilinear. `corner`: see `Letterbox`."""
    top, left, height, width = Letterbox(*image.size, corner).pixel_rect(size)
    padded = np.zeros((size, size, 3), np.uint8)
    padded[top : top + height, left : left + width] = resample.resize(image, height, width, None, "bilinear")
    return padded


def normalize_sam_image(pixels_BHWC: np.ndarray, size_B2: np.ndarray, corner: bool = False) -> np.ndarray:
    """SAM's normalized input (float32, zero padding) from letterboxed images; `size_B2`: original (width, height)."""
    image = (pixels_BHWC.astype(np.float32) - np.float32(SAM_MEAN)) / np.float32(SAM_STD)
    for row, (width, height) in zip(image, np.asarray(size_B2).tolist()):
        top, left, resized_height, resized_width = Letterbox(width, height, corner).pixel_rect(row.shape[0])
        row[:top], row[top + resized_height :], row[:, :left], row[:, left + resized_width :] = 0, 0, 0, 0
    return image


def preprocess_sam_image(image: Image.Image, size: int = 1024) -> np.ndarray:
    """SAM's input for an RGB image, as in NExT-Chat: float32 (size, size, 3), normalized, zero padding."""
    return normalize_sam_image(letterbox_sam_image(image, size)[None], np.array([image.size]))[0]


def letterbox_mask(mask_HW: np.ndarray, size: int, corner: bool = False) -> np.ndarray:
    """An image mask as bool (size, size) in SAM's square, for training."""
    top, left, height, width = Letterbox(mask_HW.shape[1], mask_HW.shape[0], corner).pixel_rect(size)
    padded = np.zeros((size, size), bool)
    padded[top : top + height, left : left + width] = resize_mask(mask_HW, height, width)
    return padded


def resize_mask(mask_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask as bool (height, width): bilinear, where at least half is covered."""
    resized = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized) >= 128


def split_padded_boxes(
    text: str, exact_boxes: Sequence[Box], image_letterbox: Letterbox, in_digits: bool
) -> tuple[list[str | Box], list[Box]]:
    """(texts and boxes in order, boxes) of a text, the boxes as fractions of the padded square.

    `in_digits`: one text with the boxes in digits. Else raises UserError for a box outside the image or without area.
    """
    pieces = split_text_and_boxes(text, exact_boxes)
    boxes = [image_letterbox.to_padded(piece) for piece in pieces if not isinstance(piece, str)]
    boxes = boxes if in_digits else [images.normalize_box(box) for box in boxes]
    remaining_boxes = iter(boxes)
    if not in_digits:
        return [piece if isinstance(piece, str) else next(remaining_boxes) for piece in pieces], boxes
    return [pad_boxes(text, image_letterbox, exact_boxes)], boxes


def pad_boxes(text: str, image_letterbox: Letterbox, exact_boxes: Sequence[Box] = ()) -> str:
    """The text with its boxes as fractions of the padded square; unchanged for a square image.

    A box that rounds to one of `exact_boxes` is computed from it.
    """
    if image_letterbox.width == image_letterbox.height:
        return text
    exact_by_text = {box_to_text(box): box for box in exact_boxes}
    return replace_boxes(text, lambda box: image_letterbox.to_padded(exact_by_text.get(box_to_text(box), box)))


def unpad_boxes(text: str, image_letterbox: Letterbox) -> tuple[str, list[Box]]:
    """(text, boxes in order) with the boxes of a text as fractions of the image, from fractions of the padded square.

    The text has them rounded to three decimals.
    """
    boxes: list[Box] = []

    def unpad(box: Box) -> Box:
        boxes.append(image_letterbox.from_padded(box))
        return boxes[-1]

    return replace_boxes(text, unpad), boxes
