# SPDX-License-Identifier: Apache-2.0
"""Data sets in ArrayRecord files (TFDS), as written by `lionjax data build`: validated images with annotations."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.segmentations import region_masks
from lionjax.data.regions import ImageRegions

INDEX_FILE = "index.npz"
BENCHMARK_FIELDS = ("question_id", "choices", "facts")
Tagger = Callable[[Sequence], Sequence[Sequence[str]]]  # from images to the tags of each


@dataclass(frozen=True)
class ArrayRecordDataset:
    """A folder that `lionjax data build` wrote from annotated images."""

    folder: str
    name: str = "built"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return (Path(self.folder),)

    def open(self, split: str, max_pixels: int) -> OpenArrayRecordDataset:
        return OpenArrayRecordDataset(find_dataset_folder(Path(self.folder)), split)


@dataclass(frozen=True)
class RecordTruth:
    """Ground truth of one record: image info, annotations by task, and the segmentations that they refer to.

    `more_names`: the names of the images that `Annotation.more_images` refers to, by their indices there.
    """

    image_info: ImageInfo
    annotations: dict[str, list[Annotation]]
    segmentations: list
    more_names: dict[int, str] = field(default_factory=dict)

    def masks(self, regions: tuple[int, ...]) -> np.ndarray:
        """bool (K, height, width): masks of the segmentations with these indices, in the image's own pixels."""
        info = self.image_info
        return region_masks(self.segmentations, regions, (info.width, info.height), info.name)

    def to_json(self) -> str:
        rows = {task: [_annotation_to_json(row) for row in rows] for task, rows in self.annotations.items()}
        more = {"more": self.more_names} if self.more_names else {}
        return json.dumps({"photo": asdict(self.image_info), "rows": rows, "outlines": self.segmentations} | more)

    @staticmethod
    def from_json(text: str) -> RecordTruth:
        raw = json.loads(text)
        image_info = ImageInfo(**{**raw["photo"], "tags": tuple(raw["photo"]["tags"])})
        rows = {task: [_annotation_from_json(fields) for fields in rows] for task, rows in raw["rows"].items()}
        more_names = {int(number): name for number, name in raw.get("more", {}).items()}
        return RecordTruth(image_info, rows, raw["outlines"], more_names)


def _annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    """The fields of an annotation for JSON; those of benchmarks only where they are set."""
    return {key: value for key, value in asdict(annotation).items() if value or key not in BENCHMARK_FIELDS}


def _annotation_from_json(fields: dict[str, Any]) -> Annotation:
    """An annotation from its JSON fields, with lists converted to tuples."""
    boxes = {key: tuple(map(tuple, fields[key])) for key in ("boxes", "question_boxes")}
    boxes["turns"] = tuple(map(tuple, fields.get("turns", ())))
    lists = {key: tuple(fields.get(key, ())) for key in ("answers", "regions", "more_images", "choices")}
    return Annotation(**{**fields, **boxes, **lists})


class OpenArrayRecordDataset:
    """One split of a built folder. `example_index` has (record, annotation) of each example, so no scan is needed.

    Raises UserError for files that cannot be read.
    """

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        try:
            with np.load(folder / INDEX_FILE, allow_pickle=False) as index:
                arrays = {key: index[key] for key in index}
            splits = {key.partition("/")[0] for key in arrays if "/" in key}
            # A source without splits is stored as one split, which is used for all splits.
            self.has_splits = len(splits) > 1
            self.split = split if self.has_splits else splits.pop()
            prefix = f"{self.split}/"
            self.example_index = {key.removeprefix(prefix): arrays[key] for key in arrays if prefix in key}
            self.record_names = self.example_index.pop("").tolist() if self.example_index else []
            self.tag_vocabulary = tuple(arrays["vocabulary"].tolist())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / INDEX_FILE} cannot be read ({error}); build the data again") from error
        self.task_sizes = {task: len(rows) for task, rows in self.example_index.items()}
        if self.record_names:
            self._open_records()

    def _open_records(self) -> None:
        import tensorflow_datasets as tfds

        raw = {"image": tfds.decode.SkipDecoding()}
        builder = tfds.builder_from_directory(str(self.folder))
        try:
            self.records = builder.as_data_source(split=self.split, decoders=raw)
        except Exception as error:  # a truncated file raises many types of errors
            raise UserError(f"{self.folder} cannot be read ({error}); build the data again") from error

    def __len__(self) -> int:
        return len(self.record_names)

    def row_problems(self) -> Iterator[str]:
        """None: `lionjax data build` leaves such rows out."""
        return iter(())

    def record_index(self, task: str, index: int) -> int:
        return int(self.example_index[task][index, 0])

    def record_name(self, record_index: int) -> str:
        return self.record_names[record_index] or images.NO_IMAGE_NAME

    def load_record(self, record_index: int) -> tuple[bytes, RecordTruth]:
        stored = self._stored(record_index)
        return stored["image"], RecordTruth.from_json(stored["truth"].decode())

    def load_regions(self, record_index: int) -> ImageRegions | None:
        return ImageRegions.from_record(self._stored(record_index))

    def _stored(self, record_index: int) -> Mapping[str, Any]:
        try:
            return self.records[record_index]
        except Exception as error:  # ArrayRecord raises RuntimeError for a wrong checksum
            raise UserError(
                f"record {self.record_names[record_index]} of {self.folder} is damaged ({error}); build the data again"
            ) from error

    def make_example(self, task: str, index: int, truth: RecordTruth, rng: np.random.Generator, tag_noise: float):
        row = truth.annotations[task][self.example_index[task][index, 1]]
        example = annotated_images.make_example(task, row, truth.image_info, rng, tag_noise, self.tag_vocabulary)
        more_records = tuple(self._position(truth.more_names.get(number, "")) for number in example.more_records)
        return replace(example, more_records=more_records) if more_records else example

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        """The record of each image name."""
        return {name: position for position, name in enumerate(self.record_names) if name}

    def _position(self, name: str) -> int:
        if name not in self._positions:
            raise UserError(f"{self.folder} has no image {name!r}, which a row shows; build the data again")
        return self._positions[name]

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        return self.load_record(record_index)[1].masks(regions)


def find_dataset_folder(root: Path) -> Path:
    """The only folder under `root` with a built data set. Raises UserError for none and for several."""
    folders = sorted(path.parent for path in root.glob("**/dataset_info.json")) if root.is_dir() else []
    if len(folders) != 1:
        contents = f"{len(folders)} data sets" if folders else "no data set"
        raise UserError(f"{root} holds {contents}; give the folder of one that `lionjax data build` wrote")
    return folders[0]


def record_truths(dataset: AnnotatedImages) -> list[RecordTruth]:
    """The ground truth of each image, with its segmentations numbered from 0.

    Text-only rows, which may share one record without an image, are one record each, because a reader parses a whole
    record for each row: the first keeps the record's number and the others follow after all images.
    """
    annotations: list[dict[str, list[Annotation]]] = [{} for _ in dataset.image_infos]
    segmentations: list[list] = [[] for _ in dataset.image_infos]
    for task, task_annotations in dataset.annotations.items():
        for annotation in task_annotations:
            image_segmentations = segmentations[annotation.photo]
            regions = tuple(range(len(image_segmentations), len(image_segmentations) + len(annotation.regions)))
            image_segmentations += [dataset.segmentations[region] for region in annotation.regions]
            fields = {**asdict(annotation), "regions": regions}
            annotations[annotation.photo].setdefault(task, []).append(_annotation_from_json(fields))
    names = [
        {
            number: dataset.image_infos[number].name
            for group in rows.values()
            for row in group
            for number in row.more_images
        }
        for rows in annotations
    ]
    truths = [RecordTruth(*parts) for parts in zip(dataset.image_infos, annotations, segmentations, names)]
    for number in [number for number, image_info in enumerate(dataset.image_infos) if not image_info.name]:
        info, segments = truths[number].image_info, truths[number].segmentations
        rows = [
            RecordTruth(info, {task: [row]}, segments) for task, rows in annotations[number].items() for row in rows
        ]
        truths[number : number + 1], others = rows[:1] or [truths[number]], rows[1:]
        truths += others
    return truths
