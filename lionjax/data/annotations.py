# SPDX-License-Identifier: Apache-2.0
"""Annotation files in the formats people have: RefCOCO, VQA, POPE, and lines of JSON. Each becomes a `Table`."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.data.table import Photo, Row, Table
from lionjax.interfaces import UserError


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


@dataclass(frozen=True)
class RefCoco:
    """RefCOCO, RefCOCO+ or RefCOCOg: a list of {img_id, sents, bbox (x, y, width, height), height, width}.

    The picture is `file_name`, or else `img_id` without its last number, with .jpg, in the folder `images`. Every
    row is asked both ways: for the box, and for the expression.
    """

    file: str
    images: str
    share: float = 0.0
    name: str = "refcoco"

    def open(self, split: str, max_pixels: int) -> Table:
        file, reader = Path(self.file), Reader(Path(self.images))
        fields = ("img_id", "sents", "bbox", "height", "width")
        with well_formed(file):
            for entry in entries(file, {"refs": read_json(file)}, "refs", fields):
                stem = str(entry["img_id"]).rpartition("_")[0]
                name = entry.get("file_name") or f"{stem}.jpg"
                if in_split(name, split, self.share):
                    size = float(entry["width"]), float(entry["height"])
                    number = reader.photo(name, Photo(name, *size))
                    box, words = corners(entry["bbox"]), entry["sents"].strip()
                    reader.row("rec", Row(number, words=words, boxes=(box,)))
                    reader.row("reg", Row(number, (words,), question_boxes=(box,)))
        return reader.table(max_pixels)


@dataclass(frozen=True)
class Vqa:
    """VQA-format files. `pattern` makes a file name of an image id: 'COCO_val2014_{:012d}.jpg', '{}.jpg'.

    All ten answers stay, so that one is drawn as often as people gave it. Questions without answers are left out.
    """

    questions: str
    answers: str
    images: str
    pattern: str = "{}.jpg"
    share: float = 0.0
    name: str = "vqa"

    def open(self, split: str, max_pixels: int) -> Table:
        said, reader = {}, Reader(Path(self.images))
        path = Path(self.answers)
        with well_formed(path):
            for note in entries(path, read_json(path), "annotations", ("question_id", "answers")):
                said[note["question_id"]] = tuple(a["answer"] for a in note["answers"])
        path = Path(self.questions)
        fields = ("question_id", "image_id", "question")
        with well_formed(path):
            for entry in entries(path, read_json(path), "questions", fields):
                key, answers = entry["image_id"], said.get(entry["question_id"])
                if answers and in_split(key, split, self.share):
                    number = reader.photo(key, Photo(self.pattern.format(key)))
                    reader.row("vqa", Row(number, answers, entry["question"]))
        return reader.table(max_pixels)


@dataclass(frozen=True)
class Lines:
    """Lines of JSON: {"image", "question", "answer" or "answers", "task", "kind", "expression", "boxes",
    "question_boxes", "tags", "width", "height"}; only an answer or boxes are needed. A line without an image is text
    alone, such as an instruction that mPLUG-Owl's second stage mixes in.

    A "file_name" goes before the image. Without a question a wording is drawn for the task. Boxes are fractions, or
    pixels where width and height stand. POPE's "text" and "label" are read as existence.
    """

    file: str
    images: str
    share: float = 0.0
    name: str = "lines"

    def open(self, split: str, max_pixels: int) -> Table:
        file, reader = Path(self.file), Reader(Path(self.images))
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}, line {number},"
            with well_formed(Path(where)):
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("image", ""), str):
                    raise UserError(f"{where} is no object with a picture's path as its 'image'")
                entry.setdefault("image", "")
                if isinstance(entry.get("file_name"), str):
                    entry["image"] = entry["file_name"]  # as RefCOCO rows say where their picture lies
                if in_split(entry["image"] or line, split, self.share):
                    _line(reader, entry, where)
        return reader.table(max_pixels)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error})") from error
    if text.lstrip().startswith("["):
        rows = read_json(file)  # the same entries as one JSON list
        return [json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])]
    return [line for line in text.splitlines() if line.strip()]


def _line(reader: Reader, entry: dict, where: str) -> None:
    pope = "label" in entry and "text" in entry
    task = entry.get("task") or ("existence" if pope else "vqa")
    answers = entry.get("answers") or [entry.get("label" if pope else "answer")]
    boxes, asked = (entry.get(key) or [] for key in ("boxes", "question_boxes"))
    texts = [answer for answer in answers if isinstance(answer, str) and answer.strip()]
    if not texts and not boxes:
        raise UserError(f"{where} has neither an answer nor boxes")
    size = [float(entry.get(key) or 1) for key in ("width", "height")]
    number = reader.photo(entry["image"], Photo(entry["image"], *size, tuple(entry.get("tags") or ())))
    row = Row(
        number,
        tuple(texts),
        entry.get("text" if pope else "question") or "",
        entry.get("expression") or "",
        entry.get("kind") or entry.get("setting") or "",
        tuple(map(tuple, boxes)),
        tuple(map(tuple, asked)),
    )
    reader.row(task, row)
