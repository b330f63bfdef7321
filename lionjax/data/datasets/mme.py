# SPDX-License-Identifier: Apache-2.0
"""MME (arXiv 2306.13394) as published: 14 files TASK.txt with image, question and answer between tabs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_text, split_lines
from lionjax.data.datasets.question_file import Question, QuestionFile

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_TASKS = (*PERCEPTION, *COGNITION)


@dataclass(frozen=True)
class Mme(QuestionFile):
    """A folder (`file`) of MME's files as yes-or-no questions of the task `vqa`, whose kind is MME's task.

    The images are TASK/NAME, or TASK/images/NAME. An id is TASK/IMAGE/QUESTION.
    """

    name: str = "mme"

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        for location, task, cells in read_mme_lines(Path(self.file)):
            if isinstance(cells, UserError):
                yield location, cells
            else:
                yield location, {"task": task, "image": cells[0], "question": cells[1], "answer": cells[2]}

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        if row["answer"].lower() not in ("yes", "no"):
            raise UserError(f"{location} has {row['answer']!r} as its answer; give Yes or No")
        number = f"{row['task']}/{row['image']}/{row['question']}"
        single_spaced = " ".join(number.split())  # some questions have two blanks, which answer files may lack
        facts = {"aliases": [single_spaced]} if single_spaced != number else {}
        fields = {"kind": row["task"], "question_id": number, "facts": facts}
        annotation = Annotation(0, (row["answer"].lower(),), row["question"], **fields)
        yield Question("vqa", f"{row['task']}/{row['image']}", annotation)


def read_mme_lines(folder: Path) -> Iterator[tuple[str, str, list[str] | UserError]]:
    """(location, MME's task, cells) of each line; a UserError in place of the cells of a line with too few or many.

    A line has image, question, answer and, in a file of predictions, the predicted answer.
    Raises UserError for a folder without any of MME's files.
    """
    paths = [path for task in MME_TASKS if (path := folder / f"{task}.txt").is_file()]
    if not paths:
        raise UserError(f"{folder} has none of MME's files, such as existence.txt; give their folder")
    for path in paths:
        for number, line in split_lines(read_text(path)):
            location, cells = f"{path}, line {number},", line.strip("\r\n").split("\t")
            if len(cells) not in (3, 4):
                cells = UserError(f"{location} has {len(cells)} cells; give image, question and answer between tabs")
            yield location, path.stem, cells
