# SPDX-License-Identifier: Apache-2.0
"""COCO folders as a `Table`: captions, tags, questions of existence, and boxes and masks of lone things.

What the annotations do not say is not made up: an expression refers to a thing only where its kind occurs once in the
picture, and crowds are never asked about.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Photo, Row, Table
from lionjax.data.datasets.annotation_files import Reader, corners, entries, in_split, read_json, well_formed
from lionjax.data.scenes.referring import article
from lionjax.data.scenes.tasks import SETTINGS

LEAST_AREA = 0.004  # of the picture: smaller things are hard to point at, even for people


@dataclass(frozen=True)
class Coco:
    """A folder with captions.json, instances.json or both, and the pictures. `share` of them are held out."""

    folder: str
    captions: str = "captions.json"
    instances: str = "instances.json"
    images: str = "images"
    share: float = 0.1
    name: str = "coco"

    def open(self, split: str, max_pixels: int) -> Table:
        folder = Path(self.folder)
        said, shown = (folder / name for name in (self.captions, self.instances))
        if not (said.is_file() or shown.is_file()):
            raise UserError(f"{folder} has neither {self.captions} nor {self.instances}; give a COCO folder")
        reader = Reader(folder / self.images)
        if shown.is_file():
            with well_formed(shown):
                _instances(reader, shown, lambda key: in_split(key, split, self.share))
        if said.is_file():
            with well_formed(said):
                _captions(reader, said, lambda key: in_split(key, split, self.share))
        return reader.table(max_pixels)


def _photos(reader: Reader, path: Path, tree: object, wanted, tags: dict) -> None:
    for image in entries(path, tree, "images", ("id", "file_name", "width", "height")):
        key = image["id"]
        if wanted(key):
            size = float(image["width"]), float(image["height"])
            reader.photo(key, Photo(image["file_name"], *size, tuple(sorted(tags.get(key, ())))))


def _captions(reader: Reader, path: Path, wanted) -> None:
    tree, said = read_json(path), {}
    _photos(reader, path, tree, wanted, {})
    for note in entries(path, tree, "annotations", ("image_id", "caption")):
        said.setdefault(note["image_id"], []).append(note["caption"].strip())
    for key, number in reader.numbers.items():
        if key in said:
            reader.row("caption", Row(number, tuple(said[key])))


def _instances(reader: Reader, path: Path, wanted) -> None:
    """Rows from instances: tags, existence, and boxes of kinds that occur once in a picture."""
    tree, things = read_json(path), {}
    kinds = {c["id"]: c["name"] for c in entries(path, tree, "categories", ("id", "name"))}
    for note in entries(path, tree, "annotations", ("image_id", "category_id", "bbox")):
        if note["category_id"] not in kinds:
            raise UserError(f"{path}: no category has the id {note['category_id']!r}")
        things.setdefault(note["image_id"], []).append((kinds[note["category_id"]], note))
    company = {key: {kind for kind, _ in notes} for key, notes in things.items()}
    often = Counter(dict.fromkeys(kinds.values(), 0))
    often.update(kind for shown in company.values() for kind in sorted(shown))
    beside = {kind: Counter() for kind in often}
    for shown in company.values():
        for kind in shown:
            beside[kind].update(sorted(shown - {kind}))
    _photos(reader, path, tree, wanted, company)
    for key, number in reader.numbers.items():
        if key in things:
            reader.row("tags", Row(number, (", ".join(reader.photos[number].tags),)))
            _existence(reader, number, often, beside, key)
            _lone(reader, number, things[key])


def _lone(reader: Reader, number: int, notes: list) -> None:
    """Boxes and masks of things whose kind occurs once in the picture."""
    photo = reader.photos[number]
    counts = Counter(kind for kind, _ in notes)
    crowds = {kind for kind, note in notes if note.get("iscrowd")}
    for kind, note in notes:
        box = corners(note["bbox"])
        area = (box[2] - box[0]) * (box[3] - box[1])
        if counts[kind] > 1 or kind in crowds or area < LEAST_AREA * photo.width * photo.height:
            continue
        regions = (len(reader.outlines),)
        reader.outlines.append(note.get("segmentation"))
        meant = {"kind": kind, "regions": regions}
        for task in ("rec", "res") if note.get("segmentation") else ("rec",):
            reader.row(task, Row(number, words=f"the {kind}", boxes=(box,), **meant))
        names = (f"the {kind}", article(kind), kind)
        reader.row("reg", Row(number, names, question_boxes=(box,), **meant))


def _existence(reader: Reader, number: int, often: Counter, beside: dict, key: object) -> None:
    """POPE's questions: up to three things that are there, and as many that are not, one of each setting.

    `often` counts pictures by kind, `beside` counts for each kind the kinds that it shares pictures with.
    """
    present = reader.photos[number].tags
    absent = [kind for kind, _ in often.most_common() if kind not in present]
    near = sum((beside[kind] for kind in present), Counter())
    hard = [kind for kind, _ in near.most_common() if kind not in present]
    pools = {"random": absent, "popular": absent[:5], "adversarial": hard[:5]}
    rng = np.random.default_rng(zlib.crc32(str(key).encode()))
    for setting, kind in zip(SETTINGS, rng.permutation(present).tolist()):
        pool = pools[setting] or absent
        if pool:
            words = {"yes": kind, "no": pool[rng.integers(len(pool))]}
            for answer, word in words.items():
                reader.row("existence", Row(number, (answer,), words=article(word), kind=setting))
