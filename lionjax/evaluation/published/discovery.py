# SPDX-License-Identifier: Apache-2.0
"""Find the published benchmarks under a folder: `lionjax evaluate DIR --benchmark all --source ROOT`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.detect import detect_source, first_keys
from lionjax.data.datasets.detect_benchmark import detect_benchmark_folder
from lionjax.data.datasets.table_rows import RowTable
from lionjax.evaluation.published import scoring

SUFFIXES = (".json", ".jsonl", ".tsv", ".p")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_TRIED_IMAGES = 20  # of a benchmark, to find the folder of its images
POPE_KEYS = {"image", "text", "label"}
# The class of a source's reader: its benchmarks. Caption files are told apart by their names.
BENCHMARKS_OF_READER = {
    "AOkvqa": ("aokvqa",),
    "VizWiz": ("vizwiz",),
    "Vsr": ("vsr",),
    "HatefulMemes": ("hateful_memes",),
    "OwlEval": ("owleval",),
    "LlavaBench": ("llava_bench",),
    "TextVqa": ("textvqa",),
    "DocVqa": ("docvqa",),
    "SeedBench": ("seed",),
    "OcrVqa": ("ocrvqa",),
    "Gqa": ("gqa",),
    "IconQa": ("iconqa",),
    "ScienceQa": ("scienceqa",),
    "VisDial": ("visdial",),
    "MmBench": ("mmbench",),
    "Mme": ("mme",),
    "Flickr30kEntities": ("flickr30k_entities",),
    "ReasonSeg": ("reason_seg",),
    "RefCoco": ("rec",),
    "Refer": ("rec", "res"),
    "ShikraJsonl": ("rec",),
    "JsonLines": ("pope",),
}
CAPTION_READERS = ("KarpathyCaptions", "CaptionReferences")
# (part of a file's name, its benchmark); other captions are of none.
CAPTION_FILES = (*(("textcaps", "textcaps"), ("nocaps", "nocaps"), ("flickr", "flickr30k")), ("coco", "coco_karpathy"))


@dataclasses.dataclass(frozen=True)
class FoundBenchmark:
    """A benchmark under a folder: its name, its file or folder, and the source that reads it with its images."""

    name: str
    path: Path
    source: Any
    answers: str = ""  # the file of its answers, where it has a second one

    @property
    def label(self) -> str:
        """The name of its figures: the benchmark's and the file's."""
        return f"{self.name}/{self.path.stem if self.path.is_file() else self.path.name}"


def is_root(text: str | None) -> bool:
    """Whether a folder is no source by itself, so that benchmarks lie in it or below."""
    if not text or not Path(text).is_dir():
        return False
    try:
        source = detect_source(text)
    except (UserError, OSError):
        return True
    return isinstance(source, RowTable)  # such as folders of pictures, which lie beside the files of benchmarks


def find_benchmarks(root: Path, image_dir: str = "") -> tuple[list[FoundBenchmark], dict[str, str]]:
    """(benchmarks under a folder, {file: why it is left out}), in the order of paths.

    `image_dir`: a folder of images, searched first. Files that are of no benchmark, such as answers, are left out
    without a reason. Raises UserError if there is none.
    """
    image_folders = [Path(image_dir)] if image_dir else []
    found, left_out = [], {}
    for path, answers in _candidates(root, image_folders):
        try:
            source = detect_source(str(path), "" if path.is_dir() else image_dir, answers)
            names = _benchmarks_of(path, source)
        except (UserError, OSError) as error:
            if _looks_like_questions(path):
                left_out[str(path)] = str(error)
            continue
        found += [FoundBenchmark(name, path, source, answers) for name in names]
    found = _without_copies(found, left_out)
    if not found:
        raise UserError(f"no published benchmark was found under {root}; docs/benchmarks.md lists the files")
    folders = list(dict.fromkeys([*image_folders, root]))
    return [_with_images(entry, root, folders) for entry in found], left_out


def _candidates(root: Path, image_folders: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file or folder that may be a benchmark, file of its answers or ""); folders with images are added."""
    for text, folders, files in os.walk(root):
        folder = Path(text)
        folders.sort()
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
            image_folders.append(folder)
        if folder != root and _is_benchmark_folder(folder):
            folders[:] = []  # what lies below belongs to it
            yield folder, ""
        names = {name for name in files if name.endswith(SUFFIXES)}
        answers = {name: _answers_name(name) for name in names}
        second = {name for name in answers.values() if name in names}
        for name in sorted(names - second):
            partner = answers[name]
            yield folder / name, str(folder / partner) if partner in names else ""


def _is_benchmark_folder(folder: Path) -> bool:
    try:
        return detect_benchmark_folder(folder) is not None
    except (UserError, OSError):
        return False


def _answers_name(name: str) -> str:
    """How the file of answers is named that belongs to a file of questions: VQA's, VisDial's, LLaVA-Bench's.

    Of TextVQA it is that of the OCR tokens.
    """
    if "questions" in name and name.endswith(".json"):
        return name.replace("OpenEnded_", "").replace("questions", "annotations")
    if name.startswith("visdial") and "dense" not in name:
        return name.replace(".json", "_dense_annotations.json")
    if match := re.fullmatch(r"TextVQA_0\.5\.1_(train|val|test)\.json", name):
        return f"TextVQA_Rosetta_OCR_v0.2_{match[1]}.json"
    return "answers_gpt4.jsonl" if name == "questions.jsonl" else ""


def _benchmarks_of(path: Path, source: Any) -> Sequence[str]:
    reader, words = type(source).__name__, path.name.lower()
    if reader == "JsonLines" and not first_keys(path)[0] >= POPE_KEYS:
        return ()
    if reader == "Vqa":
        return ("vqav2" if words.startswith("v2_") else "okvqa",)
    if reader in CAPTION_READERS:
        words = words.replace("refcoco", "")
        return next(((name,) for part, name in CAPTION_FILES if part in words), ())
    return BENCHMARKS_OF_READER.get(reader, ())


def _looks_like_questions(path: Path) -> bool:
    """Whether a file that cannot be used is worth a word: it is named as a benchmark's questions."""
    return path.is_dir() or "question" in path.name or path.suffix in (".tsv", ".p")


def _without_copies(found: list[FoundBenchmark], left_out: dict[str, str]) -> list[FoundBenchmark]:
    """Without further files of one folder with the same captions: Karpathy's own is taken, else that of the test.

    A file that is read with its whole folder, such as ScienceQA's, is left out without a reason.
    """
    kept: dict[tuple, FoundBenchmark] = {}
    folders = {(entry.name, entry.path) for entry in found if entry.path.is_dir()}
    found = [entry for entry in found if (entry.name, entry.path.parent) not in folders]

    def order(entry: FoundBenchmark) -> tuple:
        return not entry.path.name.startswith("dataset_"), "test" not in entry.path.name, entry.path.name

    for entry in sorted(found, key=order):
        is_caption = type(entry.source).__name__ in CAPTION_READERS
        key = (entry.name, entry.path.parent if is_caption else entry.path)
        if key in kept:
            left_out[str(entry.path)] = f"it has the captions of {kept[key].path.name}"
        else:
            kept[key] = entry
    return [entry for entry in found if entry in kept.values()]


def _with_images(entry: FoundBenchmark, root: Path, folders: Sequence[Path]) -> FoundBenchmark:
    """The benchmark read with the folder, at or above those with images, that has most of its first images.

    The source is detected anew for each folder, since the names of VQA's images follow from what lies there.
    """
    above = [parent for folder in folders for parent in folder.parents if root in (parent, *parent.parents)]
    best, most = scoring.whole_source(entry.name, entry.source, str(entry.path)), -1
    for place in ("", *dict.fromkeys([*folders, *above])):
        try:
            source = detect_source(str(entry.path), str(place), entry.answers)
            source = scoring.whole_source(entry.name, source, str(entry.path))
            dataset = scoring.open_benchmark(entry.name, source, "heldout")
        except UserError:  # its reason is given when it is run
            break
        paths = _image_paths(dataset)
        count = sum(path.is_file() for path in paths)
        if count > most:
            best, most = source, count
        if count == len(paths):
            break
    return dataclasses.replace(entry, source=best)


def _image_paths(dataset: AnnotatedImages) -> list[Path]:
    """The files of the first images of a benchmark that does not hold them itself."""
    indices = (k for k, info in enumerate(dataset.image_infos) if info.name and k not in dataset.embedded)
    return [dataset.image_path(k) for k in itertools.islice(indices, MAX_TRIED_IMAGES)]
