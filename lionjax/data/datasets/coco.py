# SPDX-License-Identifier: Apache-2.0
"""COCO (arXiv 1405.0312) as `AnnotatedImages`: captions, tags, POPE existence questions, boxes and masks.

Expressions such as "the dog" are made only for categories with one instance in the image, and never for crowds.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    convert_format_errors,
    read_json,
    xywh_to_xyxy,
)
from lionjax.data.datasets.splits import check_heldout_fraction
from lionjax.data.scenes.referring import with_article
from lionjax.data.scenes.tasks import POPE_SETTINGS

MIN_AREA_FRACTION = 0.004  # of the image; smaller objects are hard to localize, also for people


@dataclass(frozen=True)
class CocoFolder:
    """What both layouts of a COCO folder have. Raises UserError for a `heldout_fraction` out of range."""

    folder: str
    _: KW_ONLY
    heldout_fraction: float = 0.1
    name: str = "coco"

    def __post_init__(self):
        check_heldout_fraction(self.heldout_fraction)


@renamed_fields()
@dataclass(frozen=True)
class Coco(CocoFolder):
    """A COCO folder: captions.json, instances.json or both, and images. `heldout_fraction` of them is held out.

    `open` raises UserError if both annotation files are missing or malformed.
    """

    captions_file: str = "captions.json"
    instances_file: str = "instances.json"
    image_dir: str = "images"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads; one of the two files is enough."""
        files = [Path(self.folder) / name for name in (self.captions_file, self.instances_file) if name]
        return *([file for file in files if file.is_file()] or files), Path(self.folder) / self.image_dir

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        folder = Path(self.folder)
        captions_path, instances_path = (folder / name for name in (self.captions_file, self.instances_file))
        if not (captions_path.is_file() or instances_path.is_file()):
            raise UserError(f"{folder} has neither {self.captions_file} nor {self.instances_file}; give a COCO folder")
        builder = AnnotatedImagesBuilder(folder / self.image_dir, split, self.heldout_fraction)
        if instances_path.is_file():
            with convert_format_errors(instances_path):
                _add_instances(builder, instances_path)
        if captions_path.is_file():
            with convert_format_errors(captions_path):
                _add_captions(builder, captions_path)
        return builder.build(max_pixels)


@dataclass(frozen=True)
class CocoRelease(CocoFolder):
    """COCO as published: annotations/ with captions_SET.json and instances_SET.json, and one image folder for each SET.

    Split "train" is `train_set`; "validation" and "heldout" are `heldout_set`. If both are the same set,
    `heldout_fraction` of it is held out.
    """

    train_set: str = "train2017"
    heldout_set: str = "val2017"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return tuple(
            path for part in dict.fromkeys((self.train_set, self.heldout_set)) for path in self._coco(part).paths()
        )

    def _coco(self, part: str, heldout_fraction: float = 0.0) -> Coco:
        files = (f"annotations/{kind}_{part}.json" for kind in ("captions", "instances"))
        return Coco(self.folder, *files, part, heldout_fraction=heldout_fraction, name=self.name)

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        part = self.train_set if split == "train" else self.heldout_set
        fraction = self.heldout_fraction if self.train_set == self.heldout_set else 0.0
        return self._coco(part, fraction).open(split, max_pixels)


class Instance(NamedTuple):
    """One object: its category, its box (x0, y0, x1, y1) in pixels, and COCO's entry."""

    category: str
    box: tuple[float, float, float, float]
    annotation: dict


def _add_images(builder: AnnotatedImagesBuilder, path: Path, tree: object, tags: dict, task: str) -> None:
    for location, image in builder.entries(path, tree, "images", ("id", "file_name"), task):
        with builder.row(location, task):
            key, name = image["id"], typed_rows.text(image, "file_name", location)
            size = typed_rows.image_size(image, location)
            if not name.strip() or (size is None and task != "caption"):  # captions have no boxes, and need no size
                raise UserError(f"{location} lacks its file_name, width or height; add them")
            if builder.includes(name):
                builder.add_image(key, ImageInfo(name, *(size or (1.0, 1.0)), tuple(sorted(tags.get(key, ())))))


def _add_captions(builder: AnnotatedImagesBuilder, path: Path) -> None:
    tree, captions = read_json(path), {}
    _add_images(builder, path, tree, {}, "caption")
    for location, annotation in builder.entries(path, tree, "annotations", ("image_id", "caption"), "caption"):
        with builder.row(location, "caption"):
            caption = typed_rows.text(annotation, "caption", location).strip()
            captions.setdefault(annotation["image_id"], []).append(caption)
    for key, image_index in list(builder.index_by_key.items()):
        if key in captions:
            builder.add_annotation("caption", Annotation(image_index, tuple(captions[key])))


def _add_instances(builder: AnnotatedImagesBuilder, path: Path) -> None:
    """Annotations from instances: tags, existence questions, and boxes of categories with one instance in the image."""
    tree, instances = read_json(path), {}
    categories = builder.entries(path, tree, "categories", ("id", "name"), "tags")
    category_names = {category["id"]: typed_rows.text(category, "name", place) for place, category in categories}
    fields = ("image_id", "category_id", "bbox")
    for location, annotation in builder.entries(path, tree, "annotations", fields, "rec"):
        with builder.row(location, "rec"):
            if annotation["category_id"] not in category_names:
                raise UserError(
                    f"{location} has the category_id {annotation['category_id']!r}, which is not in 'categories'"
                )
            category = category_names[annotation["category_id"]]
            instance = Instance(category, xywh_to_xyxy(annotation["bbox"], location), annotation)
            instances.setdefault(annotation["image_id"], []).append(instance)
    image_categories = {key: {instance.category for instance in group} for key, group in instances.items()}
    category_counts = Counter(dict.fromkeys(category_names.values(), 0))
    category_counts.update(category for categories in image_categories.values() for category in sorted(categories))
    cooccurrence = {category: Counter() for category in category_counts}
    for categories in image_categories.values():
        for category in categories:
            cooccurrence[category].update(sorted(categories - {category}))
    _add_images(builder, path, tree, image_categories, "tags")
    for key, image_index in list(builder.index_by_key.items()):
        if key in instances:
            builder.add_annotation("tags", Annotation(image_index, (", ".join(builder.image_infos[image_index].tags),)))
            _add_existence_questions(builder, image_index, category_counts, cooccurrence, key)
            _add_unique_objects(builder, image_index, instances[key])


def _add_unique_objects(builder: AnnotatedImagesBuilder, image_index: int, instances: list[Instance]) -> None:
    """Boxes and masks of categories with one instance in the image (tasks rec, res, reg)."""
    image_info = builder.image_infos[image_index]
    counts = Counter(instance.category for instance in instances)
    crowd_categories = {instance.category for instance in instances if instance.annotation.get("iscrowd")}
    for category, box, annotation in instances:
        area = (box[2] - box[0]) * (box[3] - box[1])
        if (
            counts[category] > 1
            or category in crowd_categories
            or area < MIN_AREA_FRACTION * image_info.width * image_info.height
        ):
            continue
        regions, noun = (len(builder.segmentations),), part_noun(category)
        builder.segmentations.append(annotation.get("segmentation"))
        fields = {"kind": category, "regions": regions}
        for task in ("rec", "res") if annotation.get("segmentation") else ("rec",):
            builder.add_annotation(task, Annotation(image_index, words=f"the {noun}", boxes=(box,), **fields))
        names = (f"the {noun}", with_article(noun), noun)
        builder.add_annotation("reg", Annotation(image_index, names, question_boxes=(box,), **fields))


def part_noun(category: str) -> str:
    """A category as words; "bottle:cap" of PACO and PASCAL-Part is the "cap of the bottle"."""
    whole, colon, part = category.partition(":")
    return f"{part.replace('_', ' ')} of the {whole.replace('_', ' ')}" if colon else category


def _add_existence_questions(
    builder: AnnotatedImagesBuilder, image_index: int, category_counts: Counter, cooccurrence: dict, key: object
) -> None:
    """POPE's questions (arXiv 2305.10355): up to 3 present and as many absent categories, one per setting.

    `category_counts`: number of images of each category. `cooccurrence`: for each category, the number of images that
    it shares with every other category.
    """
    present = builder.image_infos[image_index].tags
    absent = [category for category, _ in category_counts.most_common() if category not in present]
    cooccurring = sum((cooccurrence[category] for category in present), Counter())
    frequent_absent = [category for category, _ in cooccurring.most_common() if category not in present]
    pools = {"random": absent, "popular": absent[:5], "adversarial": frequent_absent[:5]}
    rng = np.random.default_rng(zlib.crc32(str(key).encode()))
    for setting, present_category in zip(POPE_SETTINGS, rng.permutation(present).tolist()):
        pool = pools[setting] or absent
        if pool:
            category_by_answer = {"yes": present_category, "no": pool[rng.integers(len(pool))]}
            for answer, category in category_by_answer.items():
                builder.add_annotation(
                    "existence", Annotation(image_index, (answer,), words=with_article(category), kind=setting)
                )
