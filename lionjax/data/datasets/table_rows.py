# SPDX-License-Identifier: Apache-2.0
"""Sources whose rows have the keys of JSON Lines or are conversations: CSV, Parquet, WebDataset, folders of pictures.

A subclass of `RowTable` says which files a split has and yields their rows; this file gives each row its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lionjax.core.types import UserError
from lionjax.data.datasets import jsonl, typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder
from lionjax.data.datasets.conversations import IMAGE_KEYS as CONVERSATION_IMAGE_KEYS
from lionjax.data.datasets.conversations import OTHER_KEYS, ROUND_KEYS, ImageFolders, add_conversation
from lionjax.data.datasets.split_files import files_by_split
from lionjax.data.datasets.splits import check_heldout_fraction

CLASS_QUESTION = "What is in the picture?"
IMAGE_KEYS = ("image", "images", "file_name")
CONVERSATION_KEYS = (*ROUND_KEYS, *CONVERSATION_IMAGE_KEYS, *OTHER_KEYS)
TABLE_KEYS = tuple(dict.fromkeys((*jsonl.KEYS, "question_id", "caption", *CONVERSATION_KEYS)))
GIVEN_ANSWERS = ("answer", "answers", "boxes")
ANSWER_KEYS = (*GIVEN_ANSWERS, "caption", "text", "label", *ROUND_KEYS)  # a table has one of them
JSON_KEYS = ("width", "height", "boxes", "question_boxes", *ROUND_KEYS)  # a text under them is JSON
LIST_KEYS = ("answers", "tags", "caption")  # a text under them is JSON if it is a list of texts
MAX_TEXT = 2**24  # characters of one text


class TableRow(NamedTuple):
    """One row: where it is, its values or why it cannot be read, and the places of images that the file holds."""

    location: str
    values: Any
    images: Mapping[str, tuple] = {}


@dataclass(frozen=True)
class RowTable:
    """Rows with the keys of JSON Lines, or conversations; `image_dir` is the folder of the file by default.

    A `caption` is an answer of the task `caption`, and so is a `text` in a row without a label. A `label` without a
    text is the answer to `class_question`. `heldout_fraction` as in all sources, unless the files name their splits:
    train, validation, test. `padded_boxes`: see `Conversations`.
    """

    file: str
    image_dir: str = ""
    heldout_fraction: float = 0.0
    name: str = "rows"
    padded_boxes: bool = True
    class_question: str = CLASS_QUESTION
    SUFFIXES = ()  # endings of the files in a folder

    def __post_init__(self):
        check_heldout_fraction(self.heldout_fraction)

    @property
    def root(self) -> Path:
        """The folder of images."""
        path = Path(self.file)
        return Path(self.image_dir) if self.image_dir else path if path.is_dir() else path.parent

    def files(self) -> list[Path]:
        """The files of all splits, in order. Raises UserError if there is none."""
        path = Path(self.file)
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"there is no file or folder {path}; check the path")
            return [path]
        found = files_below(path, self.SUFFIXES)
        if not found:
            raise UserError(f"{path} has no file {' or '.join(f'*{end}' for end in self.SUFFIXES)}; check the path")
        return found

    def _splits(self) -> dict[str, list[Path]]:
        return files_by_split(Path(self.file), self.files()) if Path(self.file).is_dir() else {}

    @property
    def OWN_SPLITS(self) -> bool:
        """Whether the names of the files say which split they are."""
        return bool(self._splits())

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return (Path(self.file), *([Path(self.image_dir)] if self.image_dir else []))

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        by_split = self._splits()
        builder = AnnotatedImagesBuilder(self.root, split, 0.0 if by_split else self.heldout_fraction)
        folders = ImageFolders(self.root)
        for file in by_split[split] if by_split else self.files():
            for row in self.rows(file, builder):
                add_table_row(builder, folders, row, file, self)
        return builder.build(max_pixels, self.image_reader())

    def rows(self, file: Path, builder: AnnotatedImagesBuilder) -> Iterator[TableRow]:
        """The rows of one file. Raises UserError for a file that is not of the format."""
        raise NotImplementedError

    def image_reader(self) -> Callable[..., bytes] | None:
        """Reads the bytes of an image at its place in a file; None if the files hold no images."""
        return None


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder and its subfolders with these endings, sorted; hidden ones are left out."""
    paths = (path for path in folder.rglob("*") if path.name.lower().endswith(tuple(suffixes)) and path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def check_columns(builder: AnnotatedImagesBuilder, columns: Sequence[str], file: Path) -> None:
    """Raises UserError for a misspelt column, and for a table without answers; unknown columns are warned of."""
    builder.check_keys(dict.fromkeys(columns, "given"), TABLE_KEYS, IMAGE_KEYS, f"{file}, its columns,", file)
    if not {*columns} & {*ANSWER_KEYS}:
        shown, known = ", ".join(map(repr, columns[:12])), ", ".join(ANSWER_KEYS)
        raise UserError(f"{file} has no column of answers: its columns are {shown}; give one of {known}")


def add_table_row(
    builder: AnnotatedImagesBuilder, folders: ImageFolders, row: TableRow, file: Path, table: RowTable
) -> None:
    """Adds a row to a builder; one that cannot be used becomes a bad record."""
    values, is_talk = row.values, False
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if value is not None and value != ""}
        is_talk = any(values.get(key) for key in ROUND_KEYS)
    builder.row_images = row.images
    with builder.row(row.location, "conversation" if is_talk else "vqa"):
        if isinstance(values, UserError):
            raise values
        if not isinstance(values, dict):
            shown = typed_rows.abbreviate(values)
            raise UserError(f"{row.location} is {shown}; give an object with an image and an answer")
        values = {key: _parse_cell(key, value, row.location) for key, value in values.items()}
        if not is_talk:
            jsonl.add_row(builder, _as_question(values, table.class_question, row.location), row.location, file)
            return
        talk = {key: value for key, value in values.items() if key in CONVERSATION_KEYS}
        if (name := values.get("file_name")) and not talk.get("images"):
            talk["image"] = name
        add_conversation(
            builder, lambda name: name if name in row.images else folders.find(name), talk, row.location, table
        )


def _parse_cell(key: str, value: Any, location: str) -> Any:
    """The value of a key, from JSON where a cell of text stands for a list. Raises UserError for what is no JSON."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise UserError(f"{location} has {len(value)} characters as {key!r}; give at most {MAX_TEXT}")
        is_list = value.lstrip().startswith("[")
        if key in JSON_KEYS or (key == "images" and is_list):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{location} has no JSON as {key!r} ({error}); correct it") from error
        elif key in LIST_KEYS and is_list:
            value = _list_of_texts(value) or value
    if key in ROUND_KEYS:
        if isinstance(value, dict):  # one list for each key
            lists = [column for column in value.values() if isinstance(column, list)]
            value = [dict(zip(value, cells)) for cells in zip(*lists)] if len(lists) == len(value) else value
        value = _without_nulls(value)
    return value


def _list_of_texts(text: str) -> list[str] | None:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


def _without_nulls(value: Any) -> Any:
    """A value without the null entries of its objects: Parquet has every key in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_question(values: dict[str, Any], class_question: str, location: str) -> dict[str, Any]:
    """A row as one of JSON Lines: its caption or class as an answer. Raises UserError for several images."""
    values, images = dict(values), values.get("images")
    if isinstance(images, list) and len(images) == 1:
        values["image"] = values.pop("images")[0]
    elif images:
        raise UserError(f"{location} has several images, which only a conversation has; write it as 'conversations'")
    if any(values.get(key) for key in GIVEN_ANSWERS):
        return values
    has_label, has_text = values.get("label") is not None, bool(values.get("text"))
    caption_key = "caption" if values.get("caption") else "text" if has_text and not has_label else ""
    if caption_key and not values.get("question"):
        answers = values.pop(caption_key)
        return {"task": "caption"} | values | {"answers": answers}
    if has_label and not has_text:
        label = values.pop("label")
        if not isinstance(label, str):
            shown = typed_rows.abbreviate(label)
            raise UserError(f"{location} has {shown} as 'label'; give the name of the class in place of its number")
        return {"question": class_question} | values | {"answers": [label]}
    return values


def clean_name(name: str) -> str:
    """A name in a file as a path under a folder: without a root, "." and ".."; for splits and messages only."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "/".join(part for part in parts if part.strip("/") and part not in (".", ".."))
