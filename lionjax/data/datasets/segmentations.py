# SPDX-License-Identifier: Apache-2.0
"""COCO segmentations to masks: polygons and run lengths, checked before they reach pycocotools' C code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets.typed_rows import abbreviate, is_number

MIN_POLYGON_NUMBERS = 6  # x and y of three corners


def region_masks(
    segmentations: Sequence, regions: Sequence[int], image_size: tuple[float, float], name: str
) -> np.ndarray:
    """bool (K, height, width): masks of the segmentations with the indices `regions`.

    `image_size`: (width, height) of the image `name`. Raises UserError for no regions, and as `segmentation_to_mask`.
    """
    if not regions:
        raise UserError(f"an annotation of {name} has no mask; give a segmentation")
    size = int(image_size[1]), int(image_size[0])
    return np.stack([segmentation_to_mask(segmentations[region], size, name) for region in regions])


def segmentation_to_mask(
    segmentation: object, size: tuple[int, int], name: str = "the image", allow_empty: bool = False
) -> np.ndarray:
    """bool (height, width) from COCO polygons or run lengths; `size` is (height, width) of the image `name`.

    Raises UserError for a polygon with fewer than three corners, run lengths of another size than the image, damaged
    ones, and without `allow_empty` a mask without any pixel.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    if isinstance(segmentation, list):
        _check_polygons(segmentation, name)
        run_lengths = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        counts = _run_lengths(segmentation, size, name)
        run_lengths = coco_mask.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    mask_HW = coco_mask.decode(run_lengths).astype(bool)
    if not allow_empty and not mask_HW.any():
        raise UserError(f"a mask of {name} has no pixel in the image of {width} x {height}; correct or remove it")
    return mask_HW


def _check_polygons(polygons: list, name: str) -> None:
    if not polygons:
        raise UserError(f"a mask of {name} has no polygon; give at least one")
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            raise UserError(
                f"a polygon of {name} is {abbreviate(polygon)}; give a list of numbers x0, y0, x1, y1, x2, y2, ..."
            )
        if len(polygon) < MIN_POLYGON_NUMBERS or len(polygon) % 2:
            raise UserError(
                f"a polygon of {name} has {len(polygon)} numbers; give x and y of at least three corners, "
                f"{MIN_POLYGON_NUMBERS} numbers or more"
            )


def _run_lengths(segmentation: object, size: tuple[int, int], name: str) -> list[int]:
    """Uncompressed run lengths, whose sum is the number of pixels."""
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
        raise UserError(
            f"a mask of {name} is {abbreviate(segmentation)}; give polygons, or run lengths with counts and size"
        )
    mask_size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(mask_size, Sequence) or list(mask_size) != list(size):
        raise UserError(
            f"a mask of {name} has the size (height, width) {abbreviate(mask_size)} but the image {list(size)}; "
            "give the mask of this image"
        )
    if isinstance(counts, str | bytes):
        counts = decompress_counts(counts if isinstance(counts, str) else counts.decode("ascii", "replace"), name)
    is_counts = isinstance(counts, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
    if not is_counts or min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]:
        raise UserError(
            f"the run lengths of a mask of {name} are damaged: they do not add up to its {size[0] * size[1]} pixels; "
            "write them again"
        )
    return counts


def decompress_counts(text: str, name: str) -> list[int]:
    """Run lengths from COCO's compressed text: 5 bits a character, each length from the third on less the one before
    the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise UserError(f"the run lengths of a mask of {name} have the character {character!r}; write them again")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise UserError(f"the run lengths of a mask of {name} end in the middle of a number; write them again")
    return counts
