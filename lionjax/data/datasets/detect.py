# SPDX-License-Identifier: Apache-2.0
"""For the command line: detect the data source of a name or path, and print its records."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotation_files import read_json
from lionjax.data.datasets.array_record import ArrayRecordDataset, find_dataset_folder
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.source import open_split
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import to_pil_image
from lionjax.data.mixture import examples
from lionjax.data.scenes.dataset import Scenes

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
    if path.suffix == ".jsonl":
        return JsonLines(source, image_folder, name=path.stem)
    name = path.name.partition(".")[0]
    try:
        tree = read_json(path)
    except UserError:
        return JsonLines(source, image_folder, name=name)  # POPE's JSON lines files are named .json
    first = tree[0] if isinstance(tree, list) and tree else tree
    if isinstance(first, dict) and "sents" in first:
        return RefCoco(source, image_folder, name=name)
    if isinstance(first, dict) and "questions" in first:
        if not answers_file:
            raise UserError(f"{source} is a VQA questions file; give the file of its answers with --answers")
        return Vqa(source, answers_file, image_folder, name=name)
    return JsonLines(source, image_folder, name=name)


def _detect_folder(path: Path) -> Any:
    coco = Coco(str(path), name=path.name or "coco")
    if any((path / name).is_file() for name in (coco.captions_file, coco.instances_file)):
        return coco
    folder = find_dataset_folder(path)
    return Scenes(folder=str(folder)) if "scenes" in folder.parts else ArrayRecordDataset(str(folder))


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
        for number, sample in enumerate(islice(examples(data, task, split), limit)):
            width, height = to_pil_image(sample.image).size
            name = f"{sample.name.partition('/')[2]}\n{width} x {height}"
            example, is_first = sample.example, number == 0
            cells = (name, example.question, example.answer, ", ".join(example.tags))
            table.add_row(task * is_first, str(size) * is_first, *map(escape, cells))
    Console().print(table)
