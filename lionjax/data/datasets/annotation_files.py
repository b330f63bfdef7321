# SPDX-License-Identifier: Apache-2.0
"""Shared helpers of the annotation readers: JSON files, splits, format errors, and a builder of `AnnotatedImages`."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, HeldImages, ImageInfo
from lionjax.data.datasets.splits import check_heldout_fraction, in_split, split_key

log = logging.getLogger(__name__)
ROW_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)

GZIP_START = b"\x1f\x8b"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, gzipped or not, without a byte order mark.

    Raises UserError if it is missing, damaged or not UTF-8.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == GZIP_START or path.suffix == ".gz" else data
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {path}; check the path") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as text ({error}); give a UTF-8 file") from error


def read_json(path: Path) -> object:
    """The contents of a JSON file, gzipped or not. Raises UserError if it is missing or invalid."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); replace it") from error


def split_lines(text: str) -> list[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank.

    Only a line feed ends a line, with or without a carriage return: U+2028, U+0085 and others stand inside of JSON
    strings, at which `str.splitlines` would cut.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(location for messages, row) of a JSON list, of one JSON object, or of one JSON value a line; gzipped or not.

    A line that is not JSON gives a UserError in place of the row, so that the other rows can be used. Raises
    UserError for a file that cannot be read, and for one without any row of JSON.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = read_json(path)
        yield from ((f"{path}, entry {number},", row) for number, row in enumerate(rows, 1))
        return
    lines, is_any_json = split_lines(text), False
    tree = None
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(text) if len(lines) > 1 else None  # one object over several lines
    if tree is not None:
        yield f"{path},", tree
        return
    for number, line in lines:
        location = f"{path}, line {number},"
        try:
            row = json.loads(line)
            is_any_json = True
        except (ValueError, RecursionError) as error:
            row = UserError(f"{location} is not valid JSON ({error}); correct the line")
        yield location, row
    if not is_any_json:
        raise UserError(f"{path} has no line of JSON; give a JSON list or one JSON object a line")


def read_all_rows(path: Path) -> list[Any]:
    """The rows of `read_rows`, none of an empty file. Raises UserError for the first line that is not JSON."""
    if not read_text(path).strip():
        return []
    rows = []
    for _, row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        rows.append(row)
    return rows


@contextlib.contextmanager
def convert_format_errors(path: Path) -> Iterator[None]:
    """Converts errors from malformed entries to a UserError that names the file."""
    try:
        yield
    except ROW_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"an entry of {path} does not have the expected format ({reason}); correct the file") from error


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """A file of annotations of the images in `image_dir`, of which `heldout_fraction` (0..1) is held out."""

    file: str
    image_dir: str
    heldout_fraction: float = 0.0

    def __post_init__(self):
        check_heldout_fraction(self.heldout_fraction)

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return Path(self.file), Path(self.image_dir)


class AnnotatedImagesBuilder:
    """Collects images and annotations of a split while a file is read; each image is added once.

    A row that cannot be used becomes an annotation that names its problem; see `row`. `row_images`: {name: place} of
    the images of the present row whose bytes its own file holds; each place is an image of its own.
    """

    def __init__(self, root: Path, split: str = "train", heldout_fraction: float = 0.0):
        self.root, self.image_infos, self.annotations, self.segmentations = root, [], {}, []
        self.split, self.heldout_fraction = split, heldout_fraction
        self.index_by_key: dict[object, int] = {}
        self.units_by_image: dict[int, tuple[tuple[float, float], str]] = {}
        self.unknown_keys: set[str] = set()
        self.row_images: Mapping[str, tuple] = {}
        self.held_places: dict[int, tuple] = {}
        self.held_names: Counter[str] = Counter()

    def includes(self, name: str) -> bool:
        """Whether an image file under the root belongs to the split."""
        return in_split(split_key(self.root, name), self.split, self.heldout_fraction)

    def includes_text(self, row: str) -> bool:
        """Whether a text-only row belongs to the split."""
        return in_split(row, self.split, self.heldout_fraction)

    @contextlib.contextmanager
    def row(self, location: str, task: str) -> Iterator[None]:
        """Reads one row: its error becomes an annotation of `task` that is a bad record when it is used."""
        try:
            yield
        except UserError as error:
            self._add_problem(task, location, str(error))
        except ROW_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            self._add_problem(task, location, f"{location} does not have the expected format ({reason}); correct it")

    def _add_problem(self, task: str, location: str, problem: str) -> None:
        if in_split(location, self.split, self.heldout_fraction):
            index = self.add_image(("bad", location), ImageInfo(""))
            self.add_annotation(task, Annotation(index, problem=problem))

    def entries(
        self, path: Path, tree: object, list_name: str, required: tuple[str, ...], task: str
    ) -> Iterator[tuple[str, dict]]:
        """(location, entry) of list `list_name` with all `required` fields; other entries are bad rows of `task`.

        Raises UserError if there is no such list.
        """
        rows = tree.get(list_name) if isinstance(tree, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{path} has no list {list_name!r}; give a file of the expected format")
        for number, entry in enumerate(rows):
            location = f"{path}: entry {number} of {list_name!r}"
            missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
            if missing:
                self._add_problem(task, location, f"{location} has no {missing[0]!r}; add it")
            else:
                yield location, entry

    def check_keys(
        self, row: Mapping, known: Collection[str], image_keys: Sequence[str], location: str, file: Path
    ) -> None:
        """As `typed_rows.check_keys`, with one warning for each unknown key of a file."""
        for key in typed_rows.check_keys(row, known, image_keys, location):
            if key not in self.unknown_keys:
                self.unknown_keys.add(key)
                described = typed_rows.describe_key(key, known)
                log.warning("%s: the key %s is not read; its first row is %s", file, described, location.rstrip(","))

    def check_units(self, index: int, size: tuple[float, float] | None, has_boxes: bool, location: str) -> None:
        """Keeps the units of an image's boxes: pixels of an image of `size`, or fractions (None).

        Raises UserError for another size than an earlier row's, and for boxes in other units than those of an earlier
        row.
        """
        units, image_info = size or (1.0, 1.0), self.image_infos[index]
        earlier = self.units_by_image.get(index)
        if earlier is not None and has_boxes and units != earlier[0]:
            names = ["fractions" if u == (1.0, 1.0) else f"pixels of {u[0]:g} x {u[1]:g}" for u in (units, earlier[0])]
            raise UserError(
                f"{location} has boxes of {image_info.name} in {names[0]}, but {earlier[1].rstrip(',')} has them in "
                f"{names[1]}; give all boxes of an image in the same units"
            )
        known_size = (image_info.width, image_info.height)
        if size is not None and known_size not in ((1.0, 1.0), size):
            raise UserError(
                f"{location} gives {image_info.name} the size {size[0]:g} x {size[1]:g}, but an earlier row "
                f"{known_size[0]:g} x {known_size[1]:g}; give the size of the file"
            )
        if has_boxes and earlier is None:
            self.units_by_image[index] = units, location
        if has_boxes or (size is not None and earlier is None):
            width, height = units
            self.image_infos[index] = dataclasses.replace(image_info, width=width, height=height)

    def add_image(self, key: object, image_info: ImageInfo) -> int:
        """The index of the image with this key, added if it is new. Its tags are those of the first row with any."""
        key = self.row_images.get(image_info.name, key)
        if key not in self.index_by_key:
            self.index_by_key[key] = len(self.image_infos)
            self.image_infos.append(self._with_own_name(image_info))
        index = self.index_by_key[key]
        if image_info.tags and not self.image_infos[index].tags:
            self.image_infos[index] = dataclasses.replace(self.image_infos[index], tags=image_info.tags)
        return index

    def _with_own_name(self, image_info: ImageInfo) -> ImageInfo:
        """A new image; one that a file holds gets a number behind its name if an earlier one has the same name."""
        name = image_info.name
        if name not in self.row_images:
            return image_info
        self.held_places[len(self.image_infos)] = self.row_images[name]
        self.held_names[name] += 1
        number = self.held_names[name]
        return image_info if number == 1 else dataclasses.replace(image_info, name=f"{name} #{number}")

    def add_annotation(self, task: str, annotation: Annotation) -> None:
        self.annotations.setdefault(task, []).append(annotation)

    def build(self, max_pixels: int, read_place: Callable[..., bytes] | None = None) -> AnnotatedImages:
        """The images of the split. `read_place`: from the place of an image that a file holds to its bytes."""
        held = {} if read_place is None else HeldImages(self.held_places, read_place)
        return AnnotatedImages(self.root, self.image_infos, self.annotations, self.segmentations, max_pixels, held)


def xywh_to_xyxy(bbox: object, location: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) from COCO's (x, y, width, height). Raises UserError for anything but four finite numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(typed_rows.is_number, bbox)):
        raise UserError(f"{location} has the bbox {typed_rows.abbreviate(bbox)}; give four numbers x, y, width, height")
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height
