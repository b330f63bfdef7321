# SPDX-License-Identifier: Apache-2.0
"""For the command line: detect the data source of a name or path, and print its records."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any

from lionjax.core import hub
from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotation_files import read_json, read_rows
from lionjax.data.datasets.array_record import ArrayRecordDataset, find_dataset_folder
from lionjax.data.datasets.coco import Coco, CocoRelease
from lionjax.data.datasets.conversations import ROUND_KEYS, Conversations
from lionjax.data.datasets.detect_benchmark import detect_benchmark_file, detect_benchmark_folder
from lionjax.data.datasets.detect_table import detect_table_file, detect_table_folder
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.karpathy import CAPTION_LISTS, KarpathyCaptions, caption_list
from lionjax.data.datasets.lion import LionRecords
from lionjax.data.datasets.question_file import coco_file_name_pattern
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.refer import Refer
from lionjax.data.datasets.shikra import KINDS, ShikraJsonl
from lionjax.data.datasets.source import open_split
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import NO_IMAGE_NAME, to_pil_image
from lionjax.data.rounds import IMAGE_MARK
from lionjax.data.samples import examples
from lionjax.data.scenes.dataset import Scenes

MAX_ROWS = 20  # rows of a file that are read to detect its format
IMAGE_AND_ID = ("image", "images", "id")
JSON_LINES_KEYS = tuple(
    "image file_name question answer answers task kind expression boxes question_boxes tags width height".split()
)
LION_KEYS = (("question", "answer", "category"), ("question", "answer", "image_path"))
# (source class, format, keys that its rows may have, alternatives of those that they have); the first match counts
ROW_FORMATS = (
    (
        Conversations,
        "conversations (LLaVA, ShareGPT, messages)",
        IMAGE_AND_ID,
        (("conversations",), ("messages",), ("conversation",)),
    ),
    (RefCoco, "RefCOCO", ("height", "width"), (("img_id", "sents", "bbox"),)),
    (ShikraJsonl, "Shikra's and NExT-Chat's JSON Lines", ("width", "height"), tuple(KINDS.values())),
    (KarpathyCaptions, "LAVIS's captions", ("image_id",), (("image", "caption"),)),
    (LionRecords, "LION's training records", (*IMAGE_AND_ID, "tags"), LION_KEYS),
    (JsonLines, "POPE", ("question_id",), (("image", "text", "label"),)),
    (JsonLines, "JSON Lines (docs/own_data.md)", JSON_LINES_KEYS, (("answer",), ("answers",), ("boxes",))),
)
# Keys that rows of a format never have, where another format shares its keys.
FOREIGN_KEYS = {
    KarpathyCaptions: {"label", "answer", "question"},  # VSR's captions may be false
    LionRecords: {"task", "kind", "answers", "boxes", "question_boxes", "expression", "file_name"},  # JSON Lines
}
KNOWN_SOURCES = (
    "'scenes', 'easy_vqa', a COCO, refer, ScienceQA or built folder, or a file of conversations, JSON Lines, RefCOCO, "
    "captions or VQA, CSV, Parquet or tars, a folder of pictures, or a benchmark (docs/benchmarks.md)"
)


def detect_source(source: str, image_dir: str = "", answers_file: str = "", is_test: bool = False) -> Any:
    """The data source of 'scenes', 'easy_vqa', a folder or an annotation file.

    `image_dir`: the image folder of an annotation file; default is the file's folder. `answers_file`: the annotations
    of a VQA questions file. Raises UserError for an unknown source, and for VQA questions without answers, unless
    `is_test`: the answers of test splits are not public.
    """
    if source in ("scenes", "easy_vqa", "easy-vqa"):
        return Scenes() if source == "scenes" else EasyVqa()
    path, image_dir = hub.local_path(source), str(hub.local_path(image_dir)) if image_dir else ""
    answers_file = str(hub.local_path(answers_file)) if answers_file else ""
    if path.is_dir():
        return _detect_folder(path, image_dir)
    if (table := detect_table_file(str(path), image_dir)) is not None:
        return table
    if not path.is_file():
        raise UserError(f"there is no source {source!r}; give {KNOWN_SOURCES}")
    image_folder = image_dir or str(path.parent)
    if path.suffix == ".p":
        return Refer(str(path.parent), image_dir or _refer_images(path.parent), path.name, name=path.parent.name)
    return _detect_file(path, image_folder, answers_file, is_test)


def _detect_file(path: Path, image_folder: str, answers_file: str, is_test: bool) -> Any:
    """The source of an annotation file by the keys of its first row. Raises UserError for keys of no format."""
    file, name = str(path), path.name.partition(".")[0]
    if (source := detect_benchmark_file(path, image_folder, answers_file)) is not None:
        return source
    keys, is_tree = first_keys(path)
    if "questions" in keys and is_tree:
        if not answers_file and not is_test:
            raise UserError(f"{path} is a VQA questions file; give the file of its answers with --answers")
        return Vqa(file, answers_file, image_folder, _vqa_pattern(path, image_folder), name=name)
    if "images" in keys and is_tree and not keys & {*ROUND_KEYS}:
        return _detect_image_list(path, image_folder, keys)
    if is_tree and keys & {*CAPTION_LISTS} and any(caption_list(tree) for _, tree in read_rows(path)):
        return KarpathyCaptions(file, image_folder, name=name)
    for source_class, _, _, required in ROW_FORMATS:
        if any(set(group) <= keys for group in required) and not keys & FOREIGN_KEYS.get(source_class, set()):
            return source_class(file, image_folder, name=name)
    raise UserError(unknown_format_sentence(path, keys))


def _vqa_pattern(path: Path, image_folder: str) -> str:
    """How VQA's image files are named, by its first question whose image is there; {}.jpg if none is."""
    tree: Any = read_json(path)
    questions, subtype = tree["questions"], str(tree.get("data_subtype") or "val2014")
    ids = [row.get("image_id") for row in (questions if isinstance(questions, list) else [])[:MAX_ROWS] if row]
    patterns = (coco_file_name_pattern(Path(image_folder), image_id, subtype) for image_id in ids)
    return next((pattern for pattern in patterns if ":" in pattern), "{}.jpg")


def first_keys(path: Path) -> tuple[set[str], bool]:
    """(keys of a file's first row, or of its first row with any, whether the file is one JSON object)."""
    rows = [row for _, row in itertools.islice(read_rows(path), MAX_ROWS)]
    dicts = [row for row in rows if isinstance(row, dict)]
    if len(rows) == len(dicts) == 1:
        return set(dicts[0]), True
    return (set(dicts[0]) if dicts else set()), False


def unknown_format_sentence(path: Path, keys: set[str]) -> str:
    """Why a file is of no known format: the keys of its rows, and the format that shares most of them."""
    if not keys:
        return f"{path} has no row with keys; give a list of JSON objects, or one object a line"

    def likeness(key: str) -> float:
        return max((difflib.SequenceMatcher(None, key, other).ratio() for other in keys), default=0.0)

    def score(group: tuple[str, ...], optional: tuple[str, ...]) -> float:
        shared, num_lacking = len(keys & {*group, *optional}), len({*group} - keys)
        return sum(map(likeness, group)) / len(group) + 0.2 * shared - 0.1 * num_lacking

    candidates = [
        (score(group, optional), title, group) for _, title, optional, groups in ROW_FORMATS for group in groups
    ]
    _, nearest, group = max(candidates, key=lambda candidate: candidate[0])
    shown = ", ".join(map(repr, sorted(keys)[:12]))
    lacking = " and ".join(repr(key) for key in group if key not in keys)
    return (
        f"{path} has no format that is read: the keys of its rows are {shown}; "
        f"the nearest format is {nearest}, which also needs {lacking}"
    )


def _detect_image_list(path: Path, image_folder: str, keys: set[str]) -> Any:
    """One of COCO's annotation files, or Karpathy's list of images with their sentences."""
    name, images = path.name.partition(".")[0], str(Path(image_folder).resolve())
    if "annotations" not in keys:
        return KarpathyCaptions(str(path), image_folder, name=name)
    files = ("", path.name) if "categories" in keys else (path.name, "")
    return Coco(str(path.parent), *files, images, name=name)


def _detect_folder(path: Path, image_dir: str = "") -> Any:
    coco = Coco(str(path), name=path.name or "coco")
    if any((path / name).is_file() for name in (coco.captions_file, coco.instances_file)) and not _refs_file(path):
        return coco
    if sets := _coco_sets(path):
        train = next((part for part in sets if part.startswith("train")), sets[0])
        heldout = next((part for part in sets if part.startswith("val")), train)
        return CocoRelease(str(path), train, heldout, name=path.name or "coco")
    if refs := _refs_file(path):
        return Refer(str(path), image_dir or _refer_images(path), refs, name=path.name)
    if (source := detect_benchmark_folder(path, image_dir)) is not None:
        return source
    if (source := detect_table_folder(path, image_dir)) is not None:
        return source
    folder = find_dataset_folder(path)
    return Scenes(folder=str(folder)) if "scenes" in folder.parts else ArrayRecordDataset(str(folder))


def _coco_sets(path: Path) -> list[str]:
    """The sets of a published COCO folder that have annotations and images, the newest first."""
    files = [*path.glob("annotations/captions_*.json"), *path.glob("annotations/instances_*.json")]
    parts = {file.stem.partition("_")[2] for file in files}
    return sorted((part for part in parts if (path / part).is_dir()), key=lambda part: part[-4:], reverse=True)


def _refs_file(path: Path) -> str:
    """The first of refer's files in a folder: unc, umd, then google."""
    return next((f"refs({name}).p" for name in ("unc", "umd", "google") if (path / f"refs({name}).p").is_file()), "")


def _refer_images(path: Path) -> str:
    """Where refer's images are: in its own layout, or beside the annotations."""
    places = (
        "images/mscoco/images/train2014",
        "../images/mscoco/images/train2014",
        "images",
        "train2014",
        "../train2014",
    )
    return str(next((path / place for place in places if (path / place).is_dir()), path))


def show_images(text: str, names: list[str]) -> str:
    """The text with the names of its images at `<image>`; they are taken from the start of the list `names`."""
    while IMAGE_MARK in text and names:
        text = text.replace(IMAGE_MARK, f"[{names.pop(0)}]", 1)
    return text


def inspect(source: Any, split: str = "train", limit: int = 3) -> None:
    """Print the number of records and examples of a split, and up to `limit` examples of each task.

    Raises UserError if there is no row that can be used.
    """
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
            name = sample.name.partition("/")[2]
            name += "" if name == NO_IMAGE_NAME else f"\n{width} x {height}"
            example, is_first = sample.example, number == 0
            names = [dataset.record_name(number) for number in (sample.record_index, *example.more_records)]
            rounds = [f"{show_images(question, names)}\n-> {answer}" for question, answer in example.history]
            question = show_images(example.question, names)
            cells = (name, "\n".join([*rounds, question]), example.answer, ", ".join(example.tags))
            table.add_row(task * is_first, str(size) * is_first, *map(escape, cells))
    console = Console()
    console.print(table)
    problems = list(dataset.row_problems())
    if limit and sum(dataset.task_sizes.values()) and not table.row_count:
        reason = f"the first: {problems[0]}" if problems else "the reasons are above, behind 'skipped'"
        raise UserError(f"{source.name} has no row that can be used; {reason}")
    if problems:
        console.print(escape(f"{len(problems)} rows cannot be used; the first: {problems[0]}"))
