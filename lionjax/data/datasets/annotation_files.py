# SPDX-License-Identifier: Apache-2.0
"""Annotation files in the formats people have: RefCOCO, VQA, POPE, and lines of JSON. Each becomes a `Table`."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo


def read_json(path: Path) -> object:
    """A JSON file, gzipped or not; UserError names the file that is missing or broken."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {path}; check the folder") from error
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read ({error}); replace it") from error


def in_split(key: object, split: str, heldout_fraction: float) -> bool:
    """Whether a picture belongs to a split: `share` of all are held out, as many are for validation.

    By a checksum of its key, so that it stays where it is when others come and go. With share 0 all belong to all.
    """
    place = zlib.crc32(str(key).encode()) / 2**32
    which = "heldout" if place < heldout_fraction else "validation" if place < 2 * heldout_fraction else "train"
    return heldout_fraction == 0 or which == split


@contextlib.contextmanager
def convert_format_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong on oddly shaped entries into one sentence that names the file."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"an entry of {path} is not of the format it is said to have ({said})") from error


class AnnotatedImagesBuilder:
    """Collects photos and rows while a file is read, so that each photo is entered once."""

    def __init__(self, root: Path):
        self.root, self.image_infos, self.annotations, self.segmentations = root, [], {}, []
        self.index_by_key: dict[object, int] = {}

    def add_image(self, key: object, image_info: ImageInfo) -> int:
        if key not in self.index_by_key:
            self.index_by_key[key] = len(self.image_infos)
            self.image_infos.append(image_info)
        return self.index_by_key[key]

    def add_annotation(self, task: str, annotation: Annotation) -> None:
        self.annotations.setdefault(task, []).append(annotation)

    def build(self, max_pixels: int) -> AnnotatedImages:
        return AnnotatedImages(self.root, self.image_infos, self.annotations, self.segmentations, max_pixels)


def xywh_to_xyxy(bbox) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as x0, y0, x1, y1."""
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def validated_entries(path: Path, tree: object, list_name: str, required: tuple[str, ...]) -> list[dict]:
    """The list under `name`, each of whose entries has the fields."""
    rows = tree.get(list_name) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list {list_name!r}; give a file of the format it is said to have")
    for number, row in enumerate(rows):
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{path}: entry {number} of {list_name!r} has no {missing[0]!r}")
    return rows
