# SPDX-License-Identifier: Apache-2.0
"""Recognize tables and folders of pictures by their names: CSV, Parquet, Arrow, tars."""

from __future__ import annotations

import os
from pathlib import Path

from lionjax.data.datasets.delimited import Csv
from lionjax.data.datasets.detect_benchmark import detect_benchmark_file
from lionjax.data.datasets.image_folder import ImageFolder, is_image_folder
from lionjax.data.datasets.parquet import Parquet
from lionjax.data.datasets.table_rows import RowTable
from lionjax.data.datasets.webdataset import RANGE, WebDataset

CSV_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
BUILT_FILE = "dataset_info.json"  # of TFDS, and of `datasets`
MAX_DEPTH = 4
SAVED_FILE = "state.json"  # of `datasets` alone


def detect_table_file(source: str, image_dir: str = "") -> RowTable | None:
    """The source of a table by the ending of its name, or None; benchmarks are no tables."""
    path, ending = Path(source), source.lower()
    if path.is_file() and ending.endswith(CSV_ENDINGS):
        is_benchmark = detect_benchmark_file(path, image_dir) is not None if path.suffix == ".tsv" else False
        return None if is_benchmark else Csv(source, image_dir, name=path.name.partition(".")[0])
    if path.is_file() and ending.endswith(Parquet.SUFFIXES):
        return Parquet(source, image_dir, name=path.name.partition(".")[0])
    if ending.endswith(WebDataset.SUFFIXES) and (path.is_file() or RANGE.search(source)):
        name = RANGE.sub("", path.name).partition(".")[0].strip("-_")
        return WebDataset(source, image_dir, name=name or "shards")
    return None


def detect_table_folder(path: Path, image_dir: str = "") -> RowTable | None:
    """The source of a folder of tars, of Parquet or Arrow files, or of pictures, or None."""
    endings = set()
    for folder, inner, files in os.walk(path):
        if BUILT_FILE in files and SAVED_FILE not in files and not any(name.endswith(".arrow") for name in files):
            return None  # what `lionjax data build` wrote
        endings |= {Path(name).suffix.lower() for name in files}
        if len(Path(folder).relative_to(path).parts) >= MAX_DEPTH:
            inner.clear()
    name = path.resolve().name or "folder"
    for kind in (WebDataset, Parquet):
        if endings & {*kind.SUFFIXES}:
            return kind(str(path), image_dir, name=name)
    return ImageFolder(str(path), name=name) if is_image_folder(path) else None
