# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg as JSON files of referring expressions with boxes and masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.data.datasets.annotated_images import Photo, Row, Table
from lionjax.data.datasets.annotation_files import Reader, corners, entries, in_split, read_json, well_formed


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
