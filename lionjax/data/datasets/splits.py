# SPDX-License-Identifier: Apache-2.0
"""Which split an image belongs to: decided by the image alone, so that all readers of an image agree."""

from __future__ import annotations

import math
import os
import re
import zlib
from pathlib import Path, PurePosixPath

from lionjax.core.types import UserError

# A COCO image has other names in other years: COCO_train2014_000000000009.jpg is 000000000009.jpg in 2017.
NUMBERED_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)")
MIN_UNIQUE_DIGITS = 4  # a shorter number, such as "1.jpg", is common to many folders
MIN_UNIQUE_LENGTH = 12


def in_split(key: object, split: str, heldout_fraction: float) -> bool:
    """Whether an image belongs to a split: `heldout_fraction` of all are held out, and as many are for validation.

    Decided by a checksum of its key, so that it does not depend on other images. With fraction 0 every image is in
    every split.
    """
    position = zlib.crc32(str(key).encode()) / 2**32
    assigned_split = (
        "heldout" if position < heldout_fraction else "validation" if position < 2 * heldout_fraction else "train"
    )
    return heldout_fraction == 0 or assigned_split == split


def split_key(root: str | Path, name: str) -> str:
    """The key of an image file under `root` for `in_split`: the same for every reader and image folder.

    A number as in COCO's and Visual Genome's names, without zeros in front; any other name of at least 12 characters,
    without its ending; and a shorter one with the folder that it is in, as it may be another image elsewhere.
    """
    # Only "." and ".." are removed; a symbolic link keeps its name.
    path = PurePosixPath(os.path.normpath(Path(root) / name).replace(os.sep, "/"))
    stem = path.stem
    if len(stem) >= MIN_UNIQUE_DIGITS and (match := NUMBERED_NAME.fullmatch(stem)):
        return match[1]
    return stem if len(stem) >= MIN_UNIQUE_LENGTH else f"{path.parent.name}/{stem}"


def check_heldout_fraction(value: object) -> None:
    """Raises UserError for anything but a finite number in 0..1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
        raise UserError(
            f"heldout_fraction is {value!r}; give a share between 0 (nothing is held out) and 1 (everything is)"
        )
