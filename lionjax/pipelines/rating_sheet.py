# SPDX-License-Identifier: Apache-2.0
"""OwlEval's rating sheet (arXiv 2304.14178): a page on which people rate answers from A to D."""

from __future__ import annotations

from pathlib import Path

from lionjax.core.errors import UserError
from lionjax.core.files import make_folder
from lionjax.data.datasets.annotation_files import read_all_rows
from lionjax.data.images import open_image, safe_path
from lionjax.evaluation.published.predictions import prediction_text, read_predictions
from lionjax.pipelines.review_page import ReviewItem, write_page

RATINGS = {
    "A": "correct and complete",
    "B": "acceptable: small errors",
    "C": "addresses the question, with large errors",
    "D": "irrelevant or wrong",
}
RATINGS_FILE = "ratings.jsonl"


def write_sheet(path: Path, questions: Path, answers: Path, images: Path | None, limit: int | None = None) -> int:
    """Write the sheet of all questions; returns their number. The name of the model is not on it.

    It saves ratings.jsonl, which `lionjax evaluate --benchmark owleval --predictions` scores. Raises UserError for
    files that cannot be read, and for a question without an answer.
    """
    rows = read_all_rows(questions)[:limit] if questions.is_file() else []
    if not rows:
        raise UserError(f"{questions} has no questions; give OwlEval's questions.jsonl")
    given, items = read_predictions(answers)[0], []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(key in row for key in ("question_id", "question", "image")):
            raise UserError(f"{questions}: row {number} is no question; it has question_id, question and image")
        name = str(row["question_id"])
        if name not in given:
            raise UserError(f"{answers} has no answer to question {name}; give all answers with their ids")
        image = None if images is None else open_image(safe_path(images, str(row["image"])))
        texts = {"Question": str(row["question"]), "Answer": prediction_text(given[name])}
        items.append(ReviewItem(name, texts, image))
    make_folder(path.parent)
    write_page(path, "OwlEval", items, RATINGS, "question_id", "rating", RATINGS_FILE)
    return len(items)
