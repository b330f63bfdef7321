# SPDX-License-Identifier: Apache-2.0
"""ScienceQA (arXiv 2209.09513) in LLaVA's format QCM-LEA: question, context, options to lecture, solution, letter."""

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
    """The published ScienceQA folder: problems.json, pid_splits.json and images/SPLIT/NUMBER/image.png (or SPLIT/...).

    The task is `choice`; its kinds are "image" and "text", for questions with and without an image.
    """

    folder: str
    name: str = "scienceqa"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return tuple(Path(self.folder) / name for name in ("problems.json", "pid_splits.json"))

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        folder, split_name = Path(self.folder), SPLIT_NAMES[split]
        problems, question_ids = (read_json(folder / f"{name}.json") for name in ("problems", "pid_splits"))
        root = folder / "images" if (folder / "images").is_dir() else folder
        builder = AnnotatedImagesBuilder(root / split_name)
        with convert_format_errors(folder / "problems.json"):
            for question_id in question_ids[split_name]:
                with builder.row(f"{folder / 'problems.json'}: question {question_id}", "choice"):
                    problem = problems[question_id]
                    image_name = f"{question_id}/{problem['image']}" if problem.get("image") else ""
                    kind, texts = "image" if image_name else "text", (format_answer(problem), format_question(problem))
                    image_index = builder.add_image(image_name or ("text", question_id), ImageInfo(image_name))
                    parts = {key: problem[key] for key in ("question", "hint") if problem.get(key)}
                    facts = parts | {"target": problem["answer"]}
                    fields = {"kind": kind, "question_id": str(question_id), "facts": facts}
                    choices = tuple(problem["choices"])
                    annotation = Annotation(image_index, texts[:1], texts[1], choices=choices, **fields)
                    builder.add_annotation("choice", annotation)
        return builder.build(max_pixels)


def format_question(problem: dict) -> str:
    """Question, context and lettered options as text. Raises UserError for more than 5 options."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTION_LETTERS, problem["choices"]))
    if len(problem["choices"]) > len(OPTION_LETTERS):
        raise UserError(f"a question has {len(problem['choices'])} options; at most 5 are allowed")
    context = " ".join((problem.get("hint") or "").split()) or "N/A"
    return f"{problem['question']}\nContext: {context}\nOptions: {options}"


def format_answer(problem: dict) -> str:
    """Lecture, solution, and the sentence with the letter, which evaluation parses."""
    parts = (problem.get("lecture"), problem.get("solution"))
    answer = f"The answer is {OPTION_LETTERS[problem['answer']]}."
    return " ".join(" ".join(filter(None, (*parts, answer))).split())
