# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks: generate answers, score them, and report baselines beside each metric.

Every metric has two baselines: `blind` is the same model with a blank image and no tags; `majority` is the best
constant answer, estimated on training examples. A model that takes tags is also run without them (`untagged`), and with
tags but a blank image (`tags_alone`). A model with a region head is also run with teacher forcing (`teacher_forced`),
as in NExT-Chat's evaluation (arXiv 2311.04498): boxes are predicted at the true answer's tokens.

Written into the run folder: `evaluation/NAME.jsonl` with every answer (format: `report.html`), and the metrics in
`report.json`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
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

from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.files import read_record, take_record, write_atomic, write_json, write_jsonl
from lionjax.core.types import UserError
from lionjax.data import images, pipeline
from lionjax.data.boxes import join_text_and_boxes, split_text_and_boxes
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import open_split
from lionjax.data.mixture import Sample
from lionjax.data.processor import Processor
from lionjax.data.rle import encode_rle
from lionjax.data.scenes.tasks import MASK_TASKS
from lionjax.evaluation import tasks
from lionjax.evaluation.detection import detect_answers
from lionjax.evaluation.report.html import GALLERY_SIZE
from lionjax.evaluation.retrieval import retrieval_batches
from lionjax.evaluation.summary import metrics_by_kind, summarize_scores
from lionjax.evaluation.tasks import SCORERS, TaskScores
from lionjax.evaluation.trained_records import TrainedRecords
from lionjax.inference import detector, engine
from lionjax.inference.engine import Answer, InferenceEngine

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # questions per batch
MAX_TRAIN_EXAMPLES = 200  # training examples for the majority baseline
MIN_PADDED_LENGTH = 128  # tokens; prompts and questions are padded to this length, or to the model's maximum if shorter
MAX_IMAGE_SIDE = 640  # pixels; saved images are downscaled to this longer side
TAG_ABLATION_TASKS = ("vqa", "existence", "caption")  # run with and without tags
TEACHER_FORCED_TASKS = ("rec", "grounded")  # also run with teacher forcing, for models with a region head


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
) -> dict[str, Any]:
    """The metrics and baselines of one benchmark for a `Model`; see `evaluate`.

    `source` replaces the data of the model's own experiment. With `folder`, every answer is written there.
    """
    data, label = model.experiment.data, ""
    if source is not None:  # external annotation files often miss some images
        data = dataclasses.replace(data, sources=(source,), on_bad_record="replace")
        label = benchmark_label(f"{source.name}_{benchmark}")
    output_folder = None if folder is None else Path(folder)
    generation_config = model.experiment.generation
    arguments = (data, generation_config, benchmark, output_folder, limit, split, label, model.updates)
    return evaluate(model.engine, *arguments, train_data=model.experiment.data)


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
            data, generation_config = experiment.data, experiment.generation
            entries[name] = evaluate(
                inference_engine, data, generation_config, name, folder, limit, split, updates=updates
            )
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
) -> dict[str, Any]:
    """Run one benchmark: a dict with `metrics`, `intervals` (95 % bootstrap), baselines, and `details`, for JSON.

    `benchmark` is a task of a source of `data`, such as "vqa", or "coco/vqa" for one source's. `limit` is the maximum
    number of questions. `few_shot` (a `FewShot`) adds examples before each question. `label` names metrics and files,
    by default after the benchmark. With `folder`, answers and metrics are written there. `train_data`: what the
    model was trained on (default: `data`); `trained_on` counts the questions about its records. Raises UserError for
    an unknown benchmark, and for unreadable records.
    """
    task, label, start_time = benchmark_task(benchmark), label or benchmark_label(benchmark), time.perf_counter()
    folder = folder if jax.process_index() == 0 else None  # only the main process writes
    examples, predictions, records, true_masks = [], {}, [], []
    trained = TrainedRecords(data, split, train_data or data)
    image_folder = None if folder is None else folder / "evaluation" / "pictures"
    for samples, batch_predictions in run_batches(
        inference_engine, data, generation_config, benchmark, limit, split, few_shot
    ):
        for variant, variant_batch in batch_predictions.items():
            predictions.setdefault(variant, []).extend(variant_batch)
        for sample in samples:
            in_gallery = len(examples) < GALLERY_SIZE and image_folder is not None
            image_field = {"image": f"pictures/{save_image(sample, image_folder)}"} if in_gallery else {}
            records.append(question_record(sample) | image_field)
            examples.append(sample.example)
            trained.add(sample)
            true_masks += [encode_rle(sample.masks().any(axis=0))] if task in MASK_TASKS else []
    if not examples:
        raise UserError(f"{benchmark!r} has no usable question; see the warnings above and check the data")
    log.info("%s: %d questions", label, len(examples))
    train = train_examples(data, benchmark)
    if train:
        predictions["majority"] = list(map(prediction_from_text, tasks.constant_answers(task, train, examples)))
    texts = {variant: [answer.text for answer in answers] for variant, answers in predictions.items()}
    masks = {}
    if true_masks:
        masks = {variant: predicted_masks(answers, true_masks) for variant, answers in predictions.items()}
    scores = {
        variant: SCORERS[task](true_masks, masks[variant]) if true_masks else SCORERS[task](examples, variant_texts)
        for variant, variant_texts in texts.items()
    }
    entry = {"benchmark": label, "task": task, "split": split, "limit": limit, "updates": updates}
    entry |= trained.summary(label)
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
    return entry


def benchmark_task(benchmark: str) -> str:
    """The task of a benchmark: "coco/rec@digits" is "rec". Raises UserError for an unknown one."""
    task = benchmark.partition("@")[0].rpartition("/")[2]
    if task not in SCORERS:
        raise UserError(f"there is no benchmark {benchmark!r}; choose {', '.join(SCORERS)}, or all")
    return task


def benchmark_label(benchmark: str) -> str:
    """The name of a benchmark's metrics and files: "coco/rec" becomes coco_rec, "rec@digits" digits_rec."""
    source_task, _, box_format = benchmark.partition("@")
    source, _, task = source_task.rpartition("/")
    return re.sub(r"\W+", "_", "_".join(filter(None, (source, box_format, task))))


def run_batches(
    inference_engine: InferenceEngine,
    data: DataConfig,
    generation_config: GenerationDefaults,
    benchmark: str,
    limit: int | None,
    split: str,
    few_shot: Any = None,
) -> Iterator[tuple[list[Sample], dict[str, list[Answer]]]]:
    """Yields batches of samples with the predictions of each variant: "answers", "blind", and two more with tags.

    All batches of all benchmarks have one shape, so that only two programs are compiled: for short and long answers.
    """
    task, processor = benchmark_task(benchmark), inference_engine.processor
    if inference_engine.model.info.detects_phrases:
        yield from detect_batches(inference_engine, pipeline.examples(data, benchmark, split, limit))
        return
    if inference_engine.model.info.is_dual_encoder:
        yield from retrieval_batches(inference_engine, pipeline.examples(data, benchmark, split, limit))
        return
    tagged = processor.config.use_tags and task != "tags"  # in the tags task, tags would leak the answer
    with_text = tagged or processor.config.spatial_text_in_prompt
    variants = {"answers": (False, with_text), "blind": (True, False)}  # (image_blind, with tags and boxes as text)
    lengths = (processor.config.max_prompt_tokens, processor.config.max_question_tokens)
    min_shape = (1, *(min(length, MIN_PADDED_LENGTH) for length in lengths))
    selected = pipeline.examples(data, benchmark, split, limit)
    samples = encode_samples(processor, data, selected, tagged, task, few_shot)
    segments = task in MASK_TASKS and processor.config.sam_image_size > 0
    while batch := list(itertools.islice(samples, BATCH_SIZE)):
        batch_samples = [sample for sample, _ in batch]
        rows = {kind: [row[kind] for _, row in batch] for kind in batch[0][1]}
        if tagged and task in TAG_ABLATION_TASKS and any(sample.example.tags for sample in batch_samples):
            variants |= {"untagged": (False, False), "tags_alone": (True, True)}
        # The shape only grows, so that later batches do not recompile.
        min_shape = tuple(map(max, min_shape, (len(batch_samples), *engine.bucketed_lengths(rows[True] + rows[False]))))
        config = engine.make_generation_config(generation_config, processor, batch_samples[0].example.category, task)
        sizes = [image_size(sample) for sample in batch_samples] if segments else None
        predictions = {
            variant: inference_engine.generate(rows[tags], config, blind, min_shape, image_sizes=sizes)
            for variant, (blind, tags) in variants.items()
        }
        if "forced" in rows:
            forced_boxes = inference_engine.teacher_forced_boxes(rows["forced"], min_shape)
            predictions["teacher_forced"] = [
                teacher_forced_prediction(sample, boxes_K4) for sample, boxes_K4 in zip(batch_samples, forced_boxes)
            ]
        yield batch_samples, predictions


def detect_batches(
    inference_engine: InferenceEngine, samples: Iterator[Sample]
) -> Iterator[tuple[list[Sample], dict[str, list[Answer]]]]:
    """`run_batches` of a phrase detector: what it finds for each caption, and for a gray image ("blind")."""
    phrase_detector = detector.from_engine(inference_engine)
    while batch := list(itertools.islice(samples, BATCH_SIZE)):
        inputs = [sample.image for sample in batch], [sample.example.question for sample in batch]
        variants = {"answers": False, "blind": True}
        yield batch, {name: detect_answers(phrase_detector, *inputs, blind) for name, blind in variants.items()}


def encode_samples(
    processor: Processor, data: DataConfig, samples: Iterable[Sample], use_tags: bool, task: str, few_shot: Any = None
) -> Iterator[tuple[Sample, dict[Any, engine.EncodedExample]]]:
    """Yields each sample with its encoded examples: {True: with tags, False: without, "forced": with the answer}.

    Boxes as text go with the tags. "forced" is present for models with a region head. A question longer than the
    model's maximum is skipped with a warning, or raises UserError if `data.on_bad_record` is "raise".
    """
    for sample in samples:
        example, pixels = sample.example, processor.load_pixels(sample.image)
        tags, box_format = example.tags if use_tags else (), sample.box_format or processor.config.box_format
        boxes = (*example.question_boxes, *example.boxes)
        prompt_format, asked = sample.prompt_format, example
        if sample.padded_example is not None and processor.config.pad_to_square and few_shot is None:
            asked = sample.padded_example  # the boxes as they were in training
            prompt_format = dataclasses.replace(prompt_format, turns=asked.history, padded_boxes=True)
        if sample.more_images or task == "conversation":  # its rows have one image, several or none
            pixels = processor.stack_images([pixels, *map(processor.load_pixels, sample.more_images)])
        if few_shot is not None:
            pixels, prompt_format = few_shot.prepend_examples(sample, pixels)
        encode_args = (example.category, boxes, processor.get_letterbox(sample.image), box_format, prompt_format)
        fields = processor.load_sam_pixels(sample.image) if task in MASK_TASKS else {}
        try:
            found = sample.load_regions() if processor.config.region_width else []
            fields |= processor.encode_regions(found, example.answer, np.random.default_rng(0), sample.name)
            context = processor.spatial_context(found[0] if found else None)
            rows = {
                with_tags: processor.encode_example(pixels, asked.question, texts, None, *encode_args, context=context)
                | fields
                for with_tags, texts, context in ((True, tags, context), (False, (), ""))
            }
            if task in TEACHER_FORCED_TASKS and box_format == "embeddings":
                rows["forced"] = processor.encode_example(pixels, asked.question, tags, asked.answer, *encode_args)
        except UserError as error:
            if data.on_bad_record == "raise":
                raise
            log.warning("skipped: %s", error)
        else:
            yield sample, rows


def teacher_forced_prediction(sample: Sample, boxes_K4: np.ndarray) -> Answer:
    """The true answer with its boxes replaced by the predicted ones, in order."""
    predicted_boxes = iter(boxes_K4.tolist())
    parts = split_text_and_boxes(sample.example.answer)
    replaced = [part if isinstance(part, str) else tuple(next(predicted_boxes, (0.0,) * 4)) for part in parts]
    return Answer(join_text_and_boxes(replaced), boxes_K4)


def prediction_from_text(text: str) -> Answer:
    """A text answer with the boxes that its text holds."""
    return Answer(text, engine.extract_boxes(text))


def image_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of a sample's image, in pixels."""
    return images.to_pil_image(sample.image).size


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
    for variant in ("untagged", "teacher_forced"):
        for key, value in entry.get(variant, {}).items():
            report["metrics"][f"{key}_{variant}"] = value
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
