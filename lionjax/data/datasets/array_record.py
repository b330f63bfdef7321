# SPDX-License-Identifier: Apache-2.0
"""Any source written once as ArrayRecord files, and read back: pictures and truth together, checked when written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets import annotated_images as table
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo

INDEX_FILE = "index.npz"
Tagger = Callable[[Sequence], Sequence[Sequence[str]]]  # the tags of each picture


@dataclass(frozen=True)
class ArrayRecordDataset:
    """A folder that `lionjax data build` wrote from annotated pictures."""

    folder: str
    name: str = "built"

    def open(self, split: str, max_pixels: int) -> OpenArrayRecordDataset:
        return OpenArrayRecordDataset(find_dataset_folder(Path(self.folder)), split)


@dataclass(frozen=True)
class RecordTruth:
    """The truth of one record: its photo, its rows by task, and the outlines that they number."""

    image_info: ImageInfo
    annotations: dict[str, list[Annotation]]
    segmentations: list

    def to_json(self) -> str:
        rows = {task: [asdict(row) for row in rows] for task, rows in self.annotations.items()}
        return json.dumps({"photo": asdict(self.image_info), "rows": rows, "outlines": self.segmentations})

    @staticmethod
    def from_json(text: str) -> RecordTruth:
        raw = json.loads(text)
        photo = ImageInfo(**{**raw["photo"], "tags": tuple(raw["photo"]["tags"])})
        rows = {task: [_annotation_from_json(fields) for fields in rows] for task, rows in raw["rows"].items()}
        return RecordTruth(photo, rows, raw["outlines"])


def _annotation_from_json(fields: dict[str, Any]) -> Annotation:
    """A row from JSON, its lists as tuples again."""
    boxes = {key: tuple(map(tuple, fields[key])) for key in ("boxes", "question_boxes")}
    lists = {key: tuple(fields[key]) for key in ("answers", "regions")}
    return Annotation(**{**fields, **boxes, **lists})


class OpenArrayRecordDataset:
    """One split of a built folder. `index` holds (record, row) of every example, so that nothing is scanned."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        try:
            with np.load(folder / INDEX_FILE, allow_pickle=False) as index:
                arrays = {key: index[key] for key in index}
            splits = {key.partition("/")[0] for key in arrays if "/" in key}
            # A source that was not divided lies there as one split, which then is every split.
            self.split = split if len(splits) > 1 else splits.pop()
            mine = f"{self.split}/"
            self.example_index = {key.removeprefix(mine): arrays[key] for key in arrays if mine in key}
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
        except Exception as error:  # a cut-off file is reported in many ways
            raise UserError(f"{self.folder} cannot be read ({error}); build the data again") from error

    def __len__(self) -> int:
        return len(self.record_names)

    def record_index(self, task: str, index: int) -> int:
        return int(self.example_index[task][index, 0])

    def record_name(self, record_index: int) -> str:
        return self.record_names[record_index]

    def load_record(self, record_index: int) -> tuple[bytes, RecordTruth]:
        try:
            stored = self.records[record_index]
        except Exception as error:  # ArrayRecord's checksums speak up as RuntimeError
            raise UserError(
                f"record {self.record_names[record_index]} of {self.folder} is damaged ({error})"
            ) from error
        return stored["image"], RecordTruth.from_json(stored["truth"].decode())

    def make_example(self, task: str, index: int, truth: RecordTruth, rng: np.random.Generator, tag_noise: float):
        row = truth.annotations[task][self.example_index[task][index, 1]]
        return table.make_example(task, row, truth.image_info, rng, tag_noise, self.tag_vocabulary)

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        _, known = self.load_record(record_index)
        size = int(known.image_info.height), int(known.image_info.width)
        return np.stack([table.segmentation_to_mask(known.segmentations[region], size) for region in regions])


def find_dataset_folder(root: Path) -> Path:
    """The one folder under `root` that holds a written data set."""
    found = sorted(path.parent for path in root.glob("**/dataset_info.json")) if root.is_dir() else []
    if len(found) != 1:
        many = f"{len(found)} data sets" if found else "no data set"
        raise UserError(f"{root} holds {many}; give the folder of one that `lionjax data build` wrote")
    return found[0]


def record_truths(dataset: AnnotatedImages) -> list[RecordTruth]:
    """All that is known of each picture of a table, its outlines numbered anew."""
    rows: list[dict[str, list[Annotation]]] = [{} for _ in dataset.image_infos]
    outlines: list[list] = [[] for _ in dataset.image_infos]
    for task, all_rows in dataset.annotations.items():
        for row in all_rows:
            mine = outlines[row.photo]
            regions = tuple(range(len(mine), len(mine) + len(row.regions)))
            mine += [dataset.segmentations[region] for region in row.regions]
            fields = {**asdict(row), "regions": regions}
            rows[row.photo].setdefault(task, []).append(_annotation_from_json(fields))
    return [RecordTruth(*one) for one in zip(dataset.image_infos, rows, outlines)]
