# SPDX-License-Identifier: Apache-2.0
"""Flickr30k Entities (arXiv 1505.04870) as published: Sentences/ID.txt, Annotations/ID.xml and lists of ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from lionjax.core.types import UserError
from lionjax.data.boxes import Box
from lionjax.data.datasets.annotated_images import BOXES_MARK, Annotation
from lionjax.data.datasets.annotation_files import read_text, split_lines
from lionjax.data.datasets.question_file import Question, QuestionFile

SPLIT_FILES = {"train": ("train",), "validation": ("val",), "heldout": ("test", "val")}
PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]+)\]")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
DOCTYPE = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True)
class Flickr30kEntities(QuestionFile):
    """A folder (`file`) of Flickr30k Entities in its own splits as task `grounded`: captions whose phrases have boxes.

    Split "heldout" is test.txt, or val.txt where there is none. An id is IMAGE/NUMBER of the sentence. Coordinates are
    used as they stand, as MDETR and Kosmos-2 do (the authors' own reader subtracts 1). `facts["phrases"]` has the text,
    types and boxes of each phrase that has boxes, in order, and the words `before` it.
    """

    name: str = "flickr30k_entities"
    TASK = "grounded"
    OWN_SPLITS = True

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        folder = Path(self.file)
        lists = [folder / f"{name}.txt" for name in SPLIT_FILES[split]]
        for _, number in split_lines(read_text(next(filter(Path.is_file, lists), lists[0]))):
            number = number.strip()
            path = folder / "Sentences" / f"{number}.txt"
            try:
                boxes = read_boxes(folder / "Annotations" / f"{number}.xml")
                lines = [line.strip() for _, line in split_lines(read_text(path))]
            except UserError as error:
                yield str(path), error
                continue
            for count, line in enumerate(lines):
                row = {"image_id": number, "sentence_id": count, "sentence": line, "boxes": boxes}
                yield f"{path}, line {count + 1},", row

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        phrases, boxes, parts, words_before, end = [], [], [], "", 0
        for match in PHRASE.finditer(row["sentence"]):
            chain, types, words = match[1], match[2].strip("/").split("/"), match[3]
            found = row["boxes"].get(chain, [])
            parts += [row["sentence"][end : match.start()], words, *[f" {BOXES_MARK}"] * len(found)]
            before = words_before + row["sentence"][end : match.start()]
            words_before, end = before + words, match.end()
            boxes += found
            if found:
                phrases.append({"text": words, "types": types, "boxes": [list(box) for box in found], "before": before})
        sentence = "".join([*parts, row["sentence"][end:]])
        question_id = f"{row['image_id']}/{row['sentence_id']}"
        fields = {"question_id": question_id, "boxes": tuple(boxes), "facts": {"phrases": phrases}}
        yield Question("grounded", f"{row['image_id']}.jpg", Annotation(0, (sentence,), **fields), True)


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes (x0, y0, x1, y1) in pixels of each chain of an annotation file.

    Raises UserError for XML that is damaged or declares entities, and for a box without four numbers.
    """
    text = read_text(path)
    if DOCTYPE.search(text):
        raise UserError(f"{path} declares a document type or entities; use the published file")
    try:
        boxes: dict[str, list[Box]] = {}
        for thing in ElementTree.fromstring(text).iter("object"):
            if (corners := thing.find("bndbox")) is not None:
                x0, y0, x1, y1 = (float(corners.findtext(name) or "") for name in CORNERS)
                for name in thing.iter("name"):
                    boxes.setdefault((name.text or "").strip(), []).append((x0, y0, x1, y1))
        return boxes
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an annotation file ({error}); replace it") from error
