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

from lionjax.core.experiment import AnswerConfig, Experiment
from lionjax.core.types import UserError
from lionjax.data import boxes as places
from lionjax.data import images, pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import open_split
from lionjax.data.mixture import Sample
from lionjax.data.processor import Processor
from lionjax.evaluation import tasks as scoring
from lionjax.evaluation.report.html import SHOWN, read_json, write
from lionjax.evaluation.tasks import SCORERS, Scored
from lionjax.inference import engine
from lionjax.inference.engine import Answerer, Said

log = logging.getLogger(__name__)

AT_ONCE = 32  # questions in a batch
TRAINING = 200  # training examples that the constant answers are learned from
PADDED = 128  # tokens that prompts and questions are padded to, where the model takes as many
SIDE = 640  # pixels of a kept picture's longer side, at most
WITHOUT_TAGS = ("vqa", "existence", "caption")  # asked with and without tags
POINTED = ("rec", "grounded")  # also read behind the true words, where the model points at places


def names_of(experiment: Experiment) -> list[str]:
    """The benchmarks of the tasks that some stage of an experiment trains."""
    trained = [name.rpartition("/")[2] for stage in experiment.stages for name, weight in stage.mixture if weight]
    # What was trained in another form, or behind examples, is asked as it stands in the template.
    trained = [re.sub(r"@(plain|told)$", "", re.sub(r"\+\d+", "", name)) for name in trained]
    names = dict.fromkeys(sorted(trained))
    return [name for task in SCORERS for name in names if name.partition("@")[0] == task]


def offered(sources: Iterable[Any], split: str) -> list[str]:
    """The benchmarks that some of the sources have questions for."""
    sizes = [open_split(source, split, images.MAX_PIXELS).sizes for source in sources]
    return [task for task in SCORERS if any(task in tasks for tasks in sizes)]


def names_for(model: Any, split: str = "heldout", source: Any = None) -> list[str]:
    """The benchmarks that a source offers; by default the data of a `model.Model`, of which it was trained on some."""
    sources = model.experiment.data.sources if source is None else (source,)
    found = offered(sources, split)
    trained = names_of(model.experiment) if source is None else []
    return [name for name in trained if task_of(name) in found] or found


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
        label = label_of(f"{source.name}_{benchmark}")
    where = None if folder is None else Path(folder)
    answer = model.experiment.answer
    return evaluate(model.answerer, data, answer, benchmark, where, limit, split, label, model.updates)


def evaluate_run(answerer: Answerer, experiment: Experiment, folder: Path, updates: int) -> list[dict]:
    """The benchmarks of an experiment's tasks at the end of its run; those that its folder has are not run again."""
    limit = experiment.run.evaluate_limit
    entries = evaluate_all(answerer, experiment, names_of(experiment), folder, limit, updates=updates)
    return list(entries.values())


def evaluate_all(
    answerer: Answerer,
    experiment: Experiment,
    names: Iterable[str],
    folder: Path,
    limit: int | None = None,
    split: str = "heldout",
    updates: int | None = None,
) -> dict[str, dict]:
    """{name: what `evaluate` gives} of several benchmarks over the experiment's own data.

    Those that the folder has of the same number of updates are not asked again; one that the data does not offer is
    passed over with a warning. Several processes answer each batch together, and all must call this.
    """
    names = list(names)
    known = (read_json(folder / "report.json") or {}).get("evaluation", {})
    same = {"limit": limit, "split": split, "updates": updates}
    before = [known.get(label_of(name), {}) for name in names]
    asked_before = [updates is not None and same == {key: entry.get(key) for key in same} for entry in before]
    if jax.process_count() > 1:  # one may see the folder later than another
        asked_before = multihost_utils.broadcast_one_to_all(np.array(asked_before, bool))
    entries = {}
    for name, there, entry in zip(names, asked_before, before):
        if there:
            entries[name] = entry
            continue
        try:
            data, answer = experiment.data, experiment.answer
            entries[name] = evaluate(answerer, data, answer, name, folder, limit, split, updates=updates)
        except UserError as error:
            log.warning("benchmark %s is left out: %s", name, error)
    return entries


def evaluate(
    answerer: Answerer,
    data: DataConfig,
    answer: AnswerConfig,
    name: str,
    folder: Path | None = None,
    limit: int | None = None,
    split: str = "heldout",
    label: str = "",
    updates: int | None = None,
    shown: Any = None,
) -> dict[str, Any]:
    """Ask the questions of one benchmark, and score the answers.

    `name` is a task that a source of `data` has, such as "vqa", or "coco/vqa" for one source's; `limit` asks only so
    many. `shown` (see `few_shot.Shown`): examples before each question. `label` is what figures and files are called,
    by default after the name. Raises UserError for a benchmark that there is not, and for records that cannot be read.
    """
    task, label, began = task_of(name), label or label_of(name), time.perf_counter()
    folder = folder if jax.process_index() == 0 else None  # what is written is written once
    examples, said, lines, truth = [], {}, [], []
    pictures_at = None if folder is None else folder / "evaluation" / "pictures"
    for samples, answers in asked(answerer, data, answer, name, limit, split, shown):
        for variant, some in answers.items():
            said.setdefault(variant, []).extend(some)
        for sample in samples:
            kept = len(examples) < SHOWN and pictures_at is not None
            shown = {"image": f"pictures/{keep(sample, pictures_at)}"} if kept else {}
            lines.append(line(sample) | shown)
            examples.append(sample.example)
            truth += [rle(sample.masks().any(axis=0))] if task == "res" else []
    if not examples:
        raise UserError(f"no question of {name!r} could be asked; look at the warnings above and at the data")
    log.info("%s: %d questions", label, len(examples))
    train = training(data, name)
    if train:
        said["majority"] = list(map(in_words, scoring.constants(task, train, examples)))
    texts = {variant: [one.text for one in some] for variant, some in said.items()}
    masks = {variant: masks_of(some, truth) for variant, some in said.items()} if truth else {}
    scored = {
        variant: SCORERS[task](truth, masks[variant]) if truth else SCORERS[task](examples, some)
        for variant, some in texts.items()
    }
    entry = {"benchmark": label, "task": task, "split": split, "limit": limit, "updates": updates}
    entry |= {"samples": len(examples), "seconds": round(time.perf_counter() - began, 3)}
    entry |= figures(label.removesuffix(task), scored)
    if task in scoring.BY_KIND:
        entry["kinds"] = by_kind(task, examples, texts)
    if task == "rec" and train:
        entry["details"]["random_box"] = scoring.random_box_hits(train, examples)
    if folder is not None:
        rows = answered(lines, said, scored["answers"], truth, masks)
        file = folder / "evaluation" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        record(folder, entry, answerer)
    return entry


def task_of(name: str) -> str:
    task = name.partition("@")[0].rpartition("/")[2]
    if task not in SCORERS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(SCORERS)}, or all")
    return task


def label_of(name: str) -> str:
    """What a benchmark's figures and files are called: "coco/rec" is coco_rec, "rec@digits" digits_rec."""
    whole, _, how = name.partition("@")
    source, _, task = whole.rpartition("/")
    return re.sub(r"\W+", "_", "_".join(filter(None, (source, how, task))))


# Asking


def asked(
    answerer: Answerer,
    data: DataConfig,
    answer: AnswerConfig,
    name: str,
    limit: int | None,
    split: str,
    shown: Any = None,
) -> Iterator[tuple[list[Sample], dict[str, list[Said]]]]:
    """Samples by the batch, with the answers of each variant: "answers", "blind", and with tags two more.

    All batches have one shape, in all benchmarks, so that two programs serve them: for short answers and for long.
    """
    task, processor = task_of(name), answerer.processor
    tagged = processor.config.tags and task != "tags"  # or the answer would stand in the prompt
    variants = {"answers": (False, tagged), "blind": (True, False)}  # (blind, with tags)
    lengths = (processor.config.prompt_length, processor.config.question_length)
    least = (1, *(min(length, PADDED) for length in lengths))
    chosen = pipeline.examples(data, name, split, limit)
    samples = prepared(processor, data, chosen, tagged, task, shown)
    segments = task == "res" and processor.config.sam_size > 0
    while batch := list(itertools.islice(samples, AT_ONCE)):
        kept = [sample for sample, _ in batch]
        rows = {kind: [row[kind] for _, row in batch] for kind in batch[0][1]}
        if tagged and task in WITHOUT_TAGS and any(sample.example.tags for sample in kept):
            variants |= {"untagged": (False, False), "tags_alone": (True, True)}
        least = tuple(map(max, least, (len(kept), *engine.lengths(rows[True] + rows[False]))))  # never less again
        how = engine.settings(answer, processor, kept[0].example.category, task)
        sizes = [size_of(sample) for sample in kept] if segments else None
        answers = {
            variant: answerer.say(rows[tags], how, blind, least, sizes=sizes)
            for variant, (blind, tags) in variants.items()
        }
        if "forced" in rows:
            found = answerer.locate(rows["forced"], least)
            answers["teacher_forced"] = [forced(sample, boxes_K4) for sample, boxes_K4 in zip(kept, found)]
        yield kept, answers


def prepared(
    processor: Processor, data: DataConfig, samples: Iterable[Sample], tagged: bool, task: str, shown: Any = None
) -> Iterator[tuple[Sample, dict[Any, engine.Row]]]:
    """Each sample with its rows: with tags (where the benchmark has them), without, and with its answer.

    That with the answer is there where a model points at places. A question longer than the model takes is left out
    where bad records are.
    """
    for sample in samples:
        example, pixels = sample.example, processor.pixels(sample.picture)
        tags, how = example.tags if tagged else (), sample.places or processor.config.places
        boxes = (*example.question_boxes, *example.boxes)
        form = sample.form
        if shown is not None:
            pixels, form = shown.before(sample, pixels)
        given = (example.category, boxes, processor.square(sample.picture), how, form)
        large = processor.large(sample.picture) if task == "res" else {}
        try:
            rows = {
                with_tags: processor.row(pixels, example.question, words, None, *given) | large
                for with_tags, words in ((True, tags), (False, ()))
            }
            if task in POINTED and how == "embeddings":
                rows["forced"] = processor.row(pixels, example.question, tags, example.answer, *given)
        except UserError as error:
            if data.on_bad_record == "raise":
                raise
            log.warning("left out: %s", error)
        else:
            yield sample, rows


def forced(sample: Sample, boxes_K4: np.ndarray) -> Said:
    """The true answer with the boxes that the model points at in it."""
    rest = iter(boxes_K4.tolist())
    parts = places.pieces(sample.example.answer)
    said = [piece if isinstance(piece, str) else tuple(next(rest, (0.0,) * 4)) for piece in parts]
    return Said(places.joined(said), boxes_K4)


def in_words(text: str) -> Said:
    return Said(text, engine.boxes_in(text))


def size_of(sample: Sample) -> tuple[int, int]:
    """(width, height) of a sample's picture."""
    return images.as_picture(sample.picture).size


# What is kept


def line(sample: Sample) -> dict[str, Any]:
    """What a line of the file says of a question; all accepted answers stay, so that the score can be made again."""
    example = sample.example
    truth = {"truth": list(example.answers), "truth_boxes": [list(box) for box in example.boxes]}
    about = {"kind": example.kind, "record": sample.name, "tags": list(example.tags)}
    boxes = {"question_boxes": [list(box) for box in example.question_boxes]}
    return {"question": example.question} | truth | about | boxes


def answered(
    lines: Sequence[Mapping],
    said: Mapping[str, Sequence[Said]],
    scored: Scored,
    truth: Sequence[Mapping] = (),
    masks: Mapping[str, Sequence[Mapping | None]] | None = None,
) -> Iterator[dict]:
    """The lines with what was answered, and masks where they were asked for. Empty fields are left out."""
    for number, row in enumerate(lines):
        texts = {variant: answers[number].text for variant, answers in said.items()}
        prediction = texts.pop("answers")
        score = {} if scored.right is None else {"score": round(scored.right[number], 4)}
        boxes = np.asarray(said["answers"][number].boxes).round(4).tolist()
        whole = {"prediction": prediction, "boxes": boxes} | row | texts
        if truth:
            whole["truth_masks"] = [truth[number]]
            for variant, made in masks.items():
                name = "masks" if variant == "answers" else f"{variant}_masks"
                whole[name] = [made[number]] if made[number] is not None else []
        yield {key: value for key, value in whole.items() if value != []} | score


def rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths, as JSON holds them."""
    from pycocotools import mask as coco

    made = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def masks_of(said: Sequence[Said], truth: Sequence[Mapping]) -> list[dict[str, Any] | None]:
    """The mask that each answer gives; None where it does not give just one, as NExT-Chat counts.

    Of an answer without masks, such as a constant one, it is the first box, filled.
    """
    made = []
    for one, true in zip(said, truth):
        if one.masks is not None:
            made.append(rle(one.masks[0]) if len(one.masks) == 1 else None)
            continue
        mask_HW = np.zeros(true["size"], bool)
        for x0, y0, x1, y1 in np.asarray(one.boxes)[:1] * (true["size"][::-1] * 2):
            mask_HW[round(y0) : round(y1), round(x0) : round(x1)] = True
        made.append(rle(mask_HW) if len(one.boxes) else None)
    return made


def keep(sample: Sample, folder: Path) -> str:
    """Keep a sample's picture as a PNG in its own size, if that is not too large; returns the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", sample.name) + ".png"
    if not (folder / name).is_file():
        picture = images.as_picture(sample.picture).copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write(folder / name, buffer.getvalue())
    return name


def record(folder: Path, entry: Mapping[str, Any], answerer: Answerer) -> None:
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
    if answerer.seconds:
        rate = answerer.tokens / answerer.seconds
        report.setdefault("speed", {})["generated_tokens_per_second"] = rate
    write(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())


# Figures


def training(data: DataConfig, name: str) -> list[Any]:
    """Training examples from which the best constant answer is learned; none where there is no training set."""
    lenient = dataclasses.replace(data, on_bad_record="replace")
    try:
        return [sample.example for sample in pipeline.examples(lenient, name, "train", TRAINING)]
    except UserError as error:
        log.warning("no majority baseline for %s: %s", name, error)
        return []


def figures(prefix: str, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """Metrics of the answers and of each variant, and what else is known of the answers.

    `prefix` comes before the keys of what is asked of one source alone.
    """

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + key: value for key, value in values.items()}

    main = scored["answers"]
    entry = {"metrics": named(main.metrics), "intervals": named(main.intervals()), "details": main.details}
    others = {variant: named(s.metrics) for variant, s in scored.items() if variant != "answers"}
    return entry | others


def by_kind(task: str, examples: Sequence[Any], said: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """{kind: {"samples": how many, variant: metrics}}: of colors, counts, ..., of POPE's three settings."""
    kinds = {}
    for kind in dict.fromkeys(example.kind for example in examples):
        places = [place for place, example in enumerate(examples) if example.kind == kind]
        group = [examples[place] for place in places]
        each = {
            variant: SCORERS[task](group, [texts[place] for place in places]).metrics for variant, texts in said.items()
        }
        kinds[kind] = {"samples": len(places), **each}
    return kinds


def table(entry: Mapping[str, Any]):
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
