# SPDX-License-Identifier: Apache-2.0
"""`lionjax answer`: a file of questions about captions, answered by PICa or PromptCap and written with a report."""

from __future__ import annotations

import dataclasses
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.errors import UserError
from lionjax.core.files import write_json, write_jsonl
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.captions_as_text import CaptionedQuestion, accuracy_summary
from lionjax.pipelines.completion import CompletionRequest, LanguageModel
from lionjax.pipelines.pica import ExampleFeatures, PicaConfig

log = logging.getLogger(__name__)

METHODS = ("pica", "promptcap")
ANSWERS_FILE, REPORT_FILE = "answers.jsonl", "report.json"


@dataclasses.dataclass(frozen=True)
class AnsweringConfig:
    """The method and how its prompts are built; `num_ensemble` and `use_tags` are PICa's.

    `seed` draws examples where there are no features, and captions of examples that have several.
    """

    method: str = "pica"
    num_shots: int = 16
    num_ensemble: int = 1
    use_tags: bool = True
    similarity: str = "imagequestion"
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}; it can be one of {', '.join(METHODS)}")
        if self.method == "promptcap" and self.num_ensemble != 1:
            raise UserError("promptcap asks one prompt for each question; leave out the ensemble")
        _ = self.pica

    @property
    def pica(self) -> PicaConfig:
        """PICa's part of the settings."""
        return PicaConfig(self.num_shots, self.num_ensemble, self.use_tags, self.similarity)


class RequestRecorder:
    """A `LanguageModel` that answers nothing and keeps what it would be asked: for a dry run."""

    def __init__(self) -> None:
        self.requests: list[CompletionRequest] = []

    def complete(self, requests: Sequence[CompletionRequest]) -> list[None]:
        """None for each request."""
        self.requests += requests
        return [None] * len(requests)

    def describe(self) -> dict[str, Any]:
        """The number of requests."""
        return {"num_requests": len(self.requests)}


def read_features(path: Path, num_questions: int, num_examples: int) -> tuple[ExampleFeatures, ExampleFeatures]:
    """Features of (questions, examples) in an npz file, one row each.

    Arrays: val_question, train_question and, for images, val_image and train_image; or val_features and train_features,
    which stand for both at once. Raises UserError for a file without them or with another number of rows.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.float32) for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no npz file of features ({error}); write one with numpy.savez") from error
    if "val_features" in arrays:  # of question and image together
        joint = {part: arrays[f"{part}_features"] for part in ("val", "train") if f"{part}_features" in arrays}
        arrays = {f"{part}_question": array for part, array in joint.items()}
        arrays |= {f"{part}_image": array[:, :0] for part, array in joint.items()}
    found = []
    for part, rows in (("val", num_questions), ("train", num_examples)):
        if (name := f"{part}_question") not in arrays:
            raise UserError(f"{path} has no array {name}; it has {', '.join(sorted(arrays)) or 'none'}")
        kept = {kind: arrays.get(f"{part}_{kind}") for kind in ("question", "image")}
        for kind, array in kept.items():
            if array is not None and (array.ndim != 2 or len(array) != rows or not np.isfinite(array).all()):
                raise UserError(f"{part}_{kind} of {path} is {array.shape}; give finite features, {rows} rows")
        found.append(ExampleFeatures(kept["question"], kept["image"]))
    return found[0], found[1]


def choose_examples(
    config: AnsweringConfig, features: tuple[ExampleFeatures, ExampleFeatures] | None, num_questions: int, num_examples
) -> list[list[int]]:
    """For each question the places of its examples, the most similar first; drawn at random without features.

    Raises UserError where there are fewer examples than the prompts show.
    """
    count = config.num_shots * config.num_ensemble
    if count > num_examples:
        raise UserError(f"{count} examples are shown and only {num_examples} were given; give more or lower the shots")
    if features is None:
        if count:
            log.warning("there are no features, so examples are drawn at random")
        return pica.random_examples(num_questions, num_examples, count, config.seed)
    return pica.similar_examples(*features, config.pica)


def answer_rows(
    model: LanguageModel,
    rows: Sequence[CaptionedQuestion],
    examples: Sequence[CaptionedQuestion],
    orders: Sequence[Sequence[int]],
    config: AnsweringConfig,
) -> list[str | None]:
    """The answer to each question by the config's method; None where the model was not asked for lack of budget."""
    if config.method == "pica":
        return pica.answer_questions(model, rows, examples, orders, config.pica, config.seed)
    return promptcap.answer_questions(model, rows, examples, orders)


def write_answers(
    folder: Path,
    rows: Sequence[CaptionedQuestion],
    answers: Sequence[str | None],
    model: LanguageModel,
    config: AnsweringConfig,
) -> dict[str, Any]:
    """Write answers.jsonl (rows that were answered) and report.json, whose content is returned.

    A question with choices also gets the choice that the answer means, and the report their accuracy.
    """
    answered = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer is not None]
    lines, correct = [], []
    for row, answer in answered:
        line: dict[str, Any] = {"question_id": row.question_id, "question": row.question, "answer": answer}
        if row.choices:
            place = promptcap.choose(answer, row.choices)
            line |= {"choice": place, "choice_text": row.choices[place]}
            if row.answers:
                correct.append(row.choices[place] in row.answers)
        lines.append(line)
    report = {
        "method": dataclasses.asdict(config),
        "language_model": model.describe(),
        "num_questions": len(rows),
        "num_answered": len(answered),
        "scores": accuracy_summary([answer for _, answer in answered], [row.answers for row, _ in answered]),
    }
    if correct:
        report["scores"]["choice_accuracy"] = sum(correct) / len(correct)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / ANSWERS_FILE, lines)
    write_json(folder / REPORT_FILE, report)
    return report
