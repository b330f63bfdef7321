# SPDX-License-Identifier: Apache-2.0
"""IconQA (arXiv 2110.13214) as published: problems.json, pid_splits.json and SPLIT/KIND/NUMBER/image.png."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_json
from lionjax.data.datasets.question_file import (
    OPTION_LETTERS,
    Question,
    QuestionFile,
    choice_annotation,
    required_text,
    row_id,
    rows_by_id,
)
from lionjax.data.datasets.scienceqa import SPLIT_NAMES


@dataclass(frozen=True)
class IconQa(QuestionFile):
    """IconQA in its own splits: `choice` where an option is text, `vqa` where the answer is written.

    `file` is problems.json, beside which lies pid_splits.json (with the same prefix). Questions whose options are
    pictures (choose_img) are of the task `choice` with the kind choose_img, without the pictures of the options.
    """

    name: str = "iconqa"
    TASK = "choice"
    OWN_SPLITS = True

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return *super().paths(), self.splits_file

    @property
    def splits_file(self) -> Path:
        path = Path(self.file)
        return path.with_name(path.name.replace("problems", "pid_splits"))

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        splits = read_json(self.splits_file)
        wanted = splits.get(SPLIT_NAMES[split]) if isinstance(splits, dict) else None
        if not isinstance(wanted, list):
            raise UserError(f"{self.splits_file} has no list {SPLIT_NAMES[split]!r}; give IconQA's pid_splits.json")
        rows = {row["pid"]: (location, row) for location, row in self._problems() if isinstance(row, dict)}
        for pid in map(str, wanted):
            location, row = rows.get(pid, (f"{self.splits_file}: question {pid}", None))
            problem = UserError(f"{location} is not in {self.file}; use the files of one data set")
            yield location, problem if row is None else {**row, "split": SPLIT_NAMES[split]}

    def _problems(self) -> Iterator[tuple[str, object]]:
        return rows_by_id(Path(self.file), "pid")

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        kind, question = row["ques_type"], required_text(row, "question", location)
        number, answer = row_id(row, "pid", location), row["answer"]
        image = f"{row['split']}/{kind}/{number}/image.png"
        if kind == "fill_in_blank":
            yield Question("vqa", image, Annotation(0, (str(answer),), question, kind=kind, question_id=number))
            return
        choices = [str(choice) for choice in row["choices"]]
        if not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(OPTION_LETTERS)):
            raise UserError(f"{location} has {answer!r} as its answer; give the index of one of its choices")
        annotation = choice_annotation(number, question, choices, answer, kind=kind)
        yield Question("choice", image, replace(annotation, facts={**annotation.facts, "grade": row.get("grade")}))
