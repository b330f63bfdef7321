# SPDX-License-Identifier: Apache-2.0
"""Parquet and Arrow files: the texts of their rows without the images beside them, and the bytes of single images."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lionjax.core.errors import missing_module
from lionjax.core.types import UserError
from lionjax.data import images

TEXT_BATCH = 256  # rows that are read at once
IMAGE_BATCH = 8
KEPT_BYTES = 256 * 2**20  # of image columns that stay in memory
MAX_OPEN_FILES = 64
MAX_TEXT_BYTES = 4 * 2**30  # of the texts of one row group


class Place(NamedTuple):
    """Where the bytes of an image are: a row of a row group (Parquet) or record batch (Arrow), and place in a list."""

    file: str
    group: int
    row: int
    column: str = ""
    number: int = 0


class ParquetTexts:
    """A Parquet file. `held_columns`: the image columns with bytes; `class_names`: {column: names of its classes}."""

    def __init__(self, path: Path, image_columns: Sequence[str]):
        from pyarrow import parquet

        self.file = parquet.ParquetFile(path, memory_map=True)
        self.schema, self.num_groups = self.file.schema_arrow, self.file.num_row_groups
        self.leaves = [self.file.schema.column(k).path for k in range(len(self.file.schema))]
        self.class_names = class_names(self.schema)
        self.held_columns = [name for name in image_columns if name in self.schema.names and self._has_bytes(name)]

    def byte_leaf(self, column: str) -> str:
        """The full name of the column with the bytes of an image column; "" if there is none."""
        if is_binary(self.schema.field(column).type):
            return column
        for k, leaf in enumerate(self.leaves):
            is_bytes = leaf.partition(".")[0] == column and leaf.endswith(".bytes")
            if is_bytes and self.file.schema.column(k).physical_type == "BYTE_ARRAY":
                return leaf
        return ""

    def _has_bytes(self, column: str) -> bool:
        """Whether a column holds bytes, by its statistics: `datasets` writes a column of nulls beside paths."""
        if not (leaf := self.byte_leaf(column)):
            return False
        groups = map(self.file.metadata.row_group, range(self.num_groups))
        chunks = [group.column(self.leaves.index(leaf)) for group in groups]
        return any(chunk.statistics is None or chunk.statistics.null_count != chunk.num_values for chunk in chunks)

    def texts(self, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of a group; {} is an image without a path. Raises UserError for a group that is too large."""
        binary = {self.byte_leaf(name) for name in self.held_columns}
        wanted = [k for k, leaf in enumerate(self.leaves) if leaf.partition(".")[0] in names and leaf not in binary]
        with_texts = {self.leaves[k].partition(".")[0] for k in wanted}
        bare = {name: {} for name in names if name not in with_texts}
        if any(is_list(self.schema.field(name).type) for name in bare):
            raise UserError("a list of images has no paths; give structs of bytes and path")
        metadata = self.file.metadata.row_group(group)
        if sum(metadata.column(k).total_uncompressed_size for k in wanted) > MAX_TEXT_BYTES:
            raise UserError(f"the texts of one row group exceed {MAX_TEXT_BYTES >> 30} GiB; write smaller row groups")
        if not wanted:
            yield from (dict(bare) for _ in range(metadata.num_rows))
            return
        for batch in self.file.iter_batches(TEXT_BATCH, row_groups=[group], columns=[self.leaves[k] for k in wanted]):
            yield from (bare | row for row in batch.to_pylist())

    def images(self, group: int, column: str) -> Any:
        """The bytes of a whole group as an Arrow array, or None if they are too many to keep."""
        leaf = self.byte_leaf(column)
        chunk = self.file.metadata.row_group(group).column(self.leaves.index(leaf))
        if chunk.total_uncompressed_size > KEPT_BYTES:
            return None
        return self.file.read_row_group(group, columns=[leaf]).column(0)

    def image(self, group: int, column: str, row: int) -> Any:
        """The cell of one row, by reading the group up to it."""
        start = 0
        for batch in self.file.iter_batches(IMAGE_BATCH, row_groups=[group], columns=[self.byte_leaf(column)]):
            if row < start + len(batch):
                return batch.column(0)[row - start].as_py()
            start += len(batch)
        raise IndexError(f"row group {group} has {start} rows")


class ArrowTexts:
    """An Arrow file, as `datasets.save_to_disk` writes it; mapped into memory, so that single cells are read."""

    def __init__(self, path: Path, image_columns: Sequence[str]):
        import pyarrow

        try:
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            self.schema, self.batches = reader.schema, list(reader)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            self.schema = file.schema
            self.batches = [file.get_batch(k) for k in range(file.num_record_batches)]
        self.num_groups, self.class_names = len(self.batches), class_names(self.schema)
        self.held_columns = [name for name in image_columns if name in self.schema.names and self._has_bytes(name)]

    def _has_bytes(self, column: str) -> bool:
        """Whether any image of a column has bytes beside its path."""
        arrays = [batch.column(column) for batch in self.batches]
        arrays = [array.flatten() if is_list(array.type) else array for array in arrays]
        if not arrays or is_binary(arrays[0].type):
            return bool(arrays)
        index = arrays[0].type.get_field_index("bytes") if is_struct(arrays[0].type) else -1
        return index >= 0 and any(array.field(index).null_count < len(array) for array in arrays)

    def texts(self, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of a batch; {} stands for an image without a path."""
        batch = self.batches[group]
        columns = [without_bytes(batch.column(name)) for name in names]
        for start in range(0, len(batch), TEXT_BATCH):
            cells = [column.slice(start, TEXT_BATCH).to_pylist() for column in columns]
            yield from (dict(zip(names, row)) for row in zip(*cells))

    def images(self, group: int, column: str) -> Any:
        """Nothing to keep: the file is mapped."""

    def image(self, group: int, column: str, row: int) -> Any:
        """The cell of one row."""
        return self.batches[group].column(column)[row].as_py()


def without_bytes(array: Any) -> Any:
    """An array of images, or of lists of them, without their bytes: structs of all other fields."""
    import pyarrow

    if is_list(array.type):
        values = without_bytes(array.values)
        return pyarrow.ListArray.from_arrays(array.offsets, values, mask=array.is_null() if array.null_count else None)
    if is_binary(array.type):
        paths = pyarrow.nulls(len(array), pyarrow.string())
        return pyarrow.StructArray.from_arrays([paths], names=["path"], mask=array.is_null())
    if not is_struct(array.type) or array.type.get_field_index("bytes") < 0:
        return array
    kept = [k for k, field in enumerate(array.type) if field.name != "bytes"]
    fields = [array.type[k] for k in kept]
    return pyarrow.StructArray.from_arrays([array.field(k) for k in kept], fields=fields, mask=array.is_null())


def is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def is_struct(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind)


def class_names(schema: Any) -> dict[str, list[str]]:
    """{column: names of its numbered classes}, as `datasets` writes them into the metadata of a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {key: feature["names"] for key, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
    return {key: names for key, names in named.items() if isinstance(names, list)}


@contextlib.contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Turns the errors of a missing pyarrow and of a damaged file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise missing_module(error, "reading Parquet and Arrow files") from error
    except (ValueError, OSError, LookupError, NotImplementedError, TypeError, MemoryError, ArithmeticError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as {Path(path).suffix[1:]} ({reason}); replace the file") from error


def open_texts(path: str | Path, image_columns: Sequence[str]) -> ParquetTexts | ArrowTexts:
    """The texts of a file by its ending. Call it within `file_errors`."""
    kind = ArrowTexts if Path(path).suffix == ".arrow" else ParquetTexts
    return kind(Path(path), image_columns)


class ImageReader:
    """Reads the bytes of images at their places; the latest row groups stay in memory, up to `KEPT_BYTES`.

    Threads may share a reader; a copy in another process starts without kept groups. Raises UserError for an image
    without bytes, and for one that is too large.
    """

    def __init__(self, image_columns: Sequence[str]):
        self.image_columns = image_columns
        self.lock, self.kept = threading.Lock(), OrderedDict()
        self.files: OrderedDict[str, ParquetTexts | ArrowTexts] = OrderedDict()

    def __reduce__(self):
        return ImageReader, (self.image_columns,)

    def __call__(self, place: Place) -> bytes:
        with self.lock, file_errors(place.file):
            cell = self._cell(place)
        cell = cell[place.number] if isinstance(cell, list) else cell
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is not None and len(data) > images.MAX_FILE_BYTES:
            raise UserError(
                f"an image of {place.file} is larger than {images.MAX_FILE_BYTES >> 20} MiB; shrink the image first"
            )
        if data is None:
            raise UserError(f"{place.file} has no bytes for the image of row {place.row} of row group {place.group}")
        return data

    def _cell(self, place: Place) -> Any:
        if place.file not in self.files:
            self.files[place.file] = open_texts(place.file, self.image_columns)
            while len(self.files) > MAX_OPEN_FILES:
                self.files.popitem(last=False)
        file, key = self.files[place.file], (place.file, place.group, place.column)
        if key not in self.kept and (column := file.images(place.group, place.column)) is not None:
            self.kept[key] = column
            while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > KEPT_BYTES:
                self.kept.popitem(last=False)
        if key not in self.kept:
            return file.image(place.group, place.column, place.row)
        self.kept.move_to_end(key)
        return self.kept[key][place.row].as_py()
