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
from lionjax.data.datasets.annotated_images import Photo, Row, Table


def read_json(path: Path) -> object:
    """A JSON file, gzipped or not; UserError names the file that is missing or broken."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {path}; check the folder") from error
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read ({error}); replace it") from error


def in_split(key: object, split: str, share: float) -> bool:
    """Whether a picture belongs to a split: `share` of all are held out, as many are for validation.

    By a checksum of its key, so that it stays where it is when others come and go. With share 0 all belong to all.
    """
    place = zlib.crc32(str(key).encode()) / 2**32
    which = "heldout" if place < share else "validation" if place < 2 * share else "train"
    return share == 0 or which == split


@contextlib.contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Turns what goes wrong on oddly shaped entries into one sentence that names the file."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"an entry of {path} is not of the format it is said to have ({said})") from error


class Reader:
    """Collects photos and rows while a file is read, so that each photo is entered once."""

    def __init__(self, root: Path):
        self.root, self.photos, self.rows, self.outlines = root, [], {}, []
        self.numbers: dict[object, int] = {}

    def photo(self, key: object, photo: Photo) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.photos)
            self.photos.append(photo)
        return self.numbers[key]

    def row(self, task: str, row: Row) -> None:
        self.rows.setdefault(task, []).append(row)

    def table(self, max_pixels: int) -> Table:
        return Table(self.root, self.photos, self.rows, self.outlines, max_pixels)


def corners(bbox) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as x0, y0, x1, y1."""
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def entries(path: Path, tree: object, name: str, fields: tuple[str, ...]) -> list[dict]:
    """The list under `name`, each of whose entries has the fields."""
    rows = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list {name!r}; give a file of the format it is said to have")
    for number, row in enumerate(rows):
        missing = [key for key in fields if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{path}: entry {number} of {name!r} has no {missing[0]!r}")
    return rows
