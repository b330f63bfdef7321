# SPDX-License-Identifier: Apache-2.0
"""For the command line: detect the data source of a name or path, and print its records."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotation_files import read_json, read_rows
from lionjax.data.datasets.array_record import ArrayRecordDataset, find_dataset_folder
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.source import open_split
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import to_pil_image
from lionjax.data.mixture import examples
from lionjax.data.rounds import IMAGE_MARK
from lionjax.data.scenes.dataset import Scenes

MAX_ROWS = 20  # rows of a file that are read to detect its format
IMAGE_AND_ID = ("image", "images", "id")
JSON_LINES_KEYS = tuple(
    "image file_name question answer answers task kind expression boxes question_boxes tags width height".split()
)
# (source class, format, keys that its rows may have, alternatives of those that they have); the first match counts
ROW_FORMATS = (
    (
        Conversations,
        "conversations (LLaVA, ShareGPT, messages)",
        IMAGE_AND_ID,
        (("conversations",), ("messages",), ("conversation",)),
    ),
    (RefCoco, "RefCOCO", ("height", "width"), (("img_id", "sents", "bbox"),)),
    (JsonLines, "POPE", ("question_id",), (("image", "text", "label"),)),
    (JsonLines, "JSON Lines (docs/own_data.md)", JSON_LINES_KEYS, (("answer",), ("answers",), ("boxes",))),
)
KNOWN_SOURCES = "'scenes', 'easy_vqa', a COCO folder, a built folder, or a .jsonl, RefCOCO or VQA file"


def detect_source(source: str, image_dir: str = "", answers_file: str = "") -> Any:
    """The data source of 'scenes', 'easy_vqa', a folder or an annotation file.

    `image_dir`: the image folder of an annotation file; default is the file's folder. `answers_file`: the annotations
    of a VQA questions file. Raises UserError for an unknown source, and for VQA questions without answers.
    """
    if source in ("scenes", "easy_vqa", "easy-vqa"):
        return Scenes() if source == "scenes" else EasyVqa()
    path = Path(source)
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():
        raise UserError(f"there is no source {source!r}; give {KNOWN_SOURCES}")
    image_folder = image_dir or str(path.parent)
    return _detect_file(path, image_folder, answers_file)


def _detect_file(path: Path, image_folder: str, answers_file: str) -> Any:
    """The source of an annotation file by the keys of its first row. Raises UserError for keys of no format."""
    file, name = str(path), path.name.partition(".")[0]
    keys, is_tree = first_keys(path)
    if "questions" in keys and is_tree:
        if not answers_file:
            raise UserError(f"{path} is a VQA questions file; give the file of its answers with --answers")
        return Vqa(file, answers_file, image_folder, name=name)
    for source_class, _, _, required in ROW_FORMATS:
        if any(set(group) <= keys for group in required):
            return source_class(file, image_folder, name=name)
    raise UserError(unknown_format_sentence(path, keys))


def first_keys(path: Path) -> tuple[set[str], bool]:
    """(keys of a file's first row, or of its first row with any, whether the file is one JSON object)."""
    rows = [row for _, row in itertools.islice(read_rows(path), MAX_ROWS)]
    dicts = [row for row in rows if isinstance(row, dict)]
    if len(rows) == len(dicts) == 1:
        return set(dicts[0]), True
    if dicts:
        return set(dicts[0]), False
    try:
        tree = read_json(path)  # an object that is written over several lines
    except UserError:
        tree = {}
    return (set(tree), True) if isinstance(tree, dict) else (set(), False)


def unknown_format_sentence(path: Path, keys: set[str]) -> str:
    """Why a file is of no known format: the keys of its rows, and the format that shares most of them."""

    def likeness(key: str) -> float:
        return max((difflib.SequenceMatcher(None, key, other).ratio() for other in keys), default=0.0)

    def score(group: tuple[str, ...], optional: tuple[str, ...]) -> float:
        shared = len(keys & {*group, *optional})
        return sum(map(likeness, group)) / len(group) + 0.2 * shared

    candidates = [
        (score(group, optional), title, group) for _, title, optional, groups in ROW_FORMATS for group in groups
    ]
    _, nearest, group = max(candidates, key=lambda candidate: candidate[0])
    shown = ", ".join(map(repr, sorted(keys)[:12])) or "none"
    lacking = " and ".join(repr(key) for key in group if key not in keys)
    return (
        f"{path} has no format that is read: the keys of its rows are {shown}; "
        f"the nearest format is {nearest}, which also needs {lacking}"
    )


def _detect_folder(path: Path) -> Any:
    coco = Coco(str(path), name=path.name or "coco")
    if any((path / name).is_file() for name in (coco.captions_file, coco.instances_file)):
        return coco
    folder = find_dataset_folder(path)
    return Scenes(folder=str(folder)) if "scenes" in folder.parts else ArrayRecordDataset(str(folder))


def show_images(text: str, names: list[str]) -> str:
    """The text with the names of its images at `<image>`; they are taken from the start of the list `names`."""
    while IMAGE_MARK in text and names:
        text = text.replace(IMAGE_MARK, f"[{names.pop(0)}]", 1)
    return text


def inspect(source: Any, split: str = "train", limit: int = 3) -> None:
    """Print the number of records and examples of a split, and up to `limit` examples of each task."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    data = DataConfig(sources=(source,), on_bad_record="replace")
    dataset = open_split(source, split, data.processor.max_pixels)
    title = f"{source.name}, {split}: {len(dataset)} records, {sum(dataset.task_sizes.values())} examples"
    table = Table("task", "examples", "record", "question", "answer", "tags", title=title)
    for task, size in dataset.task_sizes.items():
        for number, sample in enumerate(itertools.islice(examples(data, task, split), limit)):
            width, height = to_pil_image(sample.image).size
            name = f"{sample.name.partition('/')[2]}\n{width} x {height}"
            example, is_first = sample.example, number == 0
            names = [dataset.record_name(number) for number in (sample.record_index, *example.more_records)]
            rounds = [f"{show_images(question, names)}\n-> {answer}" for question, answer in example.history]
            question = show_images(example.question, names)
            cells = (name, "\n".join([*rounds, question]), example.answer, ", ".join(example.tags))
            table.add_row(task * is_first, str(size) * is_first, *map(escape, cells))
    console = Console()
    console.print(table)
    if problems := list(dataset.row_problems()):
        console.print(escape(f"{len(problems)} rows cannot be used; the first: {problems[0]}"))
