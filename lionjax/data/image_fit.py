# SPDX-License-Identifier: Apache-2.0
"""How an image of any size becomes the model's square: pad, resize, center crop, as Hugging Face's image processors.

The result equals theirs (`CLIPImageProcessor`, `LlavaImageProcessor`, `BlipImageProcessor`, ...), but only the pixels
that the crop keeps are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import resample
from lionjax.data.letterbox import Letterbox
from lionjax.data.resample import Color


@dataclass(frozen=True)
class ImageFit:
    """How images are resized before the center crop to the model's size. Raises UserError for invalid values.

    `mode`: "stretch" to `size` (height, width), without aspect ratio; "shortest_edge": the shorter edge becomes
    `size[0]` pixels, or less so that the longer one does not exceed `size[1]`; "none": no resize. 0 in `size` stands
    for the model's image size, and for no limit of the longer edge.
    `resample`: Pillow's filter. `pad_rgb`: color of the padding to a square (0 to 255); empty: the processor's
    `pad_color`. A crop that exceeds the image is filled with black.
    """

    mode: Literal["stretch", "shortest_edge", "none"] = "stretch"
    size: tuple[int, int] = (0, 0)
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "hamming"] = "bicubic"
    pad_rgb: tuple[int, ...] = ()

    def __post_init__(self):
        if min(self.size) < 0:
            raise UserError(f"processor.image_fit.size is {self.size}; give 0 or more")
        if self.resample not in resample.RESAMPLING:
            known = ", ".join(resample.RESAMPLING)
            raise UserError(f"processor.image_fit.resample is {self.resample!r}; it can be {known}")
        if self.pad_rgb and (len(self.pad_rgb) != 3 or not all(0 <= level <= 255 for level in self.pad_rgb)):
            raise UserError(f"processor.image_fit.pad_rgb is {self.pad_rgb}; give three numbers in 0..255, or none")

    def resized(self, height: int, width: int, image_size: int) -> tuple[int, int]:
        """(height, width) of an image of this size after the resize; `image_size` is the model's."""
        if self.mode == "none":
            return height, width
        if self.mode == "stretch":
            return self.size[0] or image_size, self.size[1] or image_size
        shortest, longest = self.size[0] or image_size, self.size[1]
        if longest:
            return _limited_size(height, width, shortest, longest)
        enlarged = int(shortest * max(height, width) / min(height, width))
        return (enlarged, shortest) if width <= height else (shortest, enlarged)

    def apply(self, image: Image.Image, image_size: int, pad_color: Color | None = None) -> np.ndarray:
        """The RGB image as uint8 (image_size, image_size, 3); with `pad_color` it is padded to a square first."""
        square = Letterbox(*image.size)
        pad = pad_color is not None
        height, width = self.resized(*((square.side, square.side) if pad else image.size[::-1]), image_size)
        top, left = (height - image_size) // 2, (width - image_size) // 2
        y0, x0 = max(top, 0), max(left, 0)
        window = (y0, x0, min(top + image_size, height) - y0, min(left + image_size, width) - x0)
        if pad:
            arguments = (image, square.offset, square.side, height, width, pad_color, self.resample, window)
            pixels = resample.resize_padded(*arguments)
        else:
            pixels = resample.resize(image, height, width, None, self.resample, window)
        if pixels.shape[:2] == (image_size, image_size):
            return pixels
        whole = np.zeros((image_size, image_size, 3), np.uint8)
        whole[y0 - top :, x0 - left :][: window[2], : window[3]] = pixels
        return whole


def _limited_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) with the shorter edge `shortest` and the longer at most `longest`, as in transformers."""
    exact = float(shortest)
    low, high = float(min(height, width)), float(max(height, width))
    if high / low * shortest > longest:
        exact = longest * low / high
        shortest = int(round(exact))
    if min(height, width) == shortest:
        return height, width
    if width < height:
        return max(int(exact * height / width), 1), max(shortest, 1)
    return max(shortest, 1), max(int(exact * width / height), 1)
