# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks: generate answers, score them, and report baselines beside each metric.

Metrics have two baselines: `blind` is the same model with a blank image and no tags, asked at the end of training and
where it is wanted; `majority` is the best constant answer, estimated on training examples. A model that takes tags is
also run without them (`untagged`), and, beside `blind`, with tags but a blank image (`tags_alone`). A model with a
region head is also run with teacher forcing (`teacher_forced`), as in NExT-Chat's evaluation (arXiv 2311.04498): boxes
are predicted at the true answer's tokens.

Written into the run folder: `evaluation/NAME.jsonl` with every answer (format: `report.html`), and the metrics in
`report.json`.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lionjax.core import sharding
from lionjax.core.config import to_json
from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.files import read_record, take_record, write_atomic, write_json, write_jsonl
from lionjax.core.journal import Journal
from lionjax.core.types import UserError
from lionjax.data import images, pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import open_split
from lionjax.data.rle import encode_rle
from lionjax.data.samples import Sample
from lionjax.data.scenes.tasks import MASK_TASKS
from lionjax.evaluation import asking, tasks
from lionjax.evaluation.asking import TAG_ABLATION_TASKS, Inquiry, answer_questions, encode_samples
from lionjax.evaluation.report.html import GALLERY_SIZE
from lionjax.evaluation.summary import metrics_by_kind, summarize_scores
from lionjax.evaluation.tasks import SCORERS, TaskScores, benchmark_task
from lionjax.evaluation.trained_records import TrainedRecords
from lionjax.inference import engine
from lionjax.inference.engine import Answer, InferenceEngine

log = logging.getLogger(__name__)

__all__ = ("TAG_ABLATION_TASKS", "benchmark_task", "encode_samples")

MAX_LISTED = 20  # names of records that are left out
MAX_TRAIN_EXAMPLES = 200  # training examples for the majority baseline
MAX_IMAGE_SIDE = 640  # pixels; saved images are downscaled to this longer side
VARIANTS = ("answers", "blind", "untagged", "tags_alone", "teacher_forced")


def trained_benchmarks(experiment: Experiment) -> list[str]:
    """The benchmarks of the tasks that any stage of an experiment trains, in the order of SCORERS."""
    trained = [name.rpartition("/")[2] for stage in experiment.stages for name, weight in stage.mixture if weight]
    # Prompt kinds ("@plain") and shots ("+2") are training settings; benchmarks use the prompt template.
    trained = [re.sub(r"@(plain|told)$", "", re.sub(r"\+\d+", "", name)) for name in trained]
    names = dict.fromkeys(sorted(trained))
    return [name for task in SCORERS for name in names if name.partition("@")[0] == task]


def available_benchmarks(sources: Iterable[Any], split: str) -> list[str]:
    """The benchmarks for which at least one of the sources has questions."""
    sizes_by_source = [open_split(source, split, images.MAX_PIXELS).task_sizes for source in sources]
    return [task for task in SCORERS if any(task in task_sizes for task_sizes in sizes_by_source)]


def model_benchmarks(model: Any, split: str = "heldout", source: Any = None) -> list[str]:
    """The benchmarks available in `source`; by default those of the data of a `Model` that it was trained on."""
    sources = model.experiment.data.sources if source is None else (source,)
    available = available_benchmarks(sources, split)
    trained = trained_benchmarks(model.experiment) if source is None else []
    names = [name for name in trained if benchmark_task(name) in available] or available
    return [name for name in names if (name == "detect") == model.engine.model.info.detects_phrases]


def evaluate_model(
    model: Any,
    benchmark: str,
    folder: str | Path | None = None,
    limit: int | None = None,
    split: str = "heldout",
    source: Any = None,
    with_blind: bool = False,
    num_workers: int | None = 0,
) -> dict[str, Any]:
    """The metrics and baselines of one benchmark for a `Model`; see `evaluate`.

    `source` replaces the data of the model's own experiment. With `folder`, every answer is written there.
    `with_blind`: also ask with a blank image. `num_workers`: processes that read images ahead, which import the main
    module; 0: threads, None: by the CPU cores and the number of questions.
    """
    data, label = model.experiment.data, ""
    if source is not None:  # external annotation files often miss some images
        data = dataclasses.replace(data, sources=(source,), on_bad_record="replace")
        label = benchmark_label(f"{source.name}_{benchmark}")
    output_folder = None if folder is None else Path(folder)
    generation_config = model.experiment.generation
    arguments = (data, generation_config, benchmark, output_folder, limit, split, label, model.updates)
    options = {"with_blind": with_blind, "num_workers": num_workers}
    return evaluate(model.engine, *arguments, train_data=model.experiment.data, **options)


def evaluate_run(inference_engine: InferenceEngine, experiment: Experiment, folder: Path, updates: int) -> list[dict]:
    """Run the benchmarks of an experiment's tasks at the end of its run, except those already in its folder."""
    limit = experiment.run.evaluate_limit
    entries = evaluate_all(inference_engine, experiment, trained_benchmarks(experiment), folder, limit, updates=updates)
    return list(entries.values())


def evaluate_all(
    inference_engine: InferenceEngine,
    experiment: Experiment,
    benchmarks: Iterable[str],
    folder: Path,
    limit: int | None = None,
    split: str = "heldout",
    updates: int | None = None,
) -> dict[str, dict]:
    """{benchmark: result of `evaluate`} for several benchmarks on the experiment's own data.

    Results in the folder's report.json with the same `updates`, `limit` and `split` are reused; a benchmark that the
    data does not have is skipped with a warning. With several processes, all must call this; they share each batch.
    """
    benchmarks = list(benchmarks)
    recorded = read_record(folder / "report.json").get("evaluation", {})
    settings = {"limit": limit, "split": split, "updates": updates}
    recorded_entries = [recorded.get(benchmark_label(name), {}) for name in benchmarks]
    is_recorded = [
        updates is not None and settings == {key: entry.get(key) for key in settings} for entry in recorded_entries
    ]
    if jax.process_count() > 1:  # on a shared file system, processes may see the folder at different times
        is_recorded = multihost_utils.broadcast_one_to_all(np.array(is_recorded, bool))
    entries = {}
    for name, is_done, entry in zip(benchmarks, is_recorded, recorded_entries):
        if is_done:
            entries[name] = entry
            continue
        try:
            arguments = (experiment.data, experiment.generation, name, folder, limit, split)
            options = {"updates": updates, "num_workers": experiment.data.num_workers}
            entries[name] = evaluate(inference_engine, *arguments, **options)
        except UserError as error:
            log.warning("benchmark %s is skipped: %s", name, error)
    return entries


def evaluate(
    inference_engine: InferenceEngine,
    data: DataConfig,
    generation_config: GenerationDefaults,
    benchmark: str,
    folder: Path | None = None,
    limit: int | None = None,
    split: str = "heldout",
    label: str = "",
    updates: int | None = None,
    few_shot: Any = None,
    train_data: DataConfig | None = None,
    with_blind: bool = True,
    num_workers: int | None = 0,
) -> dict[str, Any]:
    """Run one benchmark: a dict with `metrics`, `intervals` (95 % bootstrap), baselines, and `details`, for JSON.

    `benchmark` is a task of a source of `data`, such as "vqa", or "coco/vqa" for one source's. `limit` is the maximum
    number of questions. `few_shot` (a `FewShot`) adds examples before each question. `label` names metrics and files,
    by default after the benchmark. With `folder`, answers and metrics are written there. `train_data`: what the
    model was trained on (default: `data`); `trained_on` counts the questions about its records. `with_blind`: also ask
    with a blank image. With `folder`, a run that was killed goes on where it stopped. `num_workers`: see `Inquiry`.
    Raises UserError for an unknown benchmark, for unreadable records, and for a journal of another model.
    """
    task, label, start_time = benchmark_task(benchmark), label or benchmark_label(benchmark), time.perf_counter()
    writes = folder is not None and jax.process_index() == 0  # only the main process writes answers and figures
    skipped: dict[str, UserError] = {}
    inquiry = Inquiry(data, benchmark, split, limit, few_shot, with_blind, skipped.setdefault, num_workers=num_workers)
    journal = None
    if writes and few_shot is None:
        path = folder / "evaluation" / f"{label}.journal.jsonl"
        asked = {"data": to_json(data), "benchmark": benchmark, "split": split}
        settings = {"generation setting": dataclasses.asdict(generation_config), "set of questions": asked}
        journal = asking.open_journal(path, inference_engine, settings)
    trained = TrainedRecords(data, split, train_data or data)
    answered = ask_all(inference_engine, generation_config, inquiry, journal, trained, folder)
    folder = folder if writes else None
    in_order = [answered[position] for position in sorted(answered)]
    examples, records = ([entry[k] for entry in in_order] for k in (0, 1))
    true_masks = [mask for *_, mask in in_order if mask is not None]
    names = [name for name in VARIANTS if in_order and name in in_order[0][2]]
    predictions: dict[str, list[Answer]] = {name: [found[name] for _, _, found, _ in in_order] for name in names}
    if not examples:
        raise UserError(f"{benchmark!r} has no usable question; see the warnings above and check the data")
    log.info("%s: %d questions", label, len(examples))
    train = train_examples(data, benchmark)
    if train:
        predictions["majority"] = list(map(prediction_from_text, tasks.constant_answers(task, train, examples)))
    scores, texts, masks = score_variants(task, examples, predictions, true_masks)
    entry = {"benchmark": label, "task": task, "split": split, "limit": limit, "updates": updates}
    entry |= trained.summary(label)
    if left_out := inquiry.count() - len(examples):
        names = list(skipped)
        entry["left_out"] = {"questions": left_out, "records": len(names), "names": names[:MAX_LISTED]}
    entry |= {"samples": len(examples), "seconds": round(time.perf_counter() - start_time, 3)}
    entry |= summarize_scores(label.removesuffix(task), scores)
    if task in tasks.PER_KIND_TASKS:
        entry["kinds"] = metrics_by_kind(task, examples, texts)
    if task == "rec" and train:
        entry["details"]["random_box"] = tasks.random_box_accuracy(train, examples)
    if folder is not None:
        results = result_records(records, predictions, scores["answers"], true_masks, masks)
        path = folder / "evaluation" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, results)
        update_report(folder, entry, inference_engine)
    if journal is not None:
        journal.delete()  # its answers are in NAME.jsonl
    return entry


def score_variants(
    task: str, examples: Sequence[Any], predictions: Mapping[str, Sequence[Answer]], true_masks: Sequence[Mapping]
) -> tuple[dict[str, TaskScores], dict[str, list[str]], dict[str, list]]:
    """{variant: scores}, {variant: texts} and, for res, {variant: masks} of the predictions."""
    texts = {variant: [answer.text for answer in answers] for variant, answers in predictions.items()}
    masks = {}
    if true_masks:
        masks = {variant: predicted_masks(answers, true_masks) for variant, answers in predictions.items()}
    scores = {
        variant: SCORERS[task](true_masks, masks[variant]) if true_masks else SCORERS[task](examples, variant_texts)
        for variant, variant_texts in texts.items()
    }
    return scores, texts, masks


def ask_all(
    inference_engine: InferenceEngine,
    generation_config: GenerationDefaults,
    inquiry: Inquiry,
    journal: Journal | None,
    trained: TrainedRecords,
    folder: Path | None,
) -> dict[int, tuple]:
    """{position: (example, fields of its line, {variant: Answer}, mask or None)} of the questions that are answered.

    `trained` counts them. With `folder`, images of the gallery are written there. With a mesh of its own on each host,
    processes share the questions; else they answer each batch together.
    """
    is_shared = jax.process_count() > 1 and not inference_engine.mesh.is_multi_process
    if is_shared:
        skipped: dict[str, UserError] = {}
        part = (jax.process_index(), jax.process_count())
        inquiry, on_skip = dataclasses.replace(inquiry, part=part, on_skip=skipped.setdefault), inquiry.on_skip
    image_folder = None
    if folder is not None and (is_shared or jax.process_index() == 0):
        image_folder = folder / "evaluation" / "pictures"
    is_segmentation = benchmark_task(inquiry.benchmark) in MASK_TASKS
    answered: dict[int, tuple] = {}
    for sample, predictions in answer_questions(inference_engine, generation_config, inquiry, journal):
        in_gallery = sample.position < GALLERY_SIZE and image_folder is not None
        image_field = {"image": f"pictures/{save_image(sample, image_folder)}"} if in_gallery else {}
        mask = encode_rle(sample.masks().any(axis=0)) if is_segmentation else None
        answered[sample.position] = (sample.example, question_record(sample) | image_field, predictions, mask)
        trained.add(sample)
    if is_shared:
        parts = sharding.gather_objects((answered, trained.counts, skipped))
        answered = {position: entry for some, _, _ in parts for position, entry in some.items()}
        trained.counts = [sum(values) for values in zip(*(counts for _, counts, _ in parts))]
        for name, error in (item for _, _, some in parts for item in some.items()):
            on_skip(name, error)
    return answered


def benchmark_label(benchmark: str) -> str:
    """The name of a benchmark's metrics and files: "coco/rec" becomes coco_rec, "rec@digits" digits_rec."""
    source_task, _, box_format = benchmark.partition("@")
    source, _, task = source_task.rpartition("/")
    return re.sub(r"\W+", "_", "_".join(filter(None, (source, box_format, task))))


def prediction_from_text(text: str) -> Answer:
    """A text answer with the boxes that its text holds."""
    return Answer(text, engine.extract_boxes(text))


def question_record(sample: Sample) -> dict[str, Any]:
    """The question's fields of a line of NAME.jsonl, with all accepted answers, so that it can be scored again."""
    example = sample.example
    truth = {"truth": list(example.answers), "truth_boxes": [list(box) for box in example.boxes]}
    about = {"kind": example.kind, "record": sample.name, "tags": list(example.tags)}
    boxes = {"question_boxes": [list(box) for box in example.question_boxes]}
    return {"question": example.question, "history": list(map(list, example.history))} | truth | about | boxes


def result_records(
    questions: Sequence[Mapping],
    predictions: Mapping[str, Sequence[Answer]],
    scores: TaskScores,
    true_masks: Sequence[Mapping] = (),
    masks: Mapping[str, Sequence[Mapping | None]] | None = None,
) -> Iterator[dict]:
    """Yields the lines of NAME.jsonl: question fields, predictions, and for res masks, without empty fields."""
    for index, row in enumerate(questions):
        texts = {variant: answers[index].text for variant, answers in predictions.items()}
        prediction = texts.pop("answers")
        score = {} if scores.sample_scores is None else {"score": round(scores.sample_scores[index], 4)}
        boxes = np.asarray(predictions["answers"][index].boxes).round(4).tolist()
        record = {"prediction": prediction, "boxes": boxes} | row | texts
        if true_masks:
            record["truth_masks"] = [true_masks[index]]
            for variant, variant_masks in masks.items():
                field = "masks" if variant == "answers" else f"{variant}_masks"
                record[field] = [variant_masks[index]] if variant_masks[index] is not None else []
        yield {key: value for key, value in record.items() if value != []} | score


def predicted_masks(predictions: Sequence[Answer], true_masks: Sequence[Mapping]) -> list[dict[str, Any] | None]:
    """The mask of each answer as RLE; None if it has no mask or several, as in NExT-Chat's evaluation.

    For predictions without masks (the majority baseline), the first box, filled.
    """
    rles = []
    for prediction, true_mask in zip(predictions, true_masks):
        if prediction.masks is not None:
            rles.append(encode_rle(prediction.masks[0]) if len(prediction.masks) == 1 else None)
            continue
        mask_HW = np.zeros(true_mask["size"], bool)
        for x0, y0, x1, y1 in np.asarray(prediction.boxes)[:1] * (true_mask["size"][::-1] * 2):
            mask_HW[round(y0) : round(y1), round(x0) : round(x1)] = True
        rles.append(encode_rle(mask_HW) if len(prediction.boxes) else None)
    return rles


def save_image(sample: Sample, folder: Path) -> str:
    """Write a sample's image as a PNG of at most MAX_IMAGE_SIDE pixels; returns the file name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", sample.name) + ".png"
    if not (folder / name).is_file():
        image = images.to_pil_image(sample.image).copy()
        image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write_atomic(folder / name, buffer.getvalue())
    return name


def update_report(folder: Path, entry: Mapping[str, Any], inference_engine: InferenceEngine) -> None:
    """Merge a benchmark's metrics into report.json."""
    report = take_record(folder / "report.json")
    entry_keys = {"metrics": "metrics", "intervals": "intervals", "baselines": "blind", "majority": "majority"}
    for report_key, entry_key in entry_keys.items():
        report.setdefault(report_key, {}).update(entry.get(entry_key, {}))
    if "blind" not in entry:  # those of an earlier evaluation are not beside these figures
        for key in entry["metrics"]:
            report["baselines"].pop(key, None)
    for variant in ("untagged", "teacher_forced"):
        for key, value in entry.get(variant, {}).items():
            report["metrics"][f"{key}_{variant}"] = value
            if "blind" in entry:
                report["baselines"][f"{key}_{variant}"] = entry["blind"][key]
    report.setdefault("evaluation", {})[entry["benchmark"]] = dict(entry)
    if inference_engine.generation_seconds:
        rate = inference_engine.num_generated_tokens / inference_engine.generation_seconds
        report.setdefault("speed", {})["generated_tokens_per_second"] = rate
    write_json(folder / "report.json", report)


def train_examples(data: DataConfig, benchmark: str) -> list[Any]:
    """Training examples for the majority baseline; empty without a training split."""
    lenient = dataclasses.replace(data, on_bad_record="replace")
    try:
        return [sample.example for sample in pipeline.examples(lenient, benchmark, "train", MAX_TRAIN_EXAMPLES)]
    except UserError as error:
        log.warning("no majority baseline for %s: %s", benchmark, error)
        return []
