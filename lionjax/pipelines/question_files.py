# SPDX-License-Identifier: Apache-2.0
"""Questions about many images, from JSON Lines to JSON Lines; a run that was stopped goes on where it stood."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.errors import UserError
from lionjax.core.files import write_jsonl
from lionjax.core.journal import Journal, journal_key
from lionjax.data import images
from lionjax.data.datasets.annotation_files import read_all_rows
from lionjax.inference.engine import Answer
from lionjax.inference.model import Model

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # questions that are read and answered together; so many are asked again after a kill
TEXT_FIELDS = ("prompt", "question")
ANSWER_FIELDS = ("text", "boxes", "masks", "error")
WEB_SCHEMES = ("http://", "https://", "ftp://", "file://", "data:")

FindTags = Callable[[Sequence[Any]], list[tuple[str, ...]]]  # from images to the tags of each
ToJson = Callable[[Answer], dict[str, Any]]


def refuse_web_address(name: str) -> str:
    """The name of an image's file. Raises UserError for an address of the web, with the reason."""
    if name.lower().startswith(WEB_SCHEMES):
        raise UserError(
            f"the image {name[:60]!r} is an address; addresses are not fetched, so that answers depend on files alone; "
            "download the image and give its file"
        )
    return name


def read_questions(path: Path, prompt: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file: `image`, a file, and `prompt` or `question`; `prompt`: for rows without one.

    A row may have `box` or `boxes`, `tags`, and fields of its own, which the answers keep. Raises UserError that names
    the line for others.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give JSON Lines with image and prompt")
    rows = read_all_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows; give JSON Lines with image and prompt")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise UserError(f"{path}: line {number} has no image; give the name of its file")
        if not any(isinstance(row.get(name), str) for name in TEXT_FIELDS):
            if prompt is None:
                raise UserError(f"{path}: line {number} has no prompt; give one there, or --prompt for all")
            row["prompt"] = prompt
    return rows


def answer_file(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    settings: Mapping[str, Any],
    to_json: ToJson,
    folder: Path | None = None,
    find_tags: FindTags | None = None,
    seed: int = 0,
) -> int:
    """Answer rows of `read_questions` and write them with their answers to `out`; the number without an answer.

    Answers are kept in a journal beside `out` until all are there, and those in it are not asked again. `settings` say
    what the answers depend on beside the rows; `to_json` writes an answer; `folder` holds the images. A row that cannot
    be asked gets `error`, a sentence. Row k samples with `seed` + k. Raises UserError where `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out} is there already; delete it, or give another file")
    journal = Journal(out.with_name(out.name + ".part"))
    journal.require(settings, "answers")
    keys = [journal_key({"row": row, "place": place}) for place, row in enumerate(rows)]
    missing = [place for place, key in enumerate(keys) if journal.get(key) is None]
    if len(missing) < len(rows):
        log.info("%d of %d answers are kept in %s", len(rows) - len(missing), len(rows), journal.path)
    errors: dict[int, str] = {}
    for start in range(0, len(missing), ROWS_AT_ONCE):
        places = missing[start : start + ROWS_AT_ONCE]
        asked = _Questions(model, folder, find_tags, seed)
        for place, answer in asked.answers({place: rows[place] for place in places}):
            if isinstance(answer, UserError):
                errors[place] = str(answer)
            else:
                journal.add(keys[place], {"answer": to_json(answer)})
        log.info("%d of %d questions are answered", len(rows) - len(missing) + start + len(places), len(rows))
    found = [
        {"error": errors[place]} if place in errors else journal.get(key)["answer"] for place, key in enumerate(keys)
    ]
    write_jsonl(out, [dict(row) | answer for row, answer in zip(rows, found)])
    journal.delete()
    return len(errors)


class _Questions:
    """Rows as questions of a model."""

    def __init__(self, model: Model, folder: Path | None, find_tags: FindTags | None, seed: int):
        self.model, self.folder, self.find_tags, self.seed = model, folder, find_tags, seed

    def answers(self, rows: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, Answer | UserError]]:
        """(place, answer or the reason why there is none) of each row, asked together where all can be."""
        opened: dict[int, Any] = {}
        for place, row in rows.items():
            try:
                opened[place] = self._open(row["image"])
            except UserError as error:
                yield place, error
        if not opened:
            return
        try:
            answers = self._answer(rows, opened)
        except UserError:
            yield from self._one_by_one(rows, opened)
            return
        yield from zip(opened, answers)

    def _one_by_one(self, rows, opened) -> Iterator[tuple[int, Answer | UserError]]:
        """As `answers`, where at least one row cannot be asked."""
        for place, image in opened.items():
            try:
                (answer,) = self._answer(rows, {place: image})
            except UserError as error:
                answer = error
            yield place, answer

    def _open(self, name: str) -> Any:
        refuse_web_address(name)
        path = Path(name) if self.folder is None else images.safe_path(self.folder, name)
        return images.open_image(path, name, self.model.processor.config.max_pixels)

    def _answer(self, rows: Mapping[int, Mapping[str, Any]], opened: Mapping[int, Any]) -> list[Answer]:
        asked = [rows[place] for place in opened]
        pictures = list(opened.values())
        prompts = [next(row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)) for row in asked]
        boxes = [row.get("boxes") or ([row["box"]] if row.get("box") else []) for row in asked]
        tags = [tuple(row.get("tags") or ()) for row in asked]
        if self.find_tags is not None and not all(tags):
            tags = [given or found for given, found in zip(tags, self.find_tags(pictures))]
        given: dict[str, Any] = {"boxes": boxes} if any(boxes) else {}
        given |= {"tags": tags} if any(tags) else {}
        return self.model.answer(pictures, prompts, seed=[self.seed + place for place in opened], **given)
