# SPDX-License-Identifier: Apache-2.0
"""Parquet files as hubs have them and Arrow files as `datasets.save_to_disk` writes them, with images inside.

Texts are read when the source is opened; the bytes of images when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder
from lionjax.data.datasets.column_files import ArrowTexts, ImageReader, ParquetTexts, Place, file_errors, open_texts
from lionjax.data.datasets.table_rows import TABLE_KEYS, RowTable, TableRow, check_columns, clean_name

IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Parquet(RowTable):
    """A Parquet or Arrow file, or a folder of them; the columns are the keys of JSON Lines, or conversations.

    `image` (or a list `images`) is a struct {bytes, path}, bytes, or a path under `image_dir`; `conversations` or
    `messages` a list of structs, or JSON. Numbers of a Hugging Face `ClassLabel` become their names. Each image with
    bytes is a record of its own. Random access to Parquet reads a whole row group: the latest ones are kept, up to
    256 MiB; Arrow files are mapped into memory.
    """

    SUFFIXES = (".parquet", ".arrow")

    def rows(self, file: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        number = 0
        with file_errors(file):
            table = open_texts(file, IMAGE_COLUMNS)
            columns = table.schema.names
            if repeated := next((name for name in columns if columns.count(name) > 1), None):
                raise UserError(f"{file} has the column {repeated!r} twice; rename or remove one")
            check_columns(builder, columns, file)
            names = [name for name in columns if name in TABLE_KEYS]
            for group in range(table.num_groups):
                for row, values in enumerate(table.texts(group, names)):
                    number += 1
                    yield _table_row(table, Place(str(file), group, row), values, number)

    def image_reader(self) -> Callable[..., bytes]:
        return ImageReader(IMAGE_COLUMNS)


def _table_row(table: ParquetTexts | ArrowTexts, place: Place, values: dict[str, Any], number: int) -> TableRow:
    """One row, with names for the images that the file holds: their own, or the row's number."""
    held: dict[str, Place] = {}
    for column in [name for name in IMAGE_COLUMNS if values.get(name) is not None]:
        cell = values.pop(column)
        names = []
        for k, item in enumerate(cell if isinstance(cell, list) else [cell]):
            path = item.get("path") if isinstance(item, dict) else item
            if column in table.held_columns:
                name = clean_name(path or "") or f"{Path(place.file).name}/row{number}"
                path = name if name not in held else f"{name}.{k}"
                held[path] = place._replace(column=column, number=k)
            names.append(path)
        values |= {"images": names} if isinstance(cell, list) else {column: names[0]}
    for key, labels in table.class_names.items():
        if isinstance(index := values.get(key), int) and 0 <= index < len(labels):
            values[key] = labels[index]
    return TableRow(f"{place.file}, row {number},", values, held)
