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
from lionjax.data.datasets.annotated_images import Photo, Row, Table

INDEX = "index.npz"
Tag = Callable[[Sequence], Sequence[Sequence[str]]]  # the tags of each picture


@dataclass(frozen=True)
class Built:
    """A folder that `lionjax data build` wrote from annotated pictures."""

    folder: str
    name: str = "built"

    def open(self, split: str, max_pixels: int) -> OpenedBuilt:
        return OpenedBuilt(dataset_folder(Path(self.folder)), split)


@dataclass(frozen=True)
class Known:
    """The truth of one record: its photo, its rows by task, and the outlines that they number."""

    photo: Photo
    rows: dict[str, list[Row]]
    outlines: list

    def to_json(self) -> str:
        rows = {task: [asdict(row) for row in rows] for task, rows in self.rows.items()}
        return json.dumps({"photo": asdict(self.photo), "rows": rows, "outlines": self.outlines})

    @staticmethod
    def from_json(text: str) -> Known:
        raw = json.loads(text)
        photo = Photo(**{**raw["photo"], "tags": tuple(raw["photo"]["tags"])})
        rows = {task: [_row(fields) for fields in rows] for task, rows in raw["rows"].items()}
        return Known(photo, rows, raw["outlines"])


def _row(fields: dict[str, Any]) -> Row:
    """A row from JSON, its lists as tuples again."""
    boxes = {key: tuple(map(tuple, fields[key])) for key in ("boxes", "question_boxes")}
    lists = {key: tuple(fields[key]) for key in ("answers", "regions")}
    return Row(**{**fields, **boxes, **lists})


class OpenedBuilt:
    """One split of a built folder. `index` holds (record, row) of every example, so that nothing is scanned."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        try:
            with np.load(folder / INDEX, allow_pickle=False) as index:
                arrays = {key: index[key] for key in index}
            splits = {key.partition("/")[0] for key in arrays if "/" in key}
            # A source that was not divided lies there as one split, which then is every split.
            self.split = split if len(splits) > 1 else splits.pop()
            mine = f"{self.split}/"
            self.index = {key.removeprefix(mine): arrays[key] for key in arrays if mine in key}
            self.names = self.index.pop("").tolist() if self.index else []
            self.vocabulary = tuple(arrays["vocabulary"].tolist())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / INDEX} cannot be read ({error}); build the data again") from error
        self.sizes = {task: len(rows) for task, rows in self.index.items()}
        if self.names:
            self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        raw = {"image": tfds.decode.SkipDecoding()}
        builder = tfds.builder_from_directory(str(self.folder))
        try:
            self.records = builder.as_data_source(split=self.split, decoders=raw)
        except Exception as error:  # a cut-off file is reported in many ways
            raise UserError(f"{self.folder} cannot be read ({error}); build the data again") from error

    def __len__(self) -> int:
        return len(self.names)

    def record(self, task: str, index: int) -> int:
        return int(self.index[task][index, 0])

    def name(self, record: int) -> str:
        return self.names[record]

    def read(self, record: int) -> tuple[bytes, Known]:
        try:
            stored = self.records[record]
        except Exception as error:  # ArrayRecord's checksums speak up as RuntimeError
            raise UserError(f"record {self.names[record]} of {self.folder} is damaged ({error})") from error
        return stored["image"], Known.from_json(stored["truth"].decode())

    def ask(self, task: str, index: int, truth: Known, rng: np.random.Generator, tag_noise: float):
        row = truth.rows[task][self.index[task][index, 1]]
        return table.ask(task, row, truth.photo, rng, tag_noise, self.vocabulary)

    def masks(self, record: int, regions: tuple[int, ...]) -> np.ndarray:
        _, known = self.read(record)
        size = int(known.photo.height), int(known.photo.width)
        return np.stack([table.mask(known.outlines[region], size) for region in regions])


def dataset_folder(root: Path) -> Path:
    """The one folder under `root` that holds a written data set."""
    found = sorted(path.parent for path in root.glob("**/dataset_info.json")) if root.is_dir() else []
    if len(found) != 1:
        many = f"{len(found)} data sets" if found else "no data set"
        raise UserError(f"{root} holds {many}; give the folder of one that `lionjax data build` wrote")
    return found[0]


def known_of(table: Table) -> list[Known]:
    """All that is known of each picture of a table, its outlines numbered anew."""
    rows: list[dict[str, list[Row]]] = [{} for _ in table.photos]
    outlines: list[list] = [[] for _ in table.photos]
    for task, all_rows in table.rows.items():
        for row in all_rows:
            mine = outlines[row.photo]
            regions = tuple(range(len(mine), len(mine) + len(row.regions)))
            mine += [table.outlines[region] for region in row.regions]
            fields = {**asdict(row), "regions": regions}
            rows[row.photo].setdefault(task, []).append(_row(fields))
    return [Known(*one) for one in zip(table.photos, rows, outlines)]
