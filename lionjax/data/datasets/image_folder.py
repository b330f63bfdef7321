# SPDX-License-Identifier: Apache-2.0
"""A folder of pictures, with a table of metadata, with a caption beside each picture, or with one subfolder a class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_rows, read_text
from lionjax.data.datasets.delimited import Csv
from lionjax.data.datasets.split_files import SPLIT_WORDS, files_by_split
from lionjax.data.datasets.table_rows import RowTable, TableRow, files_below
from lionjax.data.datasets.typed_rows import IMAGE_SUFFIXES

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
CAPTION_SUFFIX = ".txt"
ANNOTATION_SUFFIXES = (".json", ".jsonl", ".p", ".gz")
MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class ImageFolder(RowTable):
    """A folder of pictures. The first of these that it has says what is known of them:

    metadata.jsonl, metadata.csv or metadata.tsv, whose `file_name` is a path beside it and whose other keys are those
    of JSON Lines; `1.txt` with the caption of `1.jpg`; one subfolder a class, whose name is the answer to
    `class_question`, with spaces for "_". If all pictures lie in subfolders such as train and test, these are the
    splits.
    """

    name: str = "pictures"

    def files(self) -> list[Path]:
        """The folders of the splits, or the folder."""
        root = Path(self.file)
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; check the path")
        inner = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        names = {name for words in SPLIT_WORDS.values() for name in words}
        is_split = bool(inner) and all(path.name.lower() in names for path in inner)
        return inner if is_split and files_by_split(root, inner) and not _has_pictures(root) else [root]

    def _splits(self) -> dict[str, list[Path]]:
        return files_by_split(Path(self.file), self.files())

    def rows(self, file: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        prefix = file.relative_to(self.file)
        metadata = next((file / name for name in METADATA_FILES if (file / name).is_file()), None)
        rows = self._picture_rows(file) if metadata is None else self._metadata_rows(metadata, builder)
        for row in rows:
            if isinstance(row.values, dict) and isinstance(name := row.values.get("file_name"), str) and name:
                row = row._replace(values=row.values | {"file_name": str(prefix / name)})
            yield row

    def _metadata_rows(self, metadata: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        if metadata.suffix == ".jsonl":
            rows: Iterator[TableRow] = (TableRow(*row) for row in read_rows(metadata))
        else:
            rows = Csv(str(metadata), self.file).rows(metadata, builder)
        for row in rows:
            if isinstance(row.values, dict) and not row.values.get("file_name"):
                row = TableRow(row.location, UserError(f"{row.location} has no 'file_name'; add the picture's path"))
            yield row

    def _picture_rows(self, folder: Path) -> Iterator[TableRow]:
        """The rows of a folder without metadata. Raises UserError for one without captions and classes."""
        pictures = files_below(folder, IMAGE_SUFFIXES)
        captions = {*files_below(folder, (CAPTION_SUFFIX,))}
        has_captions = any(path.with_suffix(CAPTION_SUFFIX) in captions for path in pictures)
        num_classes = len({path.parent.name for path in pictures if path.parent != folder})
        if not pictures or not (has_captions or num_classes > 1):
            found = f"{len(pictures)} pictures without captions" if pictures else "no pictures"
            raise UserError(
                f"{folder} has {found}; add x.txt with the caption of x.jpg, metadata.csv, or "
                "one subfolder for each of several classes"
            )
        for path in pictures:
            location = f"{path}:"
            values: dict[str, str] | UserError = {"file_name": path.relative_to(folder).as_posix()}
            caption_file = path.with_suffix(CAPTION_SUFFIX)
            if not has_captions and path.parent == folder:
                values = UserError(f"{path} is in no subfolder of a class; move it into one")
            elif not has_captions:
                values["label"] = path.parent.name.replace("_", " ")
            elif caption_file not in captions:
                values = UserError(f"{path} has no caption; add it as {caption_file.name}, or remove the picture")
            else:
                values = self._with_caption(values, caption_file)
            yield TableRow(location, values)

    def _with_caption(self, values: dict[str, str], caption_file: Path) -> dict[str, str] | UserError:
        try:
            path = images.safe_path(self.file, str(caption_file.relative_to(self.file)))
            if path.stat().st_size > MAX_CAPTION_BYTES:
                return UserError(f"{caption_file} is larger than {MAX_CAPTION_BYTES >> 20} MiB; give one caption")
            caption = read_text(path).strip()
        except UserError as error:
            return error
        return values | {"caption": caption} if caption else UserError(f"{caption_file} is empty; add the caption")


def _has_pictures(folder: Path) -> bool:
    return any(path.name.lower().endswith(IMAGE_SUFFIXES) for path in folder.iterdir())


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has metadata of pictures, or pictures in it or its subfolders and no files of annotations."""
    source = ImageFolder(str(folder))
    parts = source.files()
    if any((part / name).is_file() for part in parts for name in METADATA_FILES):
        return True
    places = [*parts, *(path for part in parts for path in part.iterdir() if path.is_dir())]
    has_annotations = any(path.suffix in ANNOTATION_SUFFIXES for path in folder.iterdir() if path.is_file())
    return not has_annotations and any(map(_has_pictures, places))
