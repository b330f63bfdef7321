# SPDX-License-Identifier: Apache-2.0
"""ScienceQA as LLaVA asks it: question, context and options in, lecture, solution and a letter out (QCM-LEA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, convert_format_errors, read_json

OPTION_LETTERS = "ABCDE"
SPLIT_NAMES = {"train": "train", "validation": "val", "heldout": "test"}


@dataclass(frozen=True)
class ScienceQa:
    """A folder with problems.json, pid_splits.json and images/SPLIT/NUMBER/image.png, as ScienceQA is published.

    The task is `choice`; its kinds are "image" and "text", as not every question has a picture.
    """

    folder: str
    name: str = "scienceqa"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        folder, there = Path(self.folder), SPLIT_NAMES[split]
        problems, numbers = (read_json(folder / f"{name}.json") for name in ("problems", "pid_splits"))
        reader = AnnotatedImagesBuilder(folder / "images" / there)
        with convert_format_errors(folder / "problems.json"):
            for number in numbers[there]:
                problem = problems[number]
                seen = f"{number}/{problem['image']}" if problem.get("image") else ""
                photo = reader.add_image(seen, ImageInfo(seen))
                kind = "image" if seen else "text"
                row = Annotation(photo, (format_answer(problem),), format_question(problem), kind=kind)
                reader.add_annotation("choice", row)
        return reader.build(max_pixels)


def format_question(problem: dict) -> str:
    """The question, what is given beside it, and its options by their letters."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTION_LETTERS, problem["choices"]))
    if len(problem["choices"]) > len(OPTION_LETTERS):
        raise UserError(f"a question has {len(problem['choices'])} options; at most 5 have letters")
    context = " ".join((problem.get("hint") or "").split()) or "N/A"
    return f"{problem['question']}\nContext: {context}\nOptions: {options}"


def format_answer(problem: dict) -> str:
    """Lecture, solution, and the letter in the sentence that is looked for."""
    parts = (problem.get("lecture"), problem.get("solution"))
    said = f"The answer is {OPTION_LETTERS[problem['answer']]}."
    return " ".join(" ".join(filter(None, (*parts, said))).split())
