# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark: questions in, answers kept, figures beside what a model would reach without looking.

Every figure has two baselines. `blind` is the same model, shown a blank picture and no tags: nothing of the picture
reaches it. `majority` is the best constant answer, learned from training examples. Where a model takes tags it is
also asked without them (`untagged`), and with them but blind (`tags_alone`). Where it points at places it is also read
behind the true words (`teacher_forced`), as NExT-Chat was: nothing is generated then.

In the folder: `evaluation/NAME.jsonl` with every answer (see `report`), and the figures in `report.json`.
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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.types import UserError
from lionjax.data import boxes as places
from lionjax.data import images, pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import open_split
from lionjax.data.mixture import Sample
from lionjax.data.processor import Processor
from lionjax.evaluation import tasks as scoring
from lionjax.evaluation.report.html import GALLERY_SIZE, read_json, write_atomic
from lionjax.evaluation.tasks import SCORERS, TaskScores
from lionjax.inference import engine
from lionjax.inference.engine import InferenceEngine, Prediction

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # questions in a batch
MAX_TRAIN_EXAMPLES = 200  # training examples that the constant answers are learned from
MIN_PADDED_LENGTH = 128  # tokens that prompts and questions are padded to, where the model takes as many
MAX_IMAGE_SIDE = 640  # pixels of a kept picture's longer side, at most
TAG_ABLATION_TASKS = ("vqa", "existence", "caption")  # asked with and without tags
TEACHER_FORCED_TASKS = ("rec", "grounded")  # also read behind the true words, where the model points at places


def trained_benchmarks(experiment: Experiment) -> list[str]:
    """The benchmarks of the tasks that some stage of an experiment trains."""
    trained = [name.rpartition("/")[2] for stage in experiment.stages for name, weight in stage.mixture if weight]
    # What was trained in another form, or behind examples, is asked as it stands in the template.
    trained = [re.sub(r"@(plain|told)$", "", re.sub(r"\+\d+", "", name)) for name in trained]
    names = dict.fromkeys(sorted(trained))
    return [name for task in SCORERS for name in names if name.partition("@")[0] == task]


def available_benchmarks(sources: Iterable[Any], split: str) -> list[str]:
    """The benchmarks that some of the sources have questions for."""
    sizes = [open_split(source, split, images.MAX_PIXELS).task_sizes for source in sources]
    return [task for task in SCORERS if any(task in tasks for tasks in sizes)]


def model_benchmarks(model: Any, split: str = "heldout", source: Any = None) -> list[str]:
    """The benchmarks that a source offers; by default the data of a `model.Model`, of which it was trained on some."""
    sources = model.experiment.data.sources if source is None else (source,)
    found = available_benchmarks(sources, split)
    trained = trained_benchmarks(model.experiment) if source is None else []
    return [name for name in trained if benchmark_task(name) in found] or found


def evaluate_model(
    model: Any,
    benchmark: str,
    folder: str | Path | None = None,
    limit: int | None = None,
    split: str = "heldout",
    source: Any = None,
) -> dict[str, Any]:
    """The figures of one benchmark for a `model.Model`, beside their baselines; see `evaluate`.

    Over the data that the model was trained with, or over another `source`. With a `folder` every answer is kept
    there.
    """
    data, label = model.experiment.data, ""
    if source is not None:  # files of others, of which some pictures may not be there
        data = dataclasses.replace(data, sources=(source,), on_bad_record="replace")
        label = benchmark_label(f"{source.name}_{benchmark}")
    where = None if folder is None else Path(folder)
    answer = model.experiment.answer
    return evaluate(model.engine, data, answer, benchmark, where, limit, split, label, model.updates)


def evaluate_run(inference_engine: InferenceEngine, experiment: Experiment, folder: Path, updates: int) -> list[dict]:
    """The benchmarks of an experiment's tasks at the end of its run; those that its folder has are not run again."""
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
    """{name: what `evaluate` gives} of several benchmarks over the experiment's own data.

    Those that the folder has of the same number of updates are not asked again; one that the data does not offer is
    passed over with a warning. Several processes answer each batch together, and all must call this.
    """
    benchmarks = list(benchmarks)
    known = (read_json(folder / "report.json") or {}).get("evaluation", {})
    same = {"limit": limit, "split": split, "updates": updates}
    before = [known.get(benchmark_label(name), {}) for name in benchmarks]
    asked_before = [updates is not None and same == {key: entry.get(key) for key in same} for entry in before]
    if jax.process_count() > 1:  # one may see the folder later than another
        asked_before = multihost_utils.broadcast_one_to_all(np.array(asked_before, bool))
    entries = {}
    for name, there, entry in zip(benchmarks, asked_before, before):
        if there:
            entries[name] = entry
            continue
        try:
            data, answer = experiment.data, experiment.generation
            entries[name] = evaluate(inference_engine, data, answer, name, folder, limit, split, updates=updates)
        except UserError as error:
            log.warning("benchmark %s is left out: %s", name, error)
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
) -> dict[str, Any]:
    """Ask the questions of one benchmark, and score the answers.

    `name` is a task that a source of `data` has, such as "vqa", or "coco/vqa" for one source's; `limit` asks only so
    many. `shown` (see `few_shot.Shown`): examples before each question. `label` is what figures and files are called,
    by default after the name. Raises UserError for a benchmark that there is not, and for records that cannot be read.
    """
    task, label, began = benchmark_task(benchmark), label or benchmark_label(benchmark), time.perf_counter()
    folder = folder if jax.process_index() == 0 else None  # what is written is written once
    examples, said, lines, truth = [], {}, [], []
    pictures_at = None if folder is None else folder / "evaluation" / "pictures"
    for samples, answers in run_batches(inference_engine, data, generation_config, benchmark, limit, split, few_shot):
        for variant, some in answers.items():
            said.setdefault(variant, []).extend(some)
        for sample in samples:
            kept = len(examples) < GALLERY_SIZE and pictures_at is not None
            few_shot = {"image": f"pictures/{save_image(sample, pictures_at)}"} if kept else {}
            lines.append(question_record(sample) | few_shot)
            examples.append(sample.example)
            truth += [encode_rle(sample.masks().any(axis=0))] if task == "res" else []
    if not examples:
        raise UserError(f"no question of {benchmark!r} could be asked; look at the warnings above and at the data")
    log.info("%s: %d questions", label, len(examples))
    train = train_examples(data, benchmark)
    if train:
        said["majority"] = list(map(prediction_from_text, scoring.constant_answers(task, train, examples)))
    texts = {variant: [one.text for one in some] for variant, some in said.items()}
    masks = {variant: predicted_masks(some, truth) for variant, some in said.items()} if truth else {}
    scored = {
        variant: SCORERS[task](truth, masks[variant]) if truth else SCORERS[task](examples, some)
        for variant, some in texts.items()
    }
    entry = {"benchmark": label, "task": task, "split": split, "limit": limit, "updates": updates}
    entry |= {"samples": len(examples), "seconds": round(time.perf_counter() - began, 3)}
    entry |= summarize_scores(label.removesuffix(task), scored)
    if task in scoring.PER_KIND_TASKS:
        entry["kinds"] = metrics_by_kind(task, examples, texts)
    if task == "rec" and train:
        entry["details"]["random_box"] = scoring.random_box_accuracy(train, examples)
    if folder is not None:
        rows = result_records(lines, said, scored["answers"], truth, masks)
        file = folder / "evaluation" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        update_report(folder, entry, inference_engine)
    return entry


def benchmark_task(benchmark: str) -> str:
    task = benchmark.partition("@")[0].rpartition("/")[2]
    if task not in SCORERS:
        raise UserError(f"there is no benchmark {benchmark!r}; there are {', '.join(SCORERS)}, or all")
    return task


def benchmark_label(benchmark: str) -> str:
    """What a benchmark's figures and files are called: "coco/rec" is coco_rec, "rec@digits" digits_rec."""
    whole, _, how = benchmark.partition("@")
    source, _, task = whole.rpartition("/")
    return re.sub(r"\W+", "_", "_".join(filter(None, (source, how, task))))


# Asking


def run_batches(
    inference_engine: InferenceEngine,
    data: DataConfig,
    generation_config: GenerationDefaults,
    benchmark: str,
    limit: int | None,
    split: str,
    few_shot: Any = None,
) -> Iterator[tuple[list[Sample], dict[str, list[Prediction]]]]:
    """Samples by the batch, with the answers of each variant: "answers", "blind", and with tags two more.

    All batches have one shape, in all benchmarks, so that two programs serve them: for short answers and for long.
    """
    task, processor = benchmark_task(benchmark), inference_engine.processor
    tagged = processor.config.use_tags and task != "tags"  # or the answer would stand in the prompt
    variants = {"answers": (False, tagged), "blind": (True, False)}  # (blind, with tags)
    lengths = (processor.config.max_prompt_tokens, processor.config.max_question_tokens)
    least = (1, *(min(length, MIN_PADDED_LENGTH) for length in lengths))
    chosen = pipeline.examples(data, benchmark, split, limit)
    samples = encode_samples(processor, data, chosen, tagged, task, few_shot)
    segments = task == "res" and processor.config.sam_image_size > 0
    while batch := list(itertools.islice(samples, BATCH_SIZE)):
        kept = [sample for sample, _ in batch]
        rows = {kind: [row[kind] for _, row in batch] for kind in batch[0][1]}
        if tagged and task in TAG_ABLATION_TASKS and any(sample.example.tags for sample in kept):
            variants |= {"untagged": (False, False), "tags_alone": (True, True)}
        least = tuple(
            map(max, least, (len(kept), *engine.bucketed_lengths(rows[True] + rows[False])))
        )  # never less again
        how = engine.make_generation_config(generation_config, processor, kept[0].example.category, task)
        sizes = [image_size(sample) for sample in kept] if segments else None
        answers = {
            variant: inference_engine.generate(rows[tags], how, blind, least, image_sizes=sizes)
            for variant, (blind, tags) in variants.items()
        }
        if "forced" in rows:
            found = inference_engine.teacher_forced_boxes(rows["forced"], least)
            answers["teacher_forced"] = [
                teacher_forced_prediction(sample, boxes_K4) for sample, boxes_K4 in zip(kept, found)
            ]
        yield kept, answers


def encode_samples(
    processor: Processor, data: DataConfig, samples: Iterable[Sample], use_tags: bool, task: str, few_shot: Any = None
) -> Iterator[tuple[Sample, dict[Any, engine.EncodedExample]]]:
    """Each sample with its rows: with tags (where the benchmark has them), without, and with its answer.

    That with the answer is there where a model points at places. A question longer than the model takes is left out
    where bad records are.
    """
    for sample in samples:
        example, pixels = sample.example, processor.load_pixels(sample.image)
        tags, how = example.tags if use_tags else (), sample.box_format or processor.config.box_format
        boxes = (*example.question_boxes, *example.boxes)
        form = sample.prompt_format
        if few_shot is not None:
            pixels, form = few_shot.prepend_examples(sample, pixels)
        given = (example.category, boxes, processor.get_letterbox(sample.image), how, form)
        large = processor.load_sam_pixels(sample.image) if task == "res" else {}
        try:
            rows = {
                with_tags: processor.encode_example(pixels, example.question, words, None, *given) | large
                for with_tags, words in ((True, tags), (False, ()))
            }
            if task in TEACHER_FORCED_TASKS and how == "embeddings":
                rows["forced"] = processor.encode_example(pixels, example.question, tags, example.answer, *given)
        except UserError as error:
            if data.on_bad_record == "raise":
                raise
            log.warning("left out: %s", error)
        else:
            yield sample, rows


def teacher_forced_prediction(sample: Sample, boxes_K4: np.ndarray) -> Prediction:
    """The true answer with the boxes that the model points at in it."""
    rest = iter(boxes_K4.tolist())
    parts = places.split_text_and_boxes(sample.example.answer)
    said = [piece if isinstance(piece, str) else tuple(next(rest, (0.0,) * 4)) for piece in parts]
    return Prediction(places.join_text_and_boxes(said), boxes_K4)


def prediction_from_text(text: str) -> Prediction:
    return Prediction(text, engine.extract_boxes(text))


def image_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of a sample's picture."""
    return images.to_pil_image(sample.image).size


# What is kept


def question_record(sample: Sample) -> dict[str, Any]:
    """What a line of the file says of a question; all accepted answers stay, so that the score can be made again."""
    example = sample.example
    truth = {"truth": list(example.answers), "truth_boxes": [list(box) for box in example.boxes]}
    about = {"kind": example.kind, "record": sample.name, "tags": list(example.tags)}
    boxes = {"question_boxes": [list(box) for box in example.question_boxes]}
    return {"question": example.question} | truth | about | boxes


def result_records(
    questions: Sequence[Mapping],
    predictions: Mapping[str, Sequence[Prediction]],
    scores: TaskScores,
    true_masks: Sequence[Mapping] = (),
    masks: Mapping[str, Sequence[Mapping | None]] | None = None,
) -> Iterator[dict]:
    """The lines with what was answered, and masks where they were asked for. Empty fields are left out."""
    for number, row in enumerate(questions):
        texts = {variant: answers[number].text for variant, answers in predictions.items()}
        prediction = texts.pop("answers")
        score = {} if scores.sample_scores is None else {"score": round(scores.sample_scores[number], 4)}
        boxes = np.asarray(predictions["answers"][number].boxes).round(4).tolist()
        whole = {"prediction": prediction, "boxes": boxes} | row | texts
        if true_masks:
            whole["truth_masks"] = [true_masks[number]]
            for variant, made in masks.items():
                name = "masks" if variant == "answers" else f"{variant}_masks"
                whole[name] = [made[number]] if made[number] is not None else []
        yield {key: value for key, value in whole.items() if value != []} | score


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths, as JSON holds them."""
    from pycocotools import mask as coco

    made = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def predicted_masks(predictions: Sequence[Prediction], true_masks: Sequence[Mapping]) -> list[dict[str, Any] | None]:
    """The mask that each answer gives; None where it does not give just one, as NExT-Chat counts.

    Of an answer without masks, such as a constant one, it is the first box, filled.
    """
    made = []
    for one, true in zip(predictions, true_masks):
        if one.masks is not None:
            made.append(encode_rle(one.masks[0]) if len(one.masks) == 1 else None)
            continue
        mask_HW = np.zeros(true["size"], bool)
        for x0, y0, x1, y1 in np.asarray(one.boxes)[:1] * (true["size"][::-1] * 2):
            mask_HW[round(y0) : round(y1), round(x0) : round(x1)] = True
        made.append(encode_rle(mask_HW) if len(one.boxes) else None)
    return made


def save_image(sample: Sample, folder: Path) -> str:
    """Keep a sample's picture as a PNG in its own size, if that is not too large; returns the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", sample.name) + ".png"
    if not (folder / name).is_file():
        picture = images.to_pil_image(sample.image).copy()
        picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_atomic(folder / name, buffer.getvalue())
    return name


def update_report(folder: Path, entry: Mapping[str, Any], inference_engine: InferenceEngine) -> None:
    """Enter a benchmark's figures into report.json; what others wrote there stays."""
    report = read_json(folder / "report.json") or {}
    shown = {"metrics": "metrics", "intervals": "intervals", "baselines": "blind", "majority": "majority"}
    for ours, theirs in shown.items():
        report.setdefault(ours, {}).update(entry.get(theirs, {}))
    for variant in ("untagged", "teacher_forced"):
        for key, value in entry.get(variant, {}).items():
            report["metrics"][f"{key}_{variant}"] = value
            report["baselines"][f"{key}_{variant}"] = entry["blind"][key]
    report.setdefault("evaluation", {})[entry["benchmark"]] = dict(entry)
    if inference_engine.generation_seconds:
        rate = inference_engine.num_generated_tokens / inference_engine.generation_seconds
        report.setdefault("speed", {})["generated_tokens_per_second"] = rate
    write_atomic(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())


# Figures


def train_examples(data: DataConfig, benchmark: str) -> list[Any]:
    """Training examples from which the best constant answer is learned; none where there is no training set."""
    lenient = dataclasses.replace(data, on_bad_record="replace")
    try:
        return [sample.example for sample in pipeline.examples(lenient, benchmark, "train", MAX_TRAIN_EXAMPLES)]
    except UserError as error:
        log.warning("no majority baseline for %s: %s", benchmark, error)
        return []


def summarize_scores(prefix: str, scores: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Metrics of the answers and of each variant, and what else is known of the answers.

    `prefix` comes before the keys of what is asked of one source alone.
    """

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + key: value for key, value in values.items()}

    main = scores["answers"]
    entry = {"metrics": named(main.metrics), "intervals": named(main.bootstrap_intervals()), "details": main.details}
    others = {variant: named(s.metrics) for variant, s in scores.items() if variant != "answers"}
    return entry | others


def metrics_by_kind(
    task: str, examples: Sequence[Any], texts_by_variant: Mapping[str, Sequence[str]]
) -> dict[str, dict]:
    """{kind: {"samples": how many, variant: metrics}}: of colors, counts, ..., of POPE's three settings."""
    kinds = {}
    for kind in dict.fromkeys(example.kind for example in examples):
        places = [place for place, example in enumerate(examples) if example.kind == kind]
        group = [examples[place] for place in places]
        each = {
            variant: SCORERS[task](group, [texts[place] for place in places]).metrics
            for variant, texts in texts_by_variant.items()
        }
        kinds[kind] = {"samples": len(places), **each}
    return kinds


def metrics_table(entry: Mapping[str, Any]):
    """The figures of one benchmark as a rich table."""
    from rich.table import Table

    others = ("teacher_forced", "untagged", "blind", "tags_alone", "majority")
    others = [name for name in others if name in entry]
    title = f"{entry['benchmark']}: {entry['samples']} questions of {entry['split']}"
    made = Table("", title=title, title_justify="left")
    for name in ("this model", "95 %", *(name.replace("_", " ") for name in others)):
        made.add_column(name, justify="right")
    for key, value in entry["metrics"].items():
        low, high = entry["intervals"].get(key, (None, None))
        between = "" if low is None else f"{low:.3f} – {high:.3f}"
        made.add_row(key, f"{value:.3f}", between, *(f"{entry[name][key]:.3f}" for name in others))
    for kind, group in entry.get("kinds", {}).items():
        key = next(iter(group["answers"]))
        row = [f"{group[name][key]:.3f}" for name in ("answers", *others)]
        made.add_row(f"  {kind} ({group['samples']})", row[0], "", *row[1:], style="dim")
    for key, value in entry["details"].items():
        made.add_row(f"  {key}", f"{value:.3f}", "", style="dim")
    return made
