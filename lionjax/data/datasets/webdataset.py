# SPDX-License-Identifier: Apache-2.0
"""WebDataset: tars whose files of one name up to the first dot are one sample: `0001.jpg`, `0001.txt`, `0001.json`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_text, split_lines
from lionjax.data.datasets.conversations import ROUND_KEYS
from lionjax.data.datasets.table_rows import GIVEN_ANSWERS, IMAGE_KEYS, MAX_TEXT, RowTable, TableRow, clean_name
from lionjax.data.datasets.tar_index import Member, Span, members, read_span

log = logging.getLogger(__name__)

IMAGE_TYPE = re.compile(r"((image|img)?_?\d*\.)?(jpe?g|png|webp)")  # also image1.jpg, image2.jpg of one sample
TEXT_TYPES = ("txt", "json", "cls")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 100_000
CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class WebDataset(RowTable):
    """Tars in the form of WebDataset: a folder, one tar, or a pattern such as `shard-{000000..000009}.tar`.

    A sample may have images (jpg, png, webp), `txt` (a caption), `json` (an object with the keys of JSON Lines or a
    conversation, or a list of such objects) and `cls` (a class, or its line number from 0 in `classes.txt` beside the
    tars). The index of a tar is made once and kept beside it, or in the user's cache folder; images are read from their
    places in the tar. Several images of one sample (`0001.image1.jpg`, `0001.image2.jpg`) are in the order of the tar.
    """

    name: str = "shards"
    SUFFIXES = (".tar",)

    def files(self) -> list[Path]:
        if (match := RANGE.search(self.file)) is None:
            return super().files()
        first, last = map(int, match.groups())
        if not first <= last < first + MAX_SHARDS:
            raise UserError(f"{self.file} is no range of at most {MAX_SHARDS} numbers; give the lower number first")
        numbers = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
        paths = [Path(self.file[: match.start()] + number + self.file[match.end() :]) for number in numbers]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise UserError(f"there is no file {missing}, which {self.file} names; check the path")
        return paths

    def paths(self) -> tuple[Path, ...]:
        return tuple(self.files()) if RANGE.search(self.file) else super().paths()

    def rows(self, file: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        samples: dict[str, dict[str, Member]] = {}
        for member in members(file):
            folder, slash, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if not stem or stem.startswith("__"):  # hidden files, and those that describe the shard
                continue
            kind = kind.lower()
            if kind not in TEXT_TYPES and not IMAGE_TYPE.fullmatch(kind):
                if kind not in builder.unknown_keys:
                    log.warning("%s: files of the type %r are not read; the first is %s", file, kind, member.name)
                    builder.unknown_keys.add(kind)
                continue
            files = samples.setdefault(f"{folder}{slash}{stem}", {})
            if kind in files:
                member = member._replace(problem="there twice; remove one")
            files[kind] = member
        classes = self._classes(file)
        for key, files in samples.items():
            yield from _sample_rows(file, key, files, classes)

    def _classes(self, file: Path) -> list[str]:
        path = file.parent / CLASSES_FILE
        if not path.is_file():
            return []
        return [line.strip() for _, line in split_lines(read_text(path))]

    def image_reader(self) -> Callable[..., bytes]:
        return partial(read_span, max_bytes=images.MAX_FILE_BYTES)


def _sample_rows(file: Path, key: str, files: dict[str, Member], classes: Sequence[str]) -> Iterator[TableRow]:
    location, held = f"{file}, sample {key},", {}
    rows: list[Any]
    try:
        for kind, member in files.items():
            if member.problem:
                raise UserError(f"{location} has the file {member.name}, which is {member.problem}")
            if kind not in TEXT_TYPES:
                name = clean_name(member.name) or "image"
                held[name if name not in held else f"{name}.{len(held)}"] = Span(str(file), member.offset, member.size)
        rows = _parse_sample(file, files, [*held], classes, location)
    except UserError as error:
        rows = [error]
    for number, row in enumerate(rows, 1):
        yield TableRow(location if len(rows) == 1 else f"{location} entry {number},", row, held)


def _parse_sample(
    file: Path, files: dict[str, Member], names: list[str], classes: Sequence[str], location: str
) -> list[Any]:
    """The rows of a sample with images of these names. Raises UserError for a sample that cannot be used."""
    texts = {kind: _read_member(file, files[kind], location) for kind in TEXT_TYPES if kind in files}
    if not texts:
        raise UserError(f"{location} has no {', '.join(TEXT_TYPES[:-1])} or {TEXT_TYPES[-1]}; add one of them")
    try:
        tree = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} has a json file that is not valid JSON ({error}); correct it") from error
    rows = []
    for row in tree if isinstance(tree, list) else [tree]:
        if not isinstance(row, dict):
            rows.append(row)  # which `add_table_row` refuses
            continue
        if not names and any(row.get(key) for key in IMAGE_KEYS):
            raise UserError(f"{location} names an image that the tar does not hold; add the image to the sample")
        row = {key: value for key, value in row.items() if key not in IMAGE_KEYS}
        if names:
            row |= {"image": names[0]} if len(names) == 1 else {"images": names}
        if not any(row.get(key) for key in (*GIVEN_ANSWERS, *ROUND_KEYS)):
            if "txt" in texts:
                row["caption"] = texts["txt"].strip()
            elif "cls" in texts:
                row["label"] = _class_name(texts["cls"].strip(), classes, location)
        rows.append(row)
    return rows


def _read_member(file: Path, member: Member, location: str) -> str:
    try:
        return read_span(Span(str(file), member.offset, member.size), MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location} has {member.name}, which is no UTF-8 ({error}); correct it") from error


def _class_name(text: str, classes: Sequence[str], location: str) -> str:
    if not text.isdecimal():
        return text
    if len(text) > 9 or int(text) >= len(classes):
        known = f"{CLASSES_FILE} has {len(classes)} names" if classes else f"there is no {CLASSES_FILE}"
        raise UserError(f"{location} has the class number {text[:9]}, but {known}; put the names there, one a line")
    return classes[int(text)]
