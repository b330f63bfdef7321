# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg as published by `refer`: refs(unc).p (or google, umd) and instances.json."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_json, xywh_to_xyxy

SPLITS = {"train": "train", "validation": "val"}  # "heldout" is a test split


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; refuses every class and function, so that a file cannot run code."""

    def find_class(self, module: str, name: str):
        raise UserError(f"it names {module}.{name}, and only numbers, texts, lists and dicts are read")


def read_plain_pickle(path: Path) -> object:
    """The contents of a pickle of plain values. Raises UserError for a missing or damaged file, and for any class."""
    try:
        return PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {path}; check the path") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{path} cannot be read as plain values ({error}); use refer's published file") from error


@dataclass(frozen=True)
class Refer:
    """A folder with refs(...).p and instances.json, in the published splits.

    Each object gives one example of `rec` for each of its expressions, with outlines also of `res`, and one of `reg`.
    `refs_file` has the splits' name: unc, google or umd. Split "heldout" is `test_split`, or all test splits together
    (testA and testB, or test) if it is empty; refs(google).p has only train and val, where it is val.
    """

    folder: str
    image_dir: str
    refs_file: str = "refs(unc).p"
    test_split: str = ""
    name: str = "refer"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return *(Path(self.folder) / name for name in (self.refs_file, "instances.json")), Path(self.image_dir)

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        folder, builder = Path(self.folder), AnnotatedImagesBuilder(Path(self.image_dir))
        refs_path, instances_path = folder / self.refs_file, folder / "instances.json"
        refs, tree = read_plain_pickle(refs_path), read_json(instances_path)
        images = dict(_by_id(builder, instances_path, tree, "images", ("id", "file_name", "width", "height")))
        objects = dict(_by_id(builder, instances_path, tree, "annotations", ("id", "image_id", "bbox")))
        fields = ("ann_id", "image_id", "split", "sentences")
        entries = list(builder.entries(refs_path, {"refs": refs}, "refs", fields, "rec"))
        wanted = self._wanted({ref["split"] for _, ref in entries}, split)
        for location, ref in entries:
            if ref["split"] in wanted:
                with builder.row(location, "rec"):
                    _add_ref(builder, ref, images, objects, location)
        return builder.build(max_pixels)

    def _wanted(self, names: set[str], split: str) -> set[str]:
        if split in SPLITS:
            return {SPLITS[split]}
        tests = {name for name in names if name.startswith("test")}
        if self.test_split and self.test_split not in names:
            choices = ", ".join(sorted(names))
            raise UserError(f"{self.refs_file} has no split {self.test_split!r}; choose one of {choices}")
        return {self.test_split} if self.test_split else tests or {"val"}


def _by_id(builder: AnnotatedImagesBuilder, path: Path, tree: object, list_name: str, fields: tuple[str, ...]):
    return [(entry["id"], entry) for _, entry in builder.entries(path, tree, list_name, fields, "rec")]


def _add_ref(builder: AnnotatedImagesBuilder, ref: dict, images: dict, objects: dict, location: str) -> None:
    """Adds the examples of one object. Raises UserError if its image or its instance is not in instances.json."""
    if ref["image_id"] not in images or ref["ann_id"] not in objects:
        raise UserError(
            f"{location} has an image_id or ann_id that is not in instances.json; use the files of one data set"
        )
    image, instance = images[ref["image_id"]], objects[ref["ann_id"]]
    size = typed_rows.image_size(image, location)
    box = xywh_to_xyxy(instance["bbox"], location)
    texts = [str(sentence.get("sent") or sentence.get("raw") or "").strip() for sentence in ref["sentences"]]
    ids = [str(sentence.get("sent_id", "")) for sentence in ref["sentences"]]
    expressions = [expression for expression in texts if expression]
    if not expressions:
        raise UserError(f"{location} has no sentence; add one")
    index = builder.add_image(image["file_name"], ImageInfo(image["file_name"], *size))
    regions: tuple[int, ...] = ()
    if instance.get("segmentation"):
        regions = (len(builder.segmentations),)
        builder.segmentations.append(instance["segmentation"])
    fields = {"kind": ref["split"], "boxes": (box,), "regions": regions}
    for expression, sentence_id in zip(texts, ids):
        for task in ("rec", "res") if regions else ("rec",):
            if expression:
                builder.add_annotation(task, Annotation(index, words=expression, question_id=sentence_id, **fields))
    fields = {"kind": ref["split"], "question_boxes": (box,), "question_id": str(ref.get("ref_id", ""))}
    builder.add_annotation("reg", Annotation(index, tuple(expressions), **fields))
