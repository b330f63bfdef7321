# SPDX-License-Identifier: Apache-2.0
"""Ask a model the questions of a published benchmark under a protocol: generate, rank candidates, or P(yes).

The answers are written to DIR/evaluation/NAME_PROTOCOL.jsonl, which `lionjax evaluate --predictions` reads, and the
figures with the whole protocol to report.json under `published`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.files import take_record, write_json, write_jsonl
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo, make_example
from lionjax.data.datasets.question_file import OPTION_LETTERS, options_question
from lionjax.data.rle import encode_rle
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published import scoring
from lionjax.evaluation.published.predictions import AnsweredQuestion, Answers
from lionjax.evaluation.submissions import write_submission

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # prompts at once
REGION_BENCHMARKS = ("rec", "res", "reason_seg", "reg")
YES_NO = ("yes", "no")
TRUE_FALSE = (("yes", "true"), ("no", "false"))


def evaluate_model(
    model: Any,
    benchmark: str,
    source: Any,
    protocol: Protocol,
    split: str = "heldout",
    limit: int | None = None,
    folder: Path | None = None,
    submission: str = "",
) -> dict[str, Any]:
    """The result of a model on a benchmark, as `scoring.score_predictions` gives it for given answers.

    `limit`: the first questions only. With `folder`, answers and figures are written there, and `submission` is the
    file for the benchmark's server. Judged benchmarks have
    their answers written, and figures once their replies or ratings are given as predictions. Raises UserError for a
    benchmark that is not asked as a whole (Flickr30k Entities), and if no question has its picture.
    """
    name = scoring.benchmark_name(benchmark)
    if name == "flickr30k_entities":
        raise UserError(f"{name} asks for a box after each phrase; score such answers with --predictions")
    dataset = scoring.open_benchmark(name, source, split)
    answers, missing = predict(model, name, protocol, dataset, limit)
    rows = [answer_record(name, row) for row in answers.rows]
    if folder is not None:
        path = folder / "evaluation" / f"{name}_{protocol.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
    if submission:
        write_submission(name, Path(submission), protocol, dataset, answers, source)
    has_truth = name not in scoring.JUDGED and any(scoring.is_public(row, name) for row in answers.rows)
    entry = scoring.score_answers(name, protocol, dataset, answers, has_truth)
    entry |= {"split": split, "limit": limit, "updates": model.updates}
    entry["trained_on_train_split"] = reads_same_files(source, model.experiment.data.sources)
    entry["missing_pictures"] = {"count": len(missing), "names": missing[: scoring.MAX_LISTED]}
    if folder is not None:
        report = take_record(folder / "report.json")
        report.setdefault("published", {})[f"{name}@{protocol.name}"] = entry
        write_json(folder / "report.json", report)
    return entry


def reads_same_files(source: Any, trained: Iterable[Any]) -> bool:
    """Whether a source of the training data is of the benchmark's format: then its train split may have been seen."""
    return any(type(source) is type(other) for other in trained)


def predict(
    model: Any, name: str, protocol: Protocol, dataset: AnnotatedImages, limit: int | None = None
) -> tuple[Answers, list[str]]:
    """(answers of a model to the questions of a benchmark in their order, names of missing pictures)."""
    benchmark = scoring.BENCHMARKS[name]
    annotations = [row for task in benchmark.tasks for row in dataset.annotations.get(task, ())]
    usable = [row for row in annotations if not row.problem and benchmark.wanted(row)][:limit]
    missing: dict[str, None] = {}
    rows: list[AnsweredQuestion] = []
    opened = _with_images(dataset, usable, missing)
    while batch := list(itertools.islice(opened, BATCH_SIZE)):
        predictions = predict_batch(
            model, name, protocol, [row for row, _, _ in batch], [image for _, _, image in batch]
        )
        for (annotation, info, _), prediction in zip(batch, predictions):
            segmentation = dataset.segmentations[annotation.regions[0]] if annotation.regions else None
            rows.append(AnsweredQuestion(annotation, info, prediction, segmentation))
    if missing:
        log.warning("%d pictures are missing or unreadable, such as %s", len(missing), next(iter(missing)))
    if not rows:
        raise UserError(f"no question of {name} has its picture; give their folder with --images")
    answered = {id(row.annotation) for row in rows}
    unanswered = [row.question_id for row in usable if id(row) not in answered]
    return Answers(rows, unanswered, sum(bool(row.problem) for row in annotations)), list(missing)


def _with_images(
    dataset: AnnotatedImages, annotations: Sequence[Annotation], missing: dict[str, None]
) -> Iterator[tuple[Annotation, ImageInfo, Any]]:
    """Yields (question, image info, image); the names of pictures that cannot be read go to `missing`."""
    for annotation in annotations:
        try:
            image, info = dataset.load_record(annotation.photo)
        except UserError:
            missing[dataset.record_name(annotation.photo)] = None
        else:
            yield annotation, info, image


def predict_batch(
    model: Any, name: str, protocol: Protocol, annotations: Sequence[Annotation], images: Sequence[Any]
) -> list[Any]:
    """The predictions of one batch of questions, in the form that the benchmark's scorer takes."""
    prompts = [format_prompt(protocol, annotation) for annotation in annotations]
    if protocol.answer_form == "generate":
        return generate(model, name, protocol, annotations, images, prompts)
    if protocol.answer_form == "yes_probability":
        losses = model.candidate_losses(images, prompts, [YES_NO] * len(prompts))
        return [{"proba": float(1 / (1 + np.exp(np.clip(yes - no, -500, 500))))} for yes, no in losses]
    candidates = [candidate_answers(name, annotation) for annotation in annotations]
    losses = model.candidate_losses(images, prompts, candidates, mean=protocol.answer_form == "rank_mean")
    return [ranked_prediction(name, losses_K) for losses_K in losses]


def generate(
    model: Any,
    name: str,
    protocol: Protocol,
    annotations: Sequence[Annotation],
    images: Sequence[Any],
    prompts: Sequence[str],
) -> list[Any]:
    """Generated texts, or for masks the mask of each answer in run lengths."""
    category = "region_level" if name in REGION_BENCHMARKS else "image_level"
    config = generation_config(model, protocol, category)
    sizes = [(image.width, image.height) for image in images]
    boxes = None
    if name == "reg":
        infos = [ImageInfo("", *map(float, size)) for size in sizes]
        boxes = [
            [make_example("reg", row, info, np.random.default_rng(0)).question_boxes[0]]
            for row, info in zip(annotations, infos)
        ]
    answers = model.answer(images, prompts, boxes=boxes, category=category, generation_config=config)
    if name not in ("res", "reason_seg"):
        return [answer.text for answer in answers]
    masks = [answer.masks for answer in answers]
    return [{"mask": encode_rle(found[0]) if found is not None and len(found) == 1 else None} for found in masks]


def generation_config(model: Any, protocol: Protocol, category: str) -> Any:
    """The model's settings with the length, the beams and the length penalty of a protocol; greedy or beam search."""
    config = model.generation_config(category)
    start = config.decoder_start_token_id is not None
    fields = {"max_new_tokens": protocol.max_new_tokens, "num_beams": protocol.num_beams, "do_sample": False}
    fields |= {"length_penalty": protocol.length_penalty}
    minimum = min(protocol.min_new_tokens, protocol.max_new_tokens)
    return dataclasses.replace(config, **fields, min_length=minimum + start if minimum else 0)


def format_prompt(protocol: Protocol, annotation: Annotation) -> str:
    """The question of a protocol about one annotation."""
    facts, choices = annotation.facts, annotation.choices
    question, hint = facts.get("question", annotation.question), facts.get("hint", "")
    history = " ".join(f"q: {asked} a: {answer}" for asked, answer in annotation.turns)
    lettered = list(zip(OPTION_LETTERS, choices))
    return protocol.prompt.format(
        question=question,
        hint=hint,
        history=history,
        statement=facts.get("statement", ""),
        text=facts.get("text", ""),
        expr="{box}" if annotation.question_boxes else annotation.words,
        options="\n".join(f"{letter}. {text}" for letter, text in lettered),
        options_lines=options_question(question, choices, hint),
        options_round=" ".join(f"({letter.lower()}) {text}" for letter, text in lettered),
    )


def candidate_answers(name: str, annotation: Annotation) -> list[str]:
    """The answers that are ranked: the options, or for VSR the words of both classes."""
    return [word for group in TRUE_FALSE for word in group] if name == "vsr" else list(annotation.choices)


def ranked_prediction(name: str, losses_K: np.ndarray) -> Any:
    """The prediction of ranked candidates: scores (VisDial), yes or no (VSR), an index (IconQA), or a letter."""
    best = int(np.argmin(losses_K))
    if name == "visdial":
        return {"scores": (-losses_K).tolist()}
    if name == "vsr":
        return YES_NO[best // len(TRUE_FALSE[0])]
    return best if name == "iconqa" else OPTION_LETTERS[best]


def answer_record(name: str, row: AnsweredQuestion) -> dict[str, Any]:
    """One line of the answer file: id, question, truth and prediction."""
    prediction = row.prediction if isinstance(row.prediction, dict) else {"answer": row.prediction}
    question = row.annotation.question or row.annotation.words
    ids = {"question_id": row.annotation.question_id} if row.annotation.question_id else {}
    return ids | {"question": question, "picture": row.image.name, **json.loads(json.dumps(prediction))}
