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

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    convert_format_errors,
    in_split,
    read_json,
    validated_entries,
    xywh_to_xyxy,
)
from lionjax.data.scenes.referring import with_article
from lionjax.data.scenes.tasks import POPE_SETTINGS

MIN_AREA_FRACTION = 0.004  # of the picture: smaller things are hard to point at, even for people


@renamed_fields(captions="captions_file", instances="instances_file", images="image_dir", share="heldout_fraction")
@dataclass(frozen=True)
class Coco:
    """A folder with captions.json, instances.json or both, and the pictures. `share` of them are held out."""

    folder: str
    captions_file: str = "captions.json"
    instances_file: str = "instances.json"
    image_dir: str = "images"
    heldout_fraction: float = 0.1
    name: str = "coco"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        folder = Path(self.folder)
        said, shown = (folder / name for name in (self.captions_file, self.instances_file))
        if not (said.is_file() or shown.is_file()):
            raise UserError(f"{folder} has neither {self.captions_file} nor {self.instances_file}; give a COCO folder")
        reader = AnnotatedImagesBuilder(folder / self.image_dir)
        if shown.is_file():
            with convert_format_errors(shown):
                _add_instances(reader, shown, lambda key: in_split(key, split, self.heldout_fraction))
        if said.is_file():
            with convert_format_errors(said):
                _add_captions(reader, said, lambda key: in_split(key, split, self.heldout_fraction))
        return reader.build(max_pixels)


def _add_images(builder: AnnotatedImagesBuilder, path: Path, tree: object, is_included, tags: dict) -> None:
    for image in validated_entries(path, tree, "images", ("id", "file_name", "width", "height")):
        key = image["id"]
        if is_included(key):
            size = float(image["width"]), float(image["height"])
            builder.add_image(key, ImageInfo(image["file_name"], *size, tuple(sorted(tags.get(key, ())))))


def _add_captions(builder: AnnotatedImagesBuilder, path: Path, is_included) -> None:
    tree, said = read_json(path), {}
    _add_images(builder, path, tree, is_included, {})
    for note in validated_entries(path, tree, "annotations", ("image_id", "caption")):
        said.setdefault(note["image_id"], []).append(note["caption"].strip())
    for key, number in builder.index_by_key.items():
        if key in said:
            builder.add_annotation("caption", Annotation(number, tuple(said[key])))


def _add_instances(builder: AnnotatedImagesBuilder, path: Path, is_included) -> None:
    """Rows from instances: tags, existence, and boxes of kinds that occur once in a picture."""
    tree, things = read_json(path), {}
    kinds = {c["id"]: c["name"] for c in validated_entries(path, tree, "categories", ("id", "name"))}
    for note in validated_entries(path, tree, "annotations", ("image_id", "category_id", "bbox")):
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
    _add_images(builder, path, tree, is_included, company)
    for key, number in builder.index_by_key.items():
        if key in things:
            builder.add_annotation("tags", Annotation(number, (", ".join(builder.image_infos[number].tags),)))
            _add_existence_questions(builder, number, often, beside, key)
            _add_unique_objects(builder, number, things[key])


def _add_unique_objects(builder: AnnotatedImagesBuilder, image_index: int, instances: list) -> None:
    """Boxes and masks of things whose kind occurs once in the picture."""
    photo = builder.image_infos[image_index]
    counts = Counter(kind for kind, _ in instances)
    crowds = {kind for kind, note in instances if note.get("iscrowd")}
    for kind, note in instances:
        box = xywh_to_xyxy(note["bbox"])
        area = (box[2] - box[0]) * (box[3] - box[1])
        if counts[kind] > 1 or kind in crowds or area < MIN_AREA_FRACTION * photo.width * photo.height:
            continue
        regions = (len(builder.segmentations),)
        builder.segmentations.append(note.get("segmentation"))
        meant = {"kind": kind, "regions": regions}
        for task in ("rec", "res") if note.get("segmentation") else ("rec",):
            builder.add_annotation(task, Annotation(image_index, words=f"the {kind}", boxes=(box,), **meant))
        names = (f"the {kind}", with_article(kind), kind)
        builder.add_annotation("reg", Annotation(image_index, names, question_boxes=(box,), **meant))


def _add_existence_questions(
    builder: AnnotatedImagesBuilder, image_index: int, category_counts: Counter, cooccurrence: dict, key: object
) -> None:
    """POPE's questions: up to three things that are there, and as many that are not, one of each setting.

    `often` counts pictures by kind, `beside` counts for each kind the kinds that it shares pictures with.
    """
    present = builder.image_infos[image_index].tags
    absent = [kind for kind, _ in category_counts.most_common() if kind not in present]
    near = sum((cooccurrence[kind] for kind in present), Counter())
    hard = [kind for kind, _ in near.most_common() if kind not in present]
    pools = {"random": absent, "popular": absent[:5], "adversarial": hard[:5]}
    rng = np.random.default_rng(zlib.crc32(str(key).encode()))
    for setting, kind in zip(POPE_SETTINGS, rng.permutation(present).tolist()):
        pool = pools[setting] or absent
        if pool:
            words = {"yes": kind, "no": pool[rng.integers(len(pool))]}
            for answer, word in words.items():
                builder.add_annotation(
                    "existence", Annotation(image_index, (answer,), words=with_article(word), kind=setting)
                )
