# SPDX-License-Identifier: Apache-2.0
"""Tables in text: CSV and TSV, with the keys of JSON Lines as columns (docs/own_data.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_text
from lionjax.data.datasets.table_rows import TABLE_KEYS, RowTable, TableRow, check_columns

MAX_CELL = 64 * 2**20  # characters
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Csv(RowTable):
    """A CSV or TSV file: the first line has the columns, which are keys of JSON Lines, or conversations as JSON.

    Comma, semicolon or tab: the one by which most columns are known. An empty cell is a missing key. Boxes, images and
    rounds are JSON; `answers`, `tags` and `caption` one text, or a JSON list of texts.
    """

    def rows(self, file: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        columns, rows = read_delimited(file, find_delimiter(file))
        check_columns(builder, columns, file)
        for location, row in rows:
            known = {key: row[key] for key in TABLE_KEYS if row.get(key)} if isinstance(row, dict) else row
            yield TableRow(location, known)


def find_delimiter(path: Path) -> str:
    """The delimiter by which most columns of the first line are known; a tab for .tsv."""
    if ".tsv" in path.suffixes:
        return "\t"
    header = read_text(path).lstrip("\n").partition("\n")[0]
    columns = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in DELIMITERS}
    return max(DELIMITERS, key=lambda delimiter: (len({*columns[delimiter]} & {*TABLE_KEYS}), len(columns[delimiter])))


def read_delimited(path: Path, delimiter: str) -> tuple[list[str], Iterator[tuple[str, dict[str, str] | UserError]]]:
    """(columns, (location, row or why it cannot be read) of each row). Raises UserError for a file without columns."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        columns = [*(reader.fieldnames or ())]
    except csv.Error as error:
        raise UserError(f"{path}, line 1, cannot be read ({error}); replace the file") from error
    if not columns:
        raise UserError(f"{path} is empty; give a first line with the names of its columns")
    if repeated := next((name for name in columns if columns.count(name) > 1), None):
        raise UserError(f"{path} has the column {repeated!r} twice; rename or remove one")
    return columns, _read_cells(reader, path)


def _read_cells(reader: csv.DictReader, path: Path) -> Iterator[tuple[str, dict[str, str] | UserError]]:
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}, cannot be read ({error}); replace the file") from error
        if row is None:
            return
        location = f"{path}, line {reader.line_num},"
        if None in row or any(value is None for value in row.values()):
            yield location, UserError(f"{location} has another number of cells than the first line; correct it")
        else:
            yield location, row
