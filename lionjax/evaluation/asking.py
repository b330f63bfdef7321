# SPDX-License-Identifier: Apache-2.0
"""Ask a model the questions of a benchmark: with and without the image, with and without tags, by teacher forcing.

More questions than one batch are answered in slots (`inference.session`), in the order of their images; fewer, and
those that are answered with beams, batch by batch. Answers are kept in a journal, if one is given, as soon as they are
known.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lionjax.core.journal import Journal, journal_key
from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.boxes import join_text_and_boxes, split_text_and_boxes
from lionjax.data.config import DataConfig
from lionjax.data.mixture import open_mixture
from lionjax.data.prefetch import choose_num_workers, in_background
from lionjax.data.processor import Processor
from lionjax.data.rle import decode_rle, encode_rle
from lionjax.data.samples import Sample, choose_examples, examples
from lionjax.data.scenes.tasks import MASK_TASKS
from lionjax.evaluation.detection import detect_answers
from lionjax.evaluation.retrieval import retrieval_batches
from lionjax.evaluation.tasks import benchmark_task
from lionjax.inference import detector, engine
from lionjax.inference.answer_mesh import model_digest
from lionjax.inference.answer_request import AnswerRequest
from lionjax.inference.engine import Answer, InferenceEngine, Question
from lionjax.inference.sampling import GenerationConfig

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # questions per batch
MIN_PADDED_LENGTH = 128  # tokens; prompts and questions are padded to this length, or to the model's maximum if shorter
READING_THREADS = 4  # that read and decode images ahead
QUESTIONS_AHEAD = 64  # encoded before they are asked
TAG_ABLATION_TASKS = ("vqa", "existence", "caption")  # run with and without tags
TEACHER_FORCED_TASKS = ("rec", "grounded")  # also run with teacher forcing, for models with a region head

Predictions = dict[str, Answer]  # of the variants of a question: "answers", "blind", ...


@dataclasses.dataclass(frozen=True)
class Inquiry:
    """What is asked of a model: a benchmark of some data, and how.

    `with_blind`: also ask with a blank image. `on_skip` is called with the name of each record that cannot be read.
    `part` (index, count): only every `count`-th image, for processes that share the questions. `num_workers`: processes
    that read images; 0: threads, None: by the CPU cores and the number of questions.
    """

    data: DataConfig
    benchmark: str
    split: str = "heldout"
    limit: int | None = None
    few_shot: Any = None
    with_blind: bool = True
    on_skip: Callable[[str, UserError], None] | None = None
    part: tuple[int, int] = (0, 1)
    num_workers: int | None = 0

    def count(self) -> int:
        """Number of questions, unreadable ones included."""
        return len(choose_examples(open_mixture(self.data, self.split), self.benchmark, self.limit))

    def samples(self, by_record: bool) -> Iterator[Sample]:
        """The questions with their images."""
        arguments = (self.data, self.benchmark, self.split, self.limit)
        threads = workers = 0
        if by_record:
            threads = READING_THREADS
            workers = choose_num_workers(self.count()) if self.num_workers is None else self.num_workers
        return examples(
            *arguments,
            by_record=by_record,
            on_skip=self.on_skip,
            num_threads=threads,
            num_workers=workers,
            part=self.part,
        )


def answer_questions(
    inference_engine: InferenceEngine, generation_defaults: Any, inquiry: Inquiry, journal: Journal | None = None
) -> Iterator[tuple[Sample, Predictions]]:
    """Yields each question with the predictions of its variants, in any order; see `Sample.position`.

    Variants are "answers", "blind", two more with tags, and "teacher_forced". All batches of all benchmarks have one
    shape, so that few programs are compiled, for short and long answers.
    """
    if inference_engine.model.info.detects_phrases:
        yield from _detect(inference_engine, inquiry)
        return
    if inference_engine.model.info.is_dual_encoder:
        for batch, found in retrieval_batches(inference_engine, inquiry.samples(False)):
            yield from ((one, {name: answers[k] for name, answers in found.items()}) for k, one in enumerate(batch))
        return
    task, processor = benchmark_task(inquiry.benchmark), inference_engine.processor
    is_long = inquiry.count() > BATCH_SIZE and inquiry.few_shot is None
    tagged = processor.config.use_tags and task != "tags"  # in the tags task, tags would leak the answer
    samples = inquiry.samples(is_long)
    encoded = encode_samples(processor, inquiry.data, samples, tagged, task, inquiry.few_shot)
    first = list(itertools.islice(encoded, BATCH_SIZE))
    if not first:
        return
    with_text = tagged or processor.config.spatial_text_in_prompt
    variants = {"answers": (False, with_text)}  # (image_blind, with tags and boxes as text)
    variants |= {"blind": (True, False)} if inquiry.with_blind else {}
    if tagged and task in TAG_ABLATION_TASKS and any(sample.example.tags for sample, _ in first):
        variants |= {"untagged": (False, False)} | ({"tags_alone": (True, True)} if inquiry.with_blind else {})
    category = first[0][0].example.category
    config = engine.make_generation_config(generation_defaults, processor, category, task)
    segments = task in MASK_TASKS and processor.config.sam_image_size > 0
    asking = _Asking(inference_engine, config, variants, segments, journal)
    encoded = itertools.chain(first, encoded)
    if is_long and inference_engine.can_stream(config):
        answered = asking.in_slots(in_background(encoded, QUESTIONS_AHEAD))
    else:
        answered = asking.in_batches(encoded)
    yield from _with_teacher_forcing(inference_engine, answered)


@dataclasses.dataclass
class _Asking:
    """How questions are asked; `variants`: {name: (image_blind, with tags and boxes as text)}."""

    engine: InferenceEngine
    config: GenerationConfig
    variants: Mapping[str, tuple[bool, bool]]
    segments: bool
    journal: Journal | None

    def min_shape(self) -> tuple[int, int, int]:
        """Rows, prompt and question tokens of the smallest batch."""
        processor = self.engine.processor.config
        lengths = (processor.max_prompt_tokens, processor.max_question_tokens)
        return (1, *(min(length, MIN_PADDED_LENGTH) for length in lengths))

    def recall(self, sample: Sample) -> Predictions:
        """What the journal has about a question."""
        if self.journal is None:
            return {}
        found = {name: self.journal.get(_journal_key(sample, name)) for name in self.variants}
        return {name: answer_from_json(row) for name, row in found.items() if row is not None}

    def record(self, sample: Sample, variant: str, answer: Answer) -> None:
        """Keep an answer in the journal."""
        if self.journal is not None:
            self.journal.add(_journal_key(sample, variant), answer_to_json(answer))

    def in_batches(self, encoded: Iterator) -> Iterator[tuple[Sample, dict, Predictions]]:
        """Yields (question, its rows, predictions), batch by batch."""
        min_shape = self.min_shape()
        while batch := list(itertools.islice(encoded, BATCH_SIZE)):
            samples, rows = [sample for sample, _ in batch], [rows for _, rows in batch]
            predictions = [self.recall(sample) for sample in samples]
            # The shape only grows, so that later batches do not recompile.
            lengths = engine.bucketed_lengths([row[kind] for row in rows for kind in (True, False)])
            min_shape = tuple(map(max, min_shape, (len(batch), *lengths)))
            for variant, (blind, tags) in self.variants.items():
                missing = [k for k in range(len(batch)) if variant not in predictions[k]]
                if not missing:
                    continue
                sizes = [image_size(samples[k]) for k in missing] if self.segments else None
                seeds = [samples[k].position for k in missing]
                rows_of_variant = [rows[k][tags] for k in missing]
                found = self.engine.generate(
                    rows_of_variant, self.config, blind, min_shape, seeds=seeds, image_sizes=sizes
                )
                for k, answer in zip(missing, found):
                    predictions[k][variant] = answer
                    self.record(samples[k], variant, answer)
            yield from zip(samples, rows, predictions)

    def in_slots(self, encoded: Iterator) -> Iterator[tuple[Sample, dict, Predictions]]:
        """Yields (question, its rows, predictions) as soon as all variants of a question are answered."""
        pending: dict[int, tuple[Sample, dict, Predictions]] = {}
        asked: list[tuple[int, str]] = []  # position and variant of each question to the engine
        complete: list[tuple[Sample, dict, Predictions]] = []

        def questions() -> Iterator[Question]:
            for sample, rows in encoded:
                predictions = self.recall(sample)
                entry = (sample, rows, predictions)
                if len(predictions) == len(self.variants):
                    complete.append(entry)
                    continue
                pending[sample.position] = entry
                size = image_size(sample) if self.segments else None
                for variant in [name for name in self.variants if name not in predictions]:
                    blind, tags = self.variants[variant]
                    asked.append((sample.position, variant))
                    yield Question(AnswerRequest(rows[tags], sample.position, blind), size)

        for number, answer in self.engine.answer_stream(questions(), self.config, self.min_shape()[1:]):
            position, variant = asked[number]
            sample, rows, predictions = pending[position]
            predictions[variant] = answer
            self.record(sample, variant, answer)
            if len(predictions) == len(self.variants):
                yield pending.pop(position)
            while complete:
                yield complete.pop()
        yield from complete


def open_journal(path: Path, inference_engine: InferenceEngine, settings: Mapping[str, Any]) -> Journal | None:
    """The journal of an unfinished evaluation at `path`; None with several processes, which ask together.

    `settings`: {what it is: JSON values}. Raises UserError if it holds answers of another model or other settings.
    """
    if jax.process_count() > 1:
        return None
    journal = Journal(path)
    digests = {name: journal_key(value) for name, value in settings.items()}
    model = model_digest(inference_engine.model, inference_engine.params)
    journal.require({"model": model, **digests}, "answers")
    return journal


def _journal_key(sample: Sample, variant: str) -> str:
    return f"{sample.position} {variant}"


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """A row of the journal, without log-probabilities and regions."""
    boxes = np.asarray(answer.boxes, float).reshape(-1, 4).tolist()
    masks = None if answer.masks is None else [encode_rle(mask) for mask in answer.masks]
    empty = list(answer.masks.shape) if answer.masks is not None and not len(answer.masks) else None
    return {"text": answer.text, "boxes": boxes, "ids": list(answer.token_ids), "masks": masks, "no_masks": empty}


def answer_from_json(row: Mapping[str, Any]) -> Answer:
    """The answer of a row of the journal, equal in every figure."""
    boxes, masks = np.array(row["boxes"], float).reshape(-1, 4), None
    if row["masks"] is not None:
        masks = np.array([decode_rle(mask) for mask in row["masks"]], bool)
        masks = np.zeros(row["no_masks"], bool) if row["no_masks"] else masks
    return Answer(row["text"], boxes, masks, tuple(row["ids"]))


def _with_teacher_forcing(
    inference_engine: InferenceEngine, answered: Iterator[tuple[Sample, dict, Predictions]]
) -> Iterator[tuple[Sample, Predictions]]:
    """Adds the prediction of boxes at the tokens of the true answers, for rows that have these."""
    while batch := list(itertools.islice(answered, BATCH_SIZE)):
        forced = [(sample, rows["forced"], predictions) for sample, rows, predictions in batch if "forced" in rows]
        if forced:
            min_shape = (BATCH_SIZE, *engine.bucketed_lengths([row for _, row, _ in forced]))
            boxes = inference_engine.teacher_forced_boxes([row for _, row, _ in forced], min_shape)
            for (sample, _, predictions), boxes_K4 in zip(forced, boxes):
                predictions["teacher_forced"] = teacher_forced_prediction(sample, boxes_K4)
        yield from ((sample, predictions) for sample, _, predictions in batch)


def _detect(inference_engine: InferenceEngine, inquiry: Inquiry) -> Iterator[tuple[Sample, Predictions]]:
    """`answer_questions` of a phrase detector: what it finds for each caption, and for a gray image ("blind")."""
    phrase_detector, samples = detector.from_engine(inference_engine), inquiry.samples(False)
    variants = {"answers": False} | ({"blind": True} if inquiry.with_blind else {})
    while batch := list(itertools.islice(samples, BATCH_SIZE)):
        inputs = [sample.image for sample in batch], [sample.example.question for sample in batch]
        found = {name: detect_answers(phrase_detector, *inputs, blind) for name, blind in variants.items()}
        for k, sample in enumerate(batch):
            yield sample, {name: answers[k] for name, answers in found.items()}


def encode_samples(
    processor: Processor, data: DataConfig, samples: Iterable[Sample], use_tags: bool, task: str, few_shot: Any = None
) -> Iterator[tuple[Sample, dict[Any, engine.EncodedExample]]]:
    """Yields each sample with its encoded examples: {True: with tags, False: without, "forced": with the answer}.

    Boxes as text go with the tags. "forced" is present for models with a region head. A question longer than the
    model's maximum is skipped with a warning, or raises UserError if `data.on_bad_record` is "raise".
    """
    last_image, pixels_of_image = None, None
    for sample in samples:
        if sample.image is not last_image:  # questions about one image follow each other
            last_image, pixels_of_image = sample.image, processor.load_pixels(sample.image)
        example, pixels = sample.example, pixels_of_image
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
            slots = sample.slot_data()
            encode = functools.partial(processor.encode_example, pixels, asked.question)
            rows = {True: encode(tags, None, *encode_args, context, slots) | fields}
            rows[False] = encode((), None, *encode_args, "", slots) | fields if tags or context else rows[True]
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


def image_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of a sample's image, in pixels."""
    return images.to_pil_image(sample.image).size
