# SPDX-License-Identifier: Apache-2.0
"""Typed fields of one annotation row. Every function raises UserError with the row's location for another type.

A text where a list of texts belongs is one text, and four numbers where a list of boxes belongs are one box; nothing
else is converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from lionjax.core.types import UserError
from lionjax.data.boxes import Box

# Keys that describe a row and are never used; in any file.
METADATA_KEYS = frozenset(
    ("id", "question_id", "image_id", "img_id", "ref_id", "ann_id", "uid", "source", "dataset", "split", "metadata")
    + ("comment", "notes", "license", "url", "image_url", "coco_url", "flickr_url", "date_captured", "topic", "subset")
)
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "file", "files")
    + ("filename", "filepath", "path", "frame", "jpg", "png", "foto", "bild")
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
NEAR = 0.75  # similarity from which a key counts as a misspelt one


def check_keys(row: Mapping, known: Collection[str], image_keys: Sequence[str], location: str) -> list[str]:
    """The unknown keys of a row, with which it is the same row.

    Raises UserError for a key that is near to a known one which the row lacks, and for a row without an image with a
    key that names one: such a row would be used without its image.
    """
    has_image, unknown = any(row.get(key) for key in image_keys), []
    for key in row:
        if key in known or key in METADATA_KEYS:
            continue
        words = set(re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()))
        value = row[key][0] if isinstance(row[key], list) and row[key] else row[key]
        is_image_path = isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
        nearest = next(iter(get_close_matches(key.lower(), known, 1, NEAR)), None)
        if not has_image and nearest not in image_keys and (is_image_path or words & IMAGE_WORDS):
            nearest = image_keys[0]
        if nearest is not None and row.get(nearest) is None and not (has_image and nearest in image_keys):
            raise UserError(f"{location} has the unknown key {key!r}; write {nearest!r}, or remove it")
        unknown.append(key)
    return unknown


def describe_key(key: str, known: Collection[str]) -> str:
    """An unknown key with the known one that is nearest to it, for messages."""
    nearest = get_close_matches(key.lower(), known, 1, 0.0)
    return f"{key!r} (the nearest key that is read is {nearest[0]!r})" if nearest else repr(key)


def text(row: Mapping, key: str, location: str) -> str:
    """The text of a key; empty if it is missing or null."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{location} has {abbreviate(value)} as {key!r}; give a text in quotation marks")
    return value


def texts(row: Mapping, key: str, location: str) -> tuple[str, ...]:
    """The texts of a key, without blank ones; a single text is a list of one."""
    value = row.get(key)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise UserError(f"{location} has {abbreviate(value)} as {key!r}; give a list of texts")
    return tuple(item for item in values if item.strip())


def is_number(value: object) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def image_size(row: Mapping, location: str) -> tuple[float, float] | None:
    """(width, height) of the image in pixels; None for a row without both."""
    values = [row.get(key) for key in ("width", "height")]
    if values == [None, None]:
        return None
    for key, value in zip(("width", "height"), values):
        if not is_number(value) or value <= 0:
            raise UserError(f"{location} has {abbreviate(value)} as {key!r}; give both in pixels, or neither")
    return float(values[0]), float(values[1])


def boxes(row: Mapping, key: str, location: str) -> tuple[Box, ...]:
    """The boxes of a key as (x0, y0, x1, y1), in the row's units."""
    value = row.get(key)
    if value is None:
        return ()
    rows = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    if not isinstance(rows, list) or not all(
        isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) for box in rows
    ):
        raise UserError(
            f"{location} has {abbreviate(value)} as {key!r}; give a list of boxes of four numbers x0, y0, x1, y1"
        )
    return tuple((float(box[0]), float(box[1]), float(box[2]), float(box[3])) for box in rows)


def abbreviate(value: object) -> str:
    """A value for messages, cut to 40 characters."""
    characters = "null" if value is None else repr(value)
    return characters if len(characters) <= 40 else f"{characters[:37]}..."
