# SPDX-License-Identifier: Apache-2.0
"""Base of the readers of published benchmark files: rows of a file to annotations with the benchmark's own ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_json, read_rows
from lionjax.data.datasets.conversations import ImageFolders

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ANSWERS = ("",)  # the answers of a question of a test split, which are not public


class Question(NamedTuple):
    """One question of a benchmark: its task, its image's path ("" for none) and its annotation.

    `in_pixels`: its boxes are in pixels of the image file. `segmentation`: its mask, in COCO's form.
    """

    task: str
    image: str
    annotation: Annotation
    in_pixels: bool = False
    segmentation: dict | None = None


@dataclasses.dataclass(frozen=True)
class QuestionFile(AnnotationFile):
    """A benchmark's file, read row by row; a subclass defines `questions`, and `rows` where the file is no list.

    `TASK` is the task of rows that cannot be read. A file is one split, unless its reader has `OWN_SPLITS`. The rows
    are a list, JSON Lines, or the list behind the keys `LIST_KEYS` of a JSON object. `FURTHER_FILES` are the fields
    that name further files, or are empty.
    """

    TASK: ClassVar[str] = "vqa"
    OWN_SPLITS: ClassVar[bool] = False
    LIST_KEYS: ClassVar[tuple[str, ...]] = ()
    FURTHER_FILES: ClassVar[tuple[str, ...]] = ()

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        files = (vars(self)[field] for field in self.FURTHER_FILES)
        return *super().paths(), *(Path(file) for file in files if file)

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        """(location for messages, row) of the rows of a split; a UserError in place of a row that cannot be parsed."""
        del split
        return list_rows(Path(self.file), *self.LIST_KEYS) if self.LIST_KEYS else read_rows(Path(self.file))

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        """The questions of one row. Raises UserError for one that cannot be used."""
        raise NotImplementedError

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        folders = ImageFolders(builder.root)
        for location, row in self.rows(split):
            with builder.row(location, self.TASK):
                if isinstance(row, UserError):
                    raise row
                if not isinstance(row, dict):
                    raise UserError(f"{location} is {typed_rows.abbreviate(row)}; give an object with a question")
                for question in list(self.questions(row, location)):
                    name = folders.find(question.image) if question.image else ""
                    if builder.includes(name):
                        _add_question(builder, question, name, location)
        return builder.build(max_pixels)


def _add_question(builder: AnnotatedImagesBuilder, question: Question, name: str, location: str) -> None:
    # A mask in run lengths has the size of its image.
    height, width = (1.0, 1.0) if question.segmentation is None else question.segmentation["size"]
    info = ImageInfo(name, width, height, in_pixels=question.in_pixels)
    index = builder.add_image(name or ("text", location), info)
    regions: tuple[int, ...] = ()
    if question.segmentation is not None:
        regions = (len(builder.segmentations),)
        builder.segmentations.append(question.segmentation)
    annotation = dataclasses.replace(question.annotation, photo=index, regions=regions)
    builder.add_annotation(question.task, annotation)


def list_rows(path: Path, *keys: str) -> Iterator[tuple[str, object]]:
    """(location, row) of a list inside a JSON object, by the keys that lead to it. Raises UserError if it has none."""
    rows = read_json(path)
    for key in keys:
        rows = rows.get(key) if isinstance(rows, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list {'.'.join(keys)!r}; give a file of the expected format")
    yield from ((f"{path}: entry {number} of {keys[-1]!r}", row) for number, row in enumerate(rows))


def rows_by_id(path: Path, id_key: str) -> Iterator[tuple[str, object]]:
    """(location, row with its id as `id_key`) of a JSON object of rows by id. Raises UserError for another file."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no JSON object of questions by id; give a file of the expected format")
    for number, row in tree.items():
        yield f"{path}: question {number}", {**row, id_key: number} if isinstance(row, dict) else row


def coco_file_name_pattern(root: Path, image_id: object, subtype: str = "val2014", default: str = "{}.jpg") -> str:
    """The pattern of file names by image id under which an image lies in a folder: `default`, or COCO's of 2014.

    `default` where neither is there.
    """
    coco = f"COCO_{subtype}_{{:012d}}.jpg"
    is_number = isinstance(image_id, int) or str(image_id).isdecimal()
    is_coco = is_number and (root / coco.format(int(str(image_id)))).is_file()
    return coco if is_coco and not (root / default.format(image_id)).is_file() else default


def required_text(row: dict, key: str, location: str) -> str:
    """The text of a key that a row must have. Raises UserError without one."""
    if not (text := typed_rows.text(row, key, location)).strip():
        raise UserError(f"{location} has no {key!r}; add it")
    return text


def row_id(row: dict, key: str, location: str) -> str:
    """The id of a row, a number or a text, as text. Raises UserError for a row without one."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{location} has {typed_rows.abbreviate(value)} as {key!r}; give a number or a text")
    return str(value)


def answer_texts(row: dict, key: str, location: str) -> tuple[str, ...]:
    """The reference answers of a row: texts, or objects with `answer`; `NO_ANSWERS` where it has none.

    Blank answers are kept, because the number of references counts.
    """
    values = row.get(key)
    if values is None:
        return NO_ANSWERS
    if not isinstance(values, list):
        raise UserError(f"{location} has {typed_rows.abbreviate(values)} as {key!r}; give a list of answers")
    texts = [value.get("answer") if isinstance(value, dict) else value for value in values]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{location} has an answer that is no text in {key!r}; correct it")
    return tuple(texts) or NO_ANSWERS


def options_question(question: str, choices: Sequence[str], hint: str = "") -> str:
    """A question with its options in lines 'A. text', as LLaVA asks them, behind the hint."""
    lines = [hint, question, *(f"{letter}. {text}" for letter, text in zip(OPTION_LETTERS, choices))]
    return "\n".join(filter(None, lines))


def choice_annotation(
    question_id: str, question: str, choices: Sequence[str], target: int | None, hint: str = "", **fields
) -> Annotation:
    """A multiple-choice question; `target` is the index of the right choice, or None where it is not public."""
    answers = NO_ANSWERS if target is None else (OPTION_LETTERS[target],)
    facts = {"question": question, "hint": hint, "target": target} | fields.pop("facts", {})
    text = options_question(question, choices, hint)
    return Annotation(0, answers, text, question_id=question_id, choices=tuple(choices), facts=facts, **fields)
