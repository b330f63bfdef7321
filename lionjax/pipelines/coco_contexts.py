# SPDX-License-Identifier: Apache-2.0
"""Captions and boxes of COCO's annotation files (arXiv 1405.0312) as the contexts of a language model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lionjax.core.errors import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotation_files import convert_format_errors, read_json, xywh_to_xyxy
from lionjax.pipelines.image_contexts import ImageContext


def read_coco_contexts(captions: Path, instances: Path | None = None) -> list[ImageContext]:
    """The images of captions_SET.json that have captions, with the objects of instances_SET.json in its order.

    Crowds are left out, and boxes are cut at the edges of the image. Raises UserError for files of another form, and
    for an object of an image without a size.
    """
    with convert_format_errors(captions):
        tree = read_json(captions)
        texts: dict[object, list[str]] = {}
        for number, row in enumerate(tree["annotations"]):
            texts.setdefault(row["image_id"], []).append(
                typed_rows.text(row, "caption", f"{captions}: {number}").strip()
            )
        images = {row["id"]: row for row in tree["images"] if row["id"] in texts}
        names = {key: typed_rows.text(row, "file_name", f"{captions}: image {key}") for key, row in images.items()}
    objects: dict[object, list] = {key: [] for key in images}
    if instances is not None:
        with convert_format_errors(instances):
            _add_objects(objects, read_json(instances), images, instances)
    if not images:
        raise UserError(f"{captions} has no image with captions; give COCO's captions_SET.json")
    return [ImageContext(Path(name).stem, name, tuple(texts[key]), tuple(objects[key])) for key, name in names.items()]


def _add_objects(objects: dict[object, list], tree: object, images: dict, path: Path) -> None:
    categories = {row["id"]: row["name"] for row in tree["categories"]}
    for row in tree["annotations"]:
        if row["image_id"] not in objects or row.get("iscrowd"):
            continue
        location = f"{path}: annotation {row['id']}"
        size = typed_rows.image_size(images[row["image_id"]], location)
        if size is None:
            raise UserError(f"{location} is of an image without width and height; add them to the captions file")
        box = np.clip(np.array(xywh_to_xyxy(row["bbox"], location)) / np.array([*size, *size]), 0, 1)
        objects[row["image_id"]].append((categories[row["category_id"]], tuple(map(float, box))))
