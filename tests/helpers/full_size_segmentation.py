# SPDX-License-Identifier: Apache-2.0
"""The segmentation data of the full-size configs, in the formats that they name: a few rows of each file."""

import json
import pickle
from pathlib import Path

import numpy as np
from full_size_data import BOX, ROWS, SIZE, write_picture
from PIL import Image

from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.label_maps import LabelMaps
from lionjax.data.datasets.reason_seg import ReasonSeg
from lionjax.data.datasets.refer import Refer

CLASSES = ("disc", "square", "sky-other")
OUTLINE = [[8, 6, 40, 6, 40, 30, 8, 30]]


def write_label_maps(source: LabelMaps) -> None:
    """A JSON list of names as ADE20K's, or COCO-Stuff's lines."""
    file = Path(source.class_file)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{number}: {name}\n" for number, name in enumerate(CLASSES))
    file.write_text(json.dumps(CLASSES) if file.suffix == ".json" else lines)
    for number in range(ROWS):
        labels_HW = np.full(SIZE[::-1], 255, np.uint8)
        labels_HW[6:30, 8:40] = source.first_label + number % 2
        labels_HW[30:, :8] = source.first_label + 2
        path = Path(source.label_dir) / f"{number:012d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels_HW).save(path)
        write_picture(Path(source.image_dir) / f"{number:012d}.jpg", number)


def instance(number: int, category: int = 1) -> dict:
    x0, y0, x1, y1 = BOX
    fields = {"id": number, "image_id": number, "category_id": category, "segmentation": OUTLINE}
    return fields | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}


def image_entries(count: int) -> list[dict]:
    return [{"id": n, "file_name": f"{n:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for n in range(count)]


def write_instances(source: Coco) -> None:
    """Parts of objects, as PACO names them."""
    folder, images = Path(source.folder), image_entries(4 * ROWS)  # some of them are held out
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"images": images, "annotations": [instance(image["id"]) for image in images]}
    (folder / source.instances_file).write_text(json.dumps(tree | {"categories": [{"id": 1, "name": "disc:rim"}]}))
    for image in images:
        write_picture(folder / source.image_dir / image["file_name"], image["id"])


def write_refer(source: Refer) -> None:
    folder, images = Path(source.folder), image_entries(ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [{"sent": "the disc", "raw": "the disc", "tokens": ["the", "disc"], "sent_id": 0}]
    splits = ("train", "val", "testA")
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": n, "category_id": 1, "split": splits[n % 3 if n > 5 else 0]}
        | {"file_name": f"{n:012d}_{n}.jpg", "sent_ids": [0], "sentences": sentences}
        for n in range(ROWS)
    ]
    (folder / source.refs_file).write_bytes(pickle.dumps(refs, protocol=2))
    tree = {"images": images, "annotations": [instance(n) for n in range(ROWS)]}
    (folder / "instances.json").write_text(json.dumps(tree | {"categories": [{"id": 1, "name": "disc"}]}))
    for image in images:
        write_picture(Path(source.image_dir) / image["file_name"], image["id"])


def write_reason_seg(source: ReasonSeg) -> None:
    for folder in ("train", "val"):
        for number in range(ROWS // 2):
            path = Path(source.file) / folder / f"{number:012d}.jpg"
            write_picture(path, number)
            shape = {"label": "target", "points": [[8, 6], [40, 6], [40, 30]]}
            row = {"text": ["Which one is it?"], "is_sentence": number % 2 == 0, "shapes": [shape]}
            path.with_suffix(".json").write_text(json.dumps(row))


WRITERS = {LabelMaps: write_label_maps, Refer: write_refer, ReasonSeg: write_reason_seg}
