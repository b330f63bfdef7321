# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench 1 (arXiv 2307.16125) as published: SEED-Bench.json with multiple-choice questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotation_files import read_json
from lionjax.data.datasets.question_file import (
    OPTION_LETTERS,
    Question,
    QuestionFile,
    choice_annotation,
    list_rows,
    required_text,
    row_id,
)


@dataclass(frozen=True)
class SeedBench(QuestionFile):
    """SEED-Bench's questions as task `choice`, kinds the question types.

    Images are SEED-Bench-image/DATA_ID; of a video, the frame SEED-Bench-video-image/QUESTION_ID.png, which LLaVA
    takes from its middle. `facts["data_type"]` is image or video.
    """

    name: str = "seed_bench"
    TASK = "choice"

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        path = Path(self.file)
        tree = read_json(path)
        types = tree.get("question_type") if isinstance(tree, dict) else None
        names = {number: name for name, number in types.items()} if isinstance(types, dict) else {}
        for location, row in list_rows(path, "questions"):
            yield (
                location,
                {**row, "kind": names.get(row.get("question_type_id"), "")} if isinstance(row, dict) else row,
            )

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        choices = [required_text(row, f"choice_{letter}", location) for letter in "abcd"]
        number, data_type, answer = row_id(row, "question_id", location), row["data_type"], row.get("answer")
        if data_type not in ("image", "video") or (answer is not None and answer not in OPTION_LETTERS[:4]):
            raise UserError(f"{location} has data_type {data_type!r} and answer {answer!r}; correct it")
        is_image = data_type == "image"
        image = f"SEED-Bench-image/{row['data_id']}" if is_image else f"SEED-Bench-video-image/{number}.png"
        target = None if answer is None else OPTION_LETTERS.index(answer)
        fields = {"kind": row["kind"], "facts": {"data_type": data_type}}
        question = required_text(row, "question", location)
        yield Question("choice", image, choice_annotation(number, question, choices, target, **fields))
