# SPDX-License-Identifier: Apache-2.0
"""Masks as COCO's compressed run-length encoding, in the form that JSON holds: {"size": [H, W], "counts": text}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """The run-length encoding of a mask (H, W)."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask (H, W) bool of a run-length encoding."""
    from pycocotools import mask as coco

    return coco.decode({**rle, "counts": str(rle["counts"]).encode()}).astype(bool)
