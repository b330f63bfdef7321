# SPDX-License-Identifier: Apache-2.0
"""Canny's edge detector (1986) on NumPy arrays."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LOW, HIGH = 100, 200  # Visual ChatGPT's thresholds, of |gx| + |gy| by Sobel


def canny(gray_HW: np.ndarray, low: float = LOW, high: float = HIGH) -> np.ndarray:
    """bool (H, W): edge pixels of a uint8 image, by Sobel gradients without smoothing before.

    A pixel is kept where its gradient |gx| + |gy| exceeds `low`, is the largest across the edge (of four directions),
    and its connected edge has a pixel above `high`.
    """
    gray_HW = gray_HW.astype(np.float32)
    gx_HW, gy_HW = (ndimage.sobel(gray_HW, axis=axis, mode="nearest") for axis in (1, 0))
    size_HW = np.abs(gx_HW) + np.abs(gy_HW)
    sector_HW = np.round(np.arctan2(gy_HW, gx_HW) * 4 / np.pi).astype(int) % 4
    padded = np.pad(size_HW, 1)
    height, width = size_HW.shape
    peak_HW = np.zeros_like(size_HW, bool)
    for sector, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        peak_HW |= (sector_HW == sector) & (size_HW > behind) & (size_HW >= ahead)
    weak_HW = peak_HW & (size_HW > low)
    label_HW, count = ndimage.label(weak_HW, np.ones((3, 3)))
    is_strong = np.zeros(count + 1, bool)
    is_strong[label_HW[weak_HW & (size_HW > high)]] = True
    return weak_HW & is_strong[label_HW]
