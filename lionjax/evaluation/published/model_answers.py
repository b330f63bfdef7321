# SPDX-License-Identifier: Apache-2.0
"""Ask a model the questions of a published benchmark under a protocol: generate, rank candidates, or P(yes).

The answers are written to DIR/evaluation/NAME_PROTOCOL.jsonl, which `lionjax evaluate --predictions` reads, and the
figures with the whole protocol to report.json under `published`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lionjax.core.config import to_json
from lionjax.core.errors import LongPromptError
from lionjax.core.files import take_record, write_atomic, write_json, write_jsonl
from lionjax.core.journal import Journal, journal_key
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo, make_example
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.question_file import OPTION_LETTERS, options_question
from lionjax.data.prefetch import map_ahead
from lionjax.data.rle import encode_rle
from lionjax.evaluation.asking import READING_THREADS, open_journal
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published import question_scores, scoring
from lionjax.evaluation.published.predictions import AnsweredQuestion, Answers
from lionjax.evaluation.submissions import write_submission

log = logging.getLogger(__name__)

MAX_OCR_TOKENS = 30  # of InstructBLIP's prompt (LAVIS)
BATCH_SIZE = 256  # prompts at once, which are answered in slots
RIGHT_SCORE = 0.5  # of an answer that counts as right in the gallery
NUM_PICTURES = 12  # right and wrong answers each of whose picture a copy is kept
PICTURE_SIDE = 320  # pixels of the longer side of these copies
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
    label: str = "",
    blind: bool = False,
    source_path: str = "",
) -> dict[str, Any]:
    """The result of a model on a benchmark, as `scoring.score_predictions` gives it for given answers.

    `limit`: the first questions only. With `folder`, answers and figures are written there, and `submission` is the
    file for the benchmark's server. `label` names both (default: the benchmark's name), `source_path` is recorded.
    Beside the figures are `interval`, `majority` and `seconds`, and with `blind` the main figure of the same model with
    blank images. Judged benchmarks have their answers written, and figures once their replies or ratings are given as
    predictions. With `folder`, a run that was killed goes on with the batch of questions in which it stopped. Raises
    UserError if no question has its picture, and for a journal of another model.
    """
    name = scoring.benchmark_name(benchmark)
    dataset, label, start = scoring.open_benchmark(name, source, split), label or name, time.perf_counter()
    journal = None
    if folder is not None:
        path = folder / "evaluation" / f"{_file_stem(label, protocol.name)}.journal.jsonl"
        asked = {"benchmark": name, "split": split, "source": to_json(source)}
        generation = dataclasses.asdict(generation_config(model, protocol, "image_level"))
        settings = {"protocol": protocol.to_json(), "generation setting": generation, "set of questions": asked}
        journal = open_journal(path, model.engine, settings)
    answers, missing, too_long = predict(model, name, protocol, dataset, limit, journal=journal)
    seconds = time.perf_counter() - start
    if submission:
        write_submission(name, Path(submission), protocol, dataset, answers, source)
    has_truth = name not in scoring.JUDGED and any(scoring.is_public(row, name) for row in answers.rows)
    entry = scoring.score_answers(name, protocol, dataset, answers, has_truth)
    entry |= {"label": label, "split": split, "limit": limit, "updates": model.updates, "seconds": round(seconds, 3)}
    entry["source"] = source_path
    # What released weights were trained on is not recorded with them.
    is_known = bool(model.experiment.stages)
    entry["trained_on_train_split"] = reads_same_files(source, model.experiment.data.sources) if is_known else None
    entry["missing_pictures"] = {"count": len(missing), "names": missing[: scoring.MAX_LISTED]}
    entry["long_prompts"] = {"count": len(too_long), "names": too_long[: scoring.MAX_LISTED]}
    scores = None
    if has_truth:
        rows = scoring.sized_rows(name, dataset, answers.rows)
        scores = question_scores.question_scores(name, protocol, rows)
        entry["interval"] = question_scores.interval(name, protocol, rows, scores)
        entry["majority"] = question_scores.majority(name, protocol, rows)
    if has_truth and blind:
        blank_answers, _, _ = predict(model, name, protocol, dataset, limit, blind=True, journal=journal)
        blank_entry = scoring.score_answers(name, protocol, dataset, blank_answers)
        entry["blind"] = {"value": blank_entry["main_figure"]["value"]}
    if folder is not None:
        write_results(folder, name, protocol, dataset, answers, scores, entry)
    if journal is not None:
        journal.delete()  # its answers are in the file of results
    return entry


def write_results(
    folder: Path,
    name: str,
    protocol: Protocol,
    dataset: AnnotatedImages,
    answers: Answers,
    scores: Sequence[float] | None,
    entry: dict[str, Any],
) -> None:
    """Write the answers to evaluation/LABEL_PROTOCOL.jsonl, some of their pictures, and the entry to report.json.

    The first answers that are right and the first that are not have a copy of their picture (`picture_copy`).
    """
    stem = result_stem(entry)
    path = folder / "evaluation" / f"{stem}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, counts = [], {}
    for index, row in enumerate(scoring.sized_rows(name, dataset, answers.rows)):
        record = answer_record(name, row)
        if entry["main_figure"] is not None:
            record |= {"truth": list(row.annotation.answers)} | question_scores.answer_overlays(name, protocol, row)
        if scores is not None:
            record["score"] = scores[index]
        mark = None if scores is None else scores[index] >= RIGHT_SCORE
        counts[mark] = counts.get(mark, 0) + 1
        if counts[mark] <= NUM_PICTURES and row.image.name:
            file = Path("pictures") / f"{stem}_{index}.jpg"
            _save_picture(dataset.load_record(row.annotation.photo)[0], path.parent / file)
            record["picture_copy"] = str(file)
        rows.append(record)
    write_jsonl(path, rows)
    report = take_record(folder / "report.json")
    report.setdefault("published", {})[f"{entry['label']}@{protocol.name}"] = entry
    write_json(folder / "report.json", report)


def result_stem(entry: Mapping[str, Any]) -> str:
    """The name of the file of a result's answers, without suffix: LABEL_PROTOCOL."""
    return _file_stem(entry["label"], entry["protocol"])


def _file_stem(label: str, protocol: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", f"{label}_{protocol}")


def _save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as JPEG of at most `PICTURE_SIDE` pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small.save(buffer, "JPEG", quality=85)
    write_atomic(path, buffer.getvalue())


def reads_same_files(source: Any, trained: Iterable[Any]) -> bool:
    """Whether a source of the training data is of the benchmark's format: then its train split may have been seen.

    JSON Lines are of no benchmark by themselves (POPE is read as such): there the files must be the same.
    """
    return any(type(source) is type(other) and (type(source) is not JsonLines or source == other) for other in trained)


def predict(
    model: Any,
    name: str,
    protocol: Protocol,
    dataset: AnnotatedImages,
    limit: int | None = None,
    blind: bool = False,
    journal: Journal | None = None,
) -> tuple[Answers, list[str], list[str]]:
    """(answers to the questions of a benchmark in their order, names of missing pictures, ids with long prompts).

    `blind`: images are replaced by ones of the same size in the mean color, which normalizes to zero. Batches that
    `journal` has are not asked, and those that are asked are kept there.
    """
    benchmark = scoring.BENCHMARKS[name]
    annotations = [row for task in benchmark.tasks for row in dataset.annotations.get(task, ())]
    usable = [row for row in annotations if not row.problem and benchmark.wanted(row)][:limit]
    missing: dict[str, None] = {}
    rows: list[AnsweredQuestion] = []
    too_long: list[str] = []
    opened = _with_images(dataset, usable, missing)
    if blind:
        color = tuple(round(255 * value) for value in model.processor.config.image_mean)
        opened = ((row, info, Image.new("RGB", image.size, color)) for row, info, image in opened)
    while batch := list(itertools.islice(opened, BATCH_SIZE)):
        asked = [row for row, _, _ in batch], [image for _, _, image in batch]
        predictions = _recall_batch(journal, asked[0], blind)
        if predictions is None:
            predictions = predict_readable(model, name, protocol, *asked)
            _record_batch(journal, asked[0], blind, predictions)
        for (annotation, info, _), prediction in zip(batch, predictions):
            if prediction is None:
                too_long.append(annotation.question_id)
                continue
            segmentation = dataset.segmentations[annotation.regions[0]] if annotation.regions else None
            rows.append(AnsweredQuestion(annotation, info, prediction, segmentation))
    if missing:
        log.warning("%d pictures are missing or unreadable, such as %s", len(missing), next(iter(missing)))
    if too_long:
        most = model.processor.config.max_prompt_tokens
        log.warning("%d prompts have more than %d tokens, such as that of %s", len(too_long), most, too_long[0])
    if not rows and too_long:
        raise UserError(
            f"all prompts of {name} are too long for the model, which reads {most} tokens; raise "
            "processor.max_prompt_tokens or choose another benchmark"
        )
    if not rows:
        raise UserError(f"no question of {name} has its picture; give their folder with --images")
    answered = {id(row.annotation) for row in rows}
    unanswered = [row.question_id for row in usable if id(row) not in answered]
    return Answers(rows, unanswered, sum(bool(row.problem) for row in annotations)), list(missing), too_long


def _batch_key(annotations: Sequence[Annotation], blind: bool) -> str:
    """The key of a batch in the journal; it is asked as a whole, so that it is padded in the same way again."""
    asked = [[row.photo, row.question_id, row.question, row.words, row.choices, row.regions] for row in annotations]
    return f"{'blind' if blind else 'answers'} {journal_key({'questions': asked})}"


def _recall_batch(journal: Journal | None, annotations: Sequence[Annotation], blind: bool) -> list[Any] | None:
    """The predictions of a batch that the journal holds, None if it does not."""
    row = None if journal is None else journal.get(_batch_key(annotations, blind))
    return None if row is None else row["predictions"]


def _record_batch(
    journal: Journal | None, annotations: Sequence[Annotation], blind: bool, predictions: list[Any]
) -> None:
    if journal is not None:
        journal.add(_batch_key(annotations, blind), {"predictions": predictions})


def _with_images(
    dataset: AnnotatedImages, annotations: Sequence[Annotation], missing: dict[str, None]
) -> Iterator[tuple[Annotation, ImageInfo, Any]]:
    """Yields (question, image info, image); the names of pictures that cannot be read go to `missing`."""
    photos, pool = (annotation.photo for annotation in annotations), ThreadPoolExecutor(READING_THREADS)
    for annotation, future in zip(annotations, map_ahead(dataset.load_record, photos, pool, 2 * READING_THREADS)):
        try:
            image, info = future.result()
        except UserError:
            missing[dataset.record_name(annotation.photo)] = None
        else:
            yield annotation, info, image


def predict_readable(
    model: Any, name: str, protocol: Protocol, annotations: Sequence[Annotation], images: Sequence[Any]
) -> list[Any]:
    """As `predict_batch`, with None for each question whose prompt is longer than the model reads."""
    try:
        return predict_batch(model, name, protocol, annotations, images)
    except LongPromptError:
        if len(annotations) == 1:
            return [None]
    half = len(annotations) // 2
    parts = [(annotations[:half], images[:half]), (annotations[half:], images[half:])]
    return [prediction for part in parts for prediction in predict_readable(model, name, protocol, *part)]


def predict_batch(
    model: Any, name: str, protocol: Protocol, annotations: Sequence[Annotation], images: Sequence[Any]
) -> list[Any]:
    """The predictions of one batch of questions, in the form that the benchmark's scorer takes."""
    if name == "flickr30k_entities":
        return phrase_boxes(model, protocol, annotations, images)
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


def phrase_boxes(
    model: Any, protocol: Protocol, annotations: Sequence[Annotation], images: Sequence[Any]
) -> list[dict[str, Any]]:
    """For each sentence of Flickr30k Entities the boxes, in pixels, of the answer to each of its phrases, in order."""
    config = generation_config(model, protocol, "region_level")
    asked = [(k, phrase) for k, annotation in enumerate(annotations) for phrase in annotation.facts["phrases"]]
    prompts = [protocol.prompt.format(before=phrase["before"], phrase=phrase["text"]) for _, phrase in asked]
    repeated = [images[k] for k, _ in asked]
    answers = model.answer(repeated, prompts, category="region_level", generation_config=config)
    found: list[dict[str, Any]] = [{"boxes": []} for _ in annotations]
    for (k, _), image, answer in zip(asked, repeated, answers):
        sides = np.array([image.width, image.height] * 2)
        found[k]["boxes"].append((np.asarray(answer.boxes).reshape(-1, 4) * sides).tolist())
    return found


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
    lettered, words = list(zip(OPTION_LETTERS, choices)), facts.get("ocr_tokens")
    prompt = protocol.prompt
    if protocol.sentence_prompt and annotation.kind == "long":
        prompt = protocol.sentence_prompt
    elif protocol.ocr_prompt and words is not None:
        prompt = protocol.ocr_prompt
    return prompt.format(
        question=question,
        hint=hint,
        history=history,
        statement=facts.get("statement", ""),
        text=facts.get("text", ""),
        expr="{box}" if annotation.question_boxes else annotation.words,
        options="\n".join(f"{letter}. {text}" for letter, text in lettered),
        options_lines=options_question(question, choices, hint),
        options_round=" ".join(f"({letter.lower()}) {text}" for letter, text in lettered),
        ocr_tokens=", ".join(words or ()),
        first_ocr_tokens=", ".join((words or [])[:MAX_OCR_TOKENS]),
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
