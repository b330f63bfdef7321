# SPDX-License-Identifier: Apache-2.0
"""Reference captions in COCO's form: NoCaps (arXiv 1812.08658), and the ground-truth files of LAVIS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_json
from lionjax.data.datasets.question_file import (
    NO_ANSWERS,
    Question,
    QuestionFile,
    coco_file_name_pattern,
    list_rows,
    row_id,
)


@dataclass(frozen=True)
class CaptionReferences(QuestionFile):
    """{"images": [{id, file_name, domain}], "annotations": [{image_id, caption}]} as task `caption`.

    All captions of an image are one question, whose id is the image's and whose kind is its `domain` (NoCaps). Without
    `file_name`, as in coco_karpathy_test_gt.json, the image is IMAGE_ID.jpg or COCO_val2014_IMAGE_ID.jpg. A file
    without annotations is a test split.
    """

    name: str = "captions"
    TASK = "caption"

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        path, captions = Path(self.file), {}
        tree = read_json(path)
        is_test = isinstance(tree, dict) and "annotations" not in tree
        for location, note in () if is_test else list_rows(path, "annotations"):
            if not isinstance(note, dict) or not {"image_id", "caption"} <= note.keys():
                yield location, UserError(f"{location} has no image_id or no caption; add them")
            else:
                captions.setdefault(str(note["image_id"]), []).append(typed_rows.text(note, "caption", location))
        for location, image in list_rows(path, "images"):
            yield location, {**image, "captions": captions} if isinstance(image, dict) else image

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        number, name = row_id(row, "id", location), typed_rows.text(row, "file_name", location)
        captions = tuple(row["captions"].get(number, ())) or NO_ANSWERS
        fields = {"question_id": number, "kind": typed_rows.text(row, "domain", location)}
        if not name:
            pattern = coco_file_name_pattern(Path(self.image_dir), number)
            name = pattern.format(int(number) if ":" in pattern else number)
        yield Question("caption", name, Annotation(0, captions, **fields))
