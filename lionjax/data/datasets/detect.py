# SPDX-License-Identifier: Apache-2.0
"""Which source a word or a path means, and a look at its records, for the command line."""

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
    """The source that a word or path means: 'scenes', 'easy_vqa', a folder or an annotation file.

    `images`: where the pictures of a file lie, its own folder if not said; `answers`: those of a VQA questions file.
    """
    if source in ("scenes", "easy_vqa", "easy-vqa"):
        return Scenes() if source == "scenes" else EasyVqa()
    path = Path(source)
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():
        raise UserError(f"there is no source {source!r}; give {KNOWN_SOURCES}")
    pictures = image_dir or str(path.parent)
    if path.suffix == ".jsonl":
        return JsonLines(source, pictures, name=path.stem)
    name = path.name.partition(".")[0]
    try:
        tree = read_json(path)
    except UserError:
        return JsonLines(source, pictures, name=name)  # POPE's lines are called .json
    first = tree[0] if isinstance(tree, list) and tree else tree
    if isinstance(first, dict) and "sents" in first:
        return RefCoco(source, pictures, name=name)
    if isinstance(first, dict) and "questions" in first:
        if not answers_file:
            raise UserError(f"{source} holds questions; give the file of their answers as well")
        return Vqa(source, answers_file, pictures, name=name)
    return JsonLines(source, pictures, name=name)


def _detect_folder(path: Path) -> Any:
    coco = Coco(str(path), name=path.name or "coco")
    if any((path / name).is_file() for name in (coco.captions_file, coco.instances_file)):
        return coco
    folder = find_dataset_folder(path)
    return Scenes(folder=str(folder)) if "scenes" in folder.parts else ArrayRecordDataset(str(folder))


def inspect(source: Any, split: str = "train", limit: int = 3) -> None:
    """Print how many records and examples a split has, and a few of each task."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    data = DataConfig(sources=(source,), on_bad_record="replace")
    opened = open_split(source, split, data.processor.max_pixels)
    title = f"{source.name}, {split}: {len(opened)} records, {sum(opened.task_sizes.values())} examples"
    table = Table("task", "examples", "record", "question", "answer", "tags", title=title)
    for task, size in opened.task_sizes.items():
        for number, sample in enumerate(islice(examples(data, task, split), limit)):
            width, height = to_pil_image(sample.image).size
            name = f"{sample.name.partition('/')[2]}\n{width} x {height}"
            example, first = sample.example, number == 0
            words = (name, example.question, example.answer, ", ".join(example.tags))
            table.add_row(task * first, str(size) * first, *map(escape, words))
    Console().print(table)
