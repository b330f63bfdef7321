# SPDX-License-Identifier: Apache-2.0
"""Recognize the file or folder of a published benchmark by its keys."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lionjax.data.datasets.annotation_files import read_rows
from lionjax.data.datasets.aokvqa import AOkvqa
from lionjax.data.datasets.caption_references import CaptionReferences
from lionjax.data.datasets.docvqa import DocVqa
from lionjax.data.datasets.flickr30k_entities import Flickr30kEntities
from lionjax.data.datasets.gqa import Gqa
from lionjax.data.datasets.hateful_memes import HatefulMemes
from lionjax.data.datasets.iconqa import IconQa
from lionjax.data.datasets.llava_bench import LlavaBench
from lionjax.data.datasets.mmbench import MmBench
from lionjax.data.datasets.mme import MME_TASKS, Mme
from lionjax.data.datasets.ocr_vqa import OcrVqa
from lionjax.data.datasets.owl_eval import OwlEval
from lionjax.data.datasets.question_file import QuestionFile
from lionjax.data.datasets.reason_seg import SPLIT_FOLDERS, ReasonSeg
from lionjax.data.datasets.scienceqa import ScienceQa
from lionjax.data.datasets.seed_bench import SeedBench
from lionjax.data.datasets.textvqa import TextVqa
from lionjax.data.datasets.visdial import VisDial
from lionjax.data.datasets.vizwiz import VizWiz
from lionjax.data.datasets.vsr import Vsr

MAX_ROWS = 20
# (reader, where its rows are: "" for a list or lines, "*" for an object of rows by id, else a key; keys of a row)
ROW_KEYS: tuple[tuple[type[QuestionFile], str, tuple[str, ...]], ...] = (
    (AOkvqa, "", ("image_id", "question_id", "question", "choices")),
    (VizWiz, "", ("image", "question", "answerable")),
    (Vsr, "", ("image", "caption", "label", "relation")),
    (HatefulMemes, "", ("id", "img", "text")),
    (OwlEval, "", ("image", "question_id", "question", "ability")),
    (LlavaBench, "", ("question_id", "image", "text", "category")),
    (TextVqa, "data", ("question_id", "image_id", "question", "image_width")),
    (DocVqa, "data", ("questionId", "question", "image")),
    (SeedBench, "questions", ("question_id", "choice_a", "data_type")),
    (CaptionReferences, "images", ("id", "domain")),
    (OcrVqa, "*", ("questions", "answers", "split")),
    (Gqa, "*", ("question", "imageId")),
    (IconQa, "*", ("question", "choices", "ques_type")),
    (ScienceQa, "*", ("question", "choices", "lecture")),
)
# Files whose answers, references or OCR tokens are in a second file: the field of their reader.
ANSWERS_FIELD = {VisDial: "dense", LlavaBench: "references", TextVqa: "ocr_file"}


def detect_benchmark_file(path: Path, image_dir: str, answers_file: str = "") -> Any:
    """The reader of a benchmark's file, or None if it is of no benchmark. Raises UserError for a damaged file."""
    if (reader := _reader_of_file(path)) is None:
        return None
    if reader is ScienceQa:
        return ScienceQa(str(path.parent), name=path.parent.name)
    fields = {ANSWERS_FIELD[reader]: answers_file} if answers_file and reader in ANSWERS_FIELD else {}
    return reader(str(path), image_dir, name=path.name.partition(".")[0], **fields)


def _reader_of_file(path: Path) -> type | None:
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = next(csv.reader(file, delimiter="\t"), [])
        return MmBench if {"index", "question", "A"} <= set(columns) else None
    rows = [row for _, row in itertools.islice(read_rows(path), MAX_ROWS)]
    dicts = [row for row in rows if isinstance(row, dict)]
    if not dicts:
        return None
    tree = dicts[0] if len(rows) == 1 else None
    if tree is not None and isinstance(tree.get("data"), dict) and "dialogs" in tree["data"]:
        return VisDial
    if tree is not None and _has_bare_images(tree):
        return CaptionReferences
    for reader, place, keys in ROW_KEYS:
        if any(set(keys) <= row.keys() for row in itertools.islice(_rows_at(place, dicts, tree), MAX_ROWS)):
            return reader
    return None


def _rows_at(place: str, dicts: list[dict], tree: dict | None) -> Iterator[dict]:
    """The rows of a file that lie at `place`; see `ROW_KEYS`."""
    rows: Any = dicts
    if place:
        rows = () if tree is None else tree.values() if place == "*" else tree.get(place)
    return (row for row in rows or () if isinstance(row, dict)) if not isinstance(rows, str) else iter(())


def _has_bare_images(tree: dict) -> bool:
    """Whether images have only ids, as in LAVIS's files of reference captions."""
    images, notes = tree.get("images"), tree.get("annotations")
    if not isinstance(images, list) or not isinstance(notes, list) or not images or not notes:
        return False
    is_caption = isinstance(notes[0], dict) and {"image_id", "caption"} <= notes[0].keys()
    return is_caption and isinstance(images[0], dict) and images[0].keys() == {"id"}


def detect_benchmark_folder(path: Path, image_dir: str = "") -> Any:
    """The reader of a benchmark's folder, or None: MME, Flickr30k Entities, ReasonSeg, IconQA or ScienceQA."""
    fields = {"file": str(path), "image_dir": image_dir or str(path), "name": path.name or "benchmark"}
    if any((path / f"{task}.txt").is_file() for task in MME_TASKS):
        return Mme(**fields)
    if (path / "Sentences").is_dir() and (path / "Annotations").is_dir():
        return Flickr30kEntities(**fields)
    if (path / "problems.json").is_file() and (path / "pid_splits.json").is_file():
        return detect_benchmark_file(path / "problems.json", fields["image_dir"])
    folders = sorted({name for names in SPLIT_FOLDERS.values() for name in names})
    files = itertools.chain.from_iterable(sorted((path / name).glob("*.json")) for name in folders)
    is_reason_seg = any(b'"shapes"' in file.read_bytes() for file in itertools.islice(files, MAX_ROWS))
    return ReasonSeg(**fields | {"image_dir": str(path)}) if is_reason_seg else None  # images lie beside the rows
