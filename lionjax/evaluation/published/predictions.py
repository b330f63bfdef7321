# SPDX-License-Identifier: Apache-2.0
"""Answers that a model gave to a benchmark, read from a file and joined with the questions.

A file is a JSON list or JSON Lines of objects or texts, or an object {id: answer}; of MME it is the folder of its
files, of masks it may be a folder of PNGs. Rows with an id are joined by it; without ids there must be one for each
question, in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import read_rows
from lionjax.data.datasets.mme import MME_TASKS, read_mme_lines

log = logging.getLogger(__name__)

ID_KEYS = ("question_id", "questionId", "index", "qid", "pid", "id", "image_id", "name", "image")
TEXT_KEYS = ("answer", "prediction", "text", "caption", "content", "response", "output", "pred", "pred_ans")
JOINED_ID_KEYS = (("image_id", "round_id"), ("image_id", "sentence_id"))  # VisDial, Flickr30k Entities
OCR_PROMPT = "Reference OCR token:"


class AnsweredQuestion(NamedTuple):
    """A question of a benchmark with what was answered: a text, or the row of the answer file.

    `segmentation`: the true mask, in COCO's form, where the question has one.
    """

    annotation: Annotation
    image: ImageInfo
    prediction: Any
    segmentation: Any = None

    @property
    def text(self) -> str:
        """The answer as text. Raises UserError for a row without one."""
        return prediction_text(self.prediction)

    @property
    def references(self) -> list[str]:
        """The reference answers, all that the file has."""
        return list(self.annotation.facts.get("references", self.annotation.answers))


class Answers(NamedTuple):
    """The answered questions of a benchmark, the ids of those without an answer, and how many cannot be used."""

    rows: list[AnsweredQuestion]
    unanswered: list[str]
    num_bad_questions: int


def prediction_text(prediction: Any) -> str:
    """The text of an answer: itself, or the first of `TEXT_KEYS` of its row. Raises UserError if it has none."""
    if isinstance(prediction, str):
        return prediction
    if isinstance(prediction, int | float) and not isinstance(prediction, bool):
        return str(prediction)
    if isinstance(prediction, Mapping):
        value = next((prediction[key] for key in TEXT_KEYS if key in prediction), None)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    shown = typed_rows.abbreviate(prediction)
    raise UserError(f"the answer {shown} has no text; give it as 'answer', one of {', '.join(TEXT_KEYS)}")


def join_answers(
    dataset: AnnotatedImages, tasks: Sequence[str], source: str, path: Path, wanted: Callable[[Annotation], bool]
) -> Answers:
    """The questions of some tasks with the answers of a file.

    `wanted`: which questions belong to the benchmark; answers to the others are left out. Raises UserError for an
    answer without a question, for two answers to one question, for questions with the same id, and for answers without
    ids of another number than the questions.
    """
    annotations = [row for task in tasks for row in dataset.annotations.get(task, ())]
    problems = [row.problem for row in annotations if row.problem]
    for problem in problems[:1]:
        log.warning("%d questions of %s cannot be used; the first: %s", len(problems), source, problem)
    usable = [row for row in annotations if not row.problem]
    if not usable:
        raise UserError(f"{source} has no question that can be used; {next(iter(problems), 'give the published file')}")
    by_id, in_order = read_predictions(path)
    if in_order:
        if problems:
            raise UserError(f"{path} has answers without ids, which need every question, but {problems[0]}")
        if len(in_order) != len(usable):
            raise UserError(
                f"{path} has {len(in_order)} answers without ids for the {len(usable)} questions of {source}; give one "
                "for each question in its order, or ids"
            )
        pairs = list(zip(usable, in_order))
    else:
        pairs = _join_by_id(usable, by_id, source, path, len(problems))
    chosen = [(annotation, answer) for annotation, answer in pairs if wanted(annotation)]
    rows = [_answered(dataset, annotation, answer) for annotation, answer in chosen if answer is not None]
    unanswered = [annotation.question_id for annotation, answer in chosen if answer is None]
    if not rows:
        raise UserError(f"{path} answers no question of {source}; give the answers to this file's questions")
    if unanswered:
        log.warning("%d of %d questions have no answer, such as %s", len(unanswered), len(chosen), unanswered[0])
    return Answers(rows, unanswered, len(problems))


def _answered(dataset: AnnotatedImages, annotation: Annotation, answer: Any) -> AnsweredQuestion:
    segmentation = dataset.segmentations[annotation.regions[0]] if annotation.regions else None
    return AnsweredQuestion(annotation, dataset.image_infos[annotation.photo], answer, segmentation)


def _join_by_id(
    usable: Sequence[Annotation], by_id: dict, source: str, path: Path, num_problems: int
) -> list[tuple[Annotation, Any]]:
    known: dict[str, int] = {}
    for index, annotation in enumerate(usable):
        if known.setdefault(annotation.question_id, index) != index:
            raise UserError(f"{source} has two questions with the id {annotation.question_id!r}; correct the file")
    for index, annotation in enumerate(usable):
        for alias in annotation.facts.get("aliases", ()):
            known.setdefault(alias, index)
    answers: dict[int, Any] = {}
    strangers = [key for key in by_id if key not in known]
    if strangers:
        split = "; they seem to be of another split" if len(strangers) == len(by_id) else ""
        if num_problems and len(strangers) < len(by_id):
            raise UserError(
                f"{num_problems} rows of {source} cannot be read (see above), and {path} answers {len(strangers)} "
                f"questions that the others do not have, such as {strangers[0]!r}; correct the rows"
            )
        raise UserError(
            f"{path} answers {len(strangers)} questions that {source} does not have, such as {strangers[0]!r}{split}; "
            "give the answers to this file's questions"
        )
    for key, answer in by_id.items():
        if known[key] in answers:
            raise UserError(f"{path} answers the question {key!r} twice; keep one answer")
        answers[known[key]] = answer
    return [(annotation, answers.get(index)) for index, annotation in enumerate(usable)]


def read_predictions(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """({id: row or text}, []) of a file whose rows have ids, else ({}, rows or texts in order).

    Raises UserError for a file that cannot be read, for two rows with one id, and for rows of which only some have one.
    """
    if path.is_dir():
        return _unique(_folder_rows(path), path), []
    rows: list[tuple[str, Any]] = []
    for location, row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        rows.append((location, row))
    if len(rows) == 1 and isinstance(rows[0][1], dict) and _is_by_id(rows[0][1]):
        return dict(rows[0][1]), []
    ids = [prediction_id(row) if isinstance(row, dict) else None for _, row in rows]
    if rows and all(number is not None for number in ids):
        return _unique(((number, row) for number, (_, row) in zip(ids, rows)), path), []
    if any(number is not None for number in ids):
        location = next(location for number, (location, _) in zip(ids, rows) if number is None)
        raise UserError(f"{location} has no id, but others of the file have one; add it as {ID_KEYS[0]!r}")
    return {}, [row for _, row in rows]


def _is_by_id(row: Mapping[str, Any]) -> bool:
    """Whether an object maps ids to answers, and is no single row."""
    return not set(row) & {*ID_KEYS, *TEXT_KEYS}


def _unique(pairs: Iterator[tuple[str, Any]], path: Path) -> dict[str, Any]:
    by_id: dict[str, Any] = {}
    for number, row in pairs:
        if number in by_id:
            raise UserError(f"{path} answers the question {number!r} twice; keep one answer")
        by_id[number] = row
    return by_id


def prediction_id(row: Mapping[str, Any]) -> str | None:
    """The id of a row of an answer file; None without one.

    LLaVA's rows of TextVQA and MME have the image as id, which two questions share, and the question in their prompt:
    both together are the id.
    """
    for keys in JOINED_ID_KEYS:
        if all(key in row for key in keys):
            return "/".join(str(row[key]) for key in keys)
    value = next((row[key] for key in ID_KEYS if row.get(key) not in (None, "")), None)
    if value is None:
        return None
    question = llava_question(row["prompt"]) if isinstance(row.get("prompt"), str) else ""
    if question and str(value).partition("/")[0] in MME_TASKS and str(value).count("/") == 1:
        words = " ".join(question.split())
        return f"{value}/{words if MME_ENDING in words else f'{words} {MME_ENDING}'}"
    is_image = isinstance(value, str) and len(value) == TEXTVQA_ID_LENGTH
    return f"{value}|{question.lower()}" if question and is_image else str(value)


MME_ENDING = "Please answer yes or no."  # of each question of MME; LLaVA asks with another one
TEXTVQA_ID_LENGTH = 16  # hexadecimal digits of an Open Images id


def llava_question(prompt: str) -> str:
    """The question in a prompt of LLaVA's TextVQA or MME: its first line that is no list of OCR tokens."""
    lines = [line for line in prompt.split("\n") if not line.startswith(OCR_PROMPT)]
    return lines[0].strip() if lines else ""


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """(id, answer) of MME's files, or (name, path) of PNGs with masks."""
    masks = sorted(folder.glob("*.png"))
    yield from ((path.stem, {"mask": str(path)}) for path in masks)
    for location, task, cells in () if masks else read_mme_lines(folder):
        if isinstance(cells, UserError):
            raise cells
        if len(cells) != 4:
            raise UserError(f"{location} has no answer; give image, question, true and predicted answer between tabs")
        yield f"{task}/{cells[0]}/{cells[1]}", cells[3]
