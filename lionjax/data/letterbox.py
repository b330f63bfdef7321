# SPDX-License-Identifier: Apache-2.0
"""Pictures that keep their aspect: padded to a square for CLIP and for SAM, and boxes there and back.

NExT-Chat's way (and Shikra's): the picture lies in the middle of a white square as long as its longer side, and boxes
are fractions of that square. SAM's picture lies in the middle of a square of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lionjax.data.images import Box

WHITE = (255, 255, 255)
SAM_MEAN = (123.675, 116.28, 103.53)  # of 0..255
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Letterbox:
    """The square around a picture of `width` x `height` pixels."""

    width: int
    height: int

    @property
    def side(self) -> int:
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """Where the picture's left and upper edge lie in the square, in pixels."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def to_padded(self, box: Box) -> Box:
        """A box of the picture as a box of the square, both in 0..1."""
        left, top = self.offset
        x0, y0, x1, y1 = box
        return (
            (x0 * self.width + left) / self.side,
            (y0 * self.height + top) / self.side,
            (x1 * self.width + left) / self.side,
            (y1 * self.height + top) / self.side,
        )

    def from_padded(self, box: Box) -> Box:
        """A box of the square as a box of the picture, both in 0..1; what lies on the padding is cut off."""
        left, top = self.offset

        def cut(edge: float, start: int, length: int) -> float:
            return min(max((edge * self.side - start) / length, 0.0), 1.0)

        x0, y0, x1, y1 = box
        across, down = (left, self.width), (top, self.height)
        return cut(x0, *across), cut(y0, *down), cut(x1, *across), cut(y1, *down)

    def pixel_rect(self, size: int) -> tuple[int, int, int, int]:
        """Where the picture lies in a square of `pixels` a side: top, left, high, wide in whole pixels, at least 1."""
        high, wide = (max(1, int(edge * size / self.side + 0.5)) for edge in (self.height, self.width))
        return (size - high) // 2, (size - wide) // 2, high, wide


def letterbox_image(image: Image.Image, size: int, color: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An RGB picture in the middle of a square of one color, as uint8 (pixels, pixels, 3); bicubic."""
    square = Letterbox(*image.size)
    whole = Image.new("RGB", (square.side, square.side), color)
    whole.paste(image, square.offset)
    return np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC))


def letterbox_sam_image(image: Image.Image, size: int = 1024) -> np.ndarray:
    """An RGB picture in the middle of SAM's square: uint8 (pixels, pixels, 3); bilinear."""
    top, left, high, wide = Letterbox(*image.size).pixel_rect(size)
    whole = np.zeros((size, size, 3), np.uint8)
    small = image.resize((wide, high), Image.Resampling.BILINEAR)
    whole[top : top + high, left : left + wide] = np.asarray(small)
    return whole


def normalize_sam_image(pixels_BHWC: np.ndarray, size_B2: np.ndarray) -> np.ndarray:
    """Squares of pictures of these sizes (width, height) as SAM reads them: float32, normalised, zeros around."""
    image = (pixels_BHWC.astype(np.float32) - np.float32(SAM_MEAN)) / np.float32(SAM_STD)
    for row, (width, height) in zip(image, np.asarray(size_B2).tolist()):
        top, left, high, wide = Letterbox(width, height).pixel_rect(row.shape[0])
        row[:top], row[top + high :], row[:, :left], row[:, left + wide :] = 0, 0, 0, 0
    return image


def preprocess_sam_image(image: Image.Image, size: int = 1024) -> np.ndarray:
    """An RGB picture as NExT-Chat shows it to SAM: float32 (pixels, pixels, 3), normalised, zeros around it."""
    return normalize_sam_image(letterbox_sam_image(image, size)[None], np.array([image.size]))[0]


def letterbox_mask(mask_HW: np.ndarray, size: int) -> np.ndarray:
    """A mask of the picture as bool (pixels, pixels) in SAM's square, for training."""
    top, left, high, wide = Letterbox(mask_HW.shape[1], mask_HW.shape[0]).pixel_rect(size)
    small = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((wide, high), Image.Resampling.BILINEAR)
    whole = np.zeros((size, size), bool)
    whole[top : top + high, left : left + wide] = np.asarray(small) >= 128
    return whole
