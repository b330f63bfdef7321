# SPDX-License-Identifier: Apache-2.0
"""Captions in Karpathy's splits: LAVIS's files (coco_karpathy_train.json) and Karpathy's own (dataset_coco.json).

Also TextCaps' file (TextCaps_0.1_train.json) and MiniGPT-4's (filter_cap.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_rows
from lionjax.data.datasets.conversations import ImageFolders
from lionjax.data.datasets.splits import NUMBERED_NAME

SPLITS = {"train": ("train", "restval"), "validation": ("val",), "heldout": ("test",)}
# A list of captions in a JSON object, with the key of the caption; the image is `image_id` with .jpg.
CAPTION_LISTS = {"data": "caption_str", "annotations": "caption"}


@renamed_fields()
@dataclass(frozen=True)
class KarpathyCaptions(AnnotationFile):
    """Captions as task `caption`, all captions of an image in one example.

    LAVIS's file is one split, a list of {image, caption (one or a list), image_id}; `heldout_fraction` splits it.
    Karpathy's file has its own splits (train with restval, val, test), in which `heldout_fraction` has no effect.
    TextCaps' file is one split, {"data": [{image_id, caption_str}]}, as is MiniGPT-4's, {"annotations": [{image_id,
    caption}]}; their images are named IMAGE_ID.jpg.
    """

    name: str = "captions"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file = Path(self.file)
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        captions: dict[int, list[str]] = {}
        folders = ImageFolders(builder.root)
        for location, name, texts in _rows(file, split, builder):
            with builder.row(location, "caption"):
                values = typed_rows.texts({"caption": texts}, "caption", location)
                if not name or not values:
                    raise UserError(f"{location} lacks the path of its image or its caption; add them")
                path = folders.find(name)
                index = builder.add_image(path, ImageInfo(path))
                captions.setdefault(index, []).extend(value.strip() for value in values)
        for index, texts in captions.items():
            name = PurePosixPath(builder.image_infos[index].name)
            number = NUMBERED_NAME.fullmatch(name.stem)
            fields = {"question_id": number[1] if number else name.stem, "facts": {"aliases": [name.stem, name.name]}}
            builder.add_annotation("caption", Annotation(index, tuple(texts), **fields))
        return builder.build(max_pixels)


def caption_list(tree: object) -> str:
    """The key of the list of captions in the object of a file, by its first entry; empty for any other object."""

    def is_captions(name: str) -> bool:
        rows = tree.get(name) if isinstance(tree, dict) and "images" not in tree else None
        first = rows[0] if isinstance(rows, list) and rows else None
        return isinstance(first, dict) and {"image_id", CAPTION_LISTS[name]} <= first.keys()

    return next(filter(is_captions, CAPTION_LISTS), "")


def _rows(file: Path, split: str, builder: AnnotatedImagesBuilder) -> Iterator[tuple[str, str, object]]:
    """(location, image path, captions) of the rows of a split."""
    rows = list(read_rows(file))
    if len(rows) == 1 and isinstance(rows[0][1], dict) and "images" in rows[0][1]:
        tree = rows[0][1]
        for location, image in builder.entries(file, tree, "images", ("filename", "split", "sentences"), "caption"):
            if image["split"] in SPLITS[split]:
                name = f"{image.get('filepath') or ''}/{image['filename']}".lstrip("/")
                yield location, name, [sentence.get("raw", "") for sentence in image["sentences"]]
        return
    if len(rows) == 1 and (list_name := caption_list(rows[0][1])):
        key = CAPTION_LISTS[list_name]
        for location, entry in builder.entries(file, rows[0][1], list_name, ("image_id", key), "caption"):
            if builder.includes(name := f"{entry['image_id']}.jpg"):
                yield location, name, entry[key]
        return
    for location, row in rows:
        with builder.row(location, "caption"):
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, dict):
                raise UserError(f"{location} is {typed_rows.abbreviate(row)}; give an object with image and caption")
            name = typed_rows.text(row, "image", location)
            if builder.includes(name):
                yield location, name, row.get("caption")
