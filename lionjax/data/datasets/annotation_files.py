# SPDX-License-Identifier: Apache-2.0
"""Shared helpers of the annotation readers: JSON files, splits, format errors, and a builder of `AnnotatedImages`."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo


def read_json(path: Path) -> object:
    """The contents of a JSON file, gzipped or not. Raises UserError if it is missing or invalid."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {path}; check the path") from error
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); replace it") from error


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


@contextlib.contextmanager
def convert_format_errors(path: Path) -> Iterator[None]:
    """Converts errors from malformed entries to a UserError that names the file."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"an entry of {path} does not have the expected format ({reason}); correct the file") from error


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """A file of annotations of the images in `image_dir`, of which `heldout_fraction` is held out."""

    file: str
    image_dir: str
    heldout_fraction: float = 0.0


class AnnotatedImagesBuilder:
    """Collects images and annotations while a file is read; each image is added once."""

    def __init__(self, root: Path):
        self.root, self.image_infos, self.annotations, self.segmentations = root, [], {}, []
        self.index_by_key: dict[object, int] = {}

    def add_image(self, key: object, image_info: ImageInfo) -> int:
        """The index of the image with this key, which is added if it is new."""
        if key not in self.index_by_key:
            self.index_by_key[key] = len(self.image_infos)
            self.image_infos.append(image_info)
        return self.index_by_key[key]

    def add_annotation(self, task: str, annotation: Annotation) -> None:
        self.annotations.setdefault(task, []).append(annotation)

    def build(self, max_pixels: int) -> AnnotatedImages:
        return AnnotatedImages(self.root, self.image_infos, self.annotations, self.segmentations, max_pixels)


def xywh_to_xyxy(bbox) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) from COCO's (x, y, width, height)."""
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def validated_entries(path: Path, tree: object, list_name: str, required: tuple[str, ...]) -> list[dict]:
    """The entries of list `list_name`. Raises UserError if the list or a `required` field of an entry is missing."""
    entries = tree.get(list_name) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list {list_name!r}; give a file of the expected format")
    for number, entry in enumerate(entries):
        missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(f"{path}: entry {number} of {list_name!r} has no {missing[0]!r}; add it")
    return entries
