# SPDX-License-Identifier: Apache-2.0
"""The inference engine: encoded examples to answers, in batches of a few bucketed shapes.

Batches are padded to one of a few sizes, so that further calls compile nothing. `Model.answer` and the evaluation both
go through `InferenceEngine.generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.experiment import DecodingConfig, GenerationDefaults
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.data import images
from lionjax.data.boxes import BOX_PATTERN, Box, box_around, box_to_text
from lionjax.data.letterbox import Letterbox
from lionjax.data.mask_answers import mask_phrases
from lionjax.data.processor import Processor
from lionjax.data.regions import ImageRegions
from lionjax.inference.answer_mesh import free_bytes, session_sizes, slot_bytes
from lionjax.inference.answer_request import AnswerRequest, Finished, SessionSizes
from lionjax.inference.candidates import candidate_nll, target_nll
from lionjax.inference.generate import generate
from lionjax.inference.image_pool import EncodedExample, ImagePools
from lionjax.inference.region_predictions import count_masks, masks_in_images, predict_boxes, predict_mask_logits
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, end_token_ids, require_finite, row_keys
from lionjax.inference.session import AnswerSession, blank_rows

BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32)
LENGTH_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
SHORT_ANSWER_TOKENS = 16  # tokens of an answer of a word or two
SHORT_ANSWER_TASKS = ("vqa", "relation", "existence", "box_vqa")

BOX_PLACEHOLDER = "{box}"  # where a prompt wants a box written
REGION_PROMPT = re.compile(
    r"\b(where|locat\w*|coordinates?|positions?|bounding|with (a |the )?box|box(es)? (of|for|around|after)|region|"
    r"point (out|to)|segment\w*|mask|outline|every pixel|cut out)\b",
    re.IGNORECASE,
)


def prompt_category(prompt: str) -> str:
    """The router's row for a prompt: "region_level" where it names a box or asks for a place, else "image_level"."""
    return "region_level" if BOX_PATTERN.search(prompt) or REGION_PROMPT.search(prompt) else "image_level"


def insert_boxes(prompt: str, boxes: Sequence[Box]) -> str:
    """The prompt with boxes as `[x0,y0,x1,y1]`: one at each `{box}` in turn, those left over at the end.

    Raises UserError for a box outside 0..1 or without area, and for a `{box}` that no box is given for.
    """
    words = [box_to_text(images.normalize_box(box)) for box in boxes]
    places = prompt.count(BOX_PLACEHOLDER)
    if places > len(words):
        raise UserError(
            f"the prompt has {places} {BOX_PLACEHOLDER} and {len(words)} boxes were given; give one for each"
        )
    for word in words[:places]:
        prompt = prompt.replace(BOX_PLACEHOLDER, word, 1)
    left = "".join(words[places:])
    return f"{prompt.rstrip()} {left}" if left else prompt


def extract_boxes(text: str) -> np.ndarray:
    """All boxes `[x0,y0,x1,y1]` of a text, (K, 4) in 0..1, cut at the picture's edges; none without area."""
    found_K4 = np.array([box.groups() for box in BOX_PATTERN.finditer(text)], float).reshape(-1, 4)
    found_K4 = np.clip(found_K4, 0, 1)
    return found_K4[(found_K4[:, 2:] > found_K4[:, :2]).all(axis=1)]


def make_generation_config(
    defaults: GenerationDefaults, processor: Processor, category: str, task: str = ""
) -> GenerationConfig:
    """How to generate the answer to one kind of prompt.

    LION's release penalizes repetition everywhere, also of digits and commas in a box; here only answers to image-level
    prompts, unless `defaults.penalize_boxes` is set. Tasks answered by a word or two stop after a few tokens.
    """
    tokenizer, is_encoder = processor.tokenizer, processor.config.reader == "encoder"
    longest = defaults.max_new_tokens or processor.config.max_target_tokens
    longest = min(longest, SHORT_ANSWER_TOKENS) if task in SHORT_ANSWER_TASKS else longest
    penalized = category != "region_level" or defaults.penalize_boxes
    decoding = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(DecodingConfig)}
    decoding["repetition_penalty"] = defaults.repetition_penalty if penalized else 1.0
    decoding["penalize_prompt"] = defaults.penalize_prompt and not is_encoder
    start = defaults.decoder_start_token_id or 0
    return GenerationConfig(
        max_new_tokens=longest,
        min_length=min(defaults.min_new_tokens, longest) + is_encoder if defaults.min_new_tokens else 0,
        eos_token_id=tokenizer.eos_id if defaults.eos_token_id is None else defaults.eos_token_id,
        pad_token_id=tokenizer.pad_id if defaults.pad_token_id is None else defaults.pad_token_id,
        decoder_start_token_id=start if is_encoder else None,
        **decoding,
    )


def round_up_to_bucket(size: int, buckets: Sequence[int], max_size: int) -> int:
    """The smallest of `buckets` that holds `size`, or `most` where that is smaller or none does."""
    return min([b for b in buckets if b >= size] + [max_size])


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answers: `text` (boxes in it as digits), those `boxes` (K, 4) as x0 y0 x1 y1 in 0..1 of the image.

    `masks` (K, height, width) bool are those of boxes that the model decoded; None where none were asked for.
    `token_ids` are the generated ids with the end token, and `token_log_probs` their log-probabilities, if
    `GenerationConfig.output_logprobs` asks for them. `regions`: what the refiner of a model that reads some found.
    """

    text: str
    boxes: np.ndarray
    masks: np.ndarray | None = None
    token_ids: tuple[int, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    regions: ImageRegions | None = None

    @property
    def phrases(self) -> list[str]:
        """The phrase of each mask, or of each box, in the order of `text`; empty where the text has none."""
        return mask_phrases(self.text)


@dataclasses.dataclass(frozen=True)
class Question:
    """A request to `InferenceEngine.answer_stream`; `image_size` (width, height): also predict masks of this size."""

    request: AnswerRequest
    image_size: tuple[int, int] | None = None


@dataclasses.dataclass
class InferenceEngine:
    """A model that answers: its system and parameters, the processor it was trained with, the mesh it lies on.

    `tokens` were generated in `seconds`, counting the calls that compiled nothing.
    """

    model: VLM
    params: Params
    processor: Processor
    mesh: Mesh
    num_generated_tokens: int = 0
    generation_seconds: float = 0.0
    compiled_shapes: set = dataclasses.field(default_factory=set)  # what has been compiled
    image_pools: ImagePools = dataclasses.field(default_factory=ImagePools, init=False, repr=False)

    def generate(
        self,
        rows: Sequence[EncodedExample],
        config: GenerationConfig,
        image_blind: bool = False,
        min_shape: tuple[int, int, int] = (1, 1, 1),
        seeds: Sequence[int] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Answer]:
        """The answer to each row: in one batch of a bucketed shape if it holds all, else by `answer_stream`.

        `image_blind` replaces the images by blank ones (the mean color, which normalizes to zero). `min_shape`: rows,
        prompt tokens and question tokens that a batch is padded to at least. `seeds`: of the sampling of each row, by
        default 0. `image_sizes` (width, height): also predict masks, of these sizes. Raises UserError where the model
        computes NaN or infinity.
        """
        seeds = [0] * len(rows) if seeds is None else list(seeds)
        if len(rows) > BATCH_SIZE_BUCKETS[-1] and self.can_stream(config):
            sizes = [None] * len(rows) if image_sizes is None else image_sizes
            requests = (
                Question(AnswerRequest(row, seed, image_blind), size) for row, seed, size in zip(rows, seeds, sizes)
            )
            found = dict(self.answer_stream(requests, config, bucketed_lengths(rows)))
            return [found[number] for number in range(len(rows))]
        answers: list[Answer] = []
        for start in range(0, len(rows), BATCH_SIZE_BUCKETS[-1]):
            part = rows[start : start + BATCH_SIZE_BUCKETS[-1]]
            batch = self.collate(part, min_shape)
            batch = blank_images(batch) if image_blind else batch
            key = None
            if config.do_sample:
                of_part = seeds[start : start + len(part)]
                key = row_keys([*of_part, *[0] * (len(batch.task_B) - len(part))])
            with self._timed(config, batch) as timing, sharding.use_mesh(self.mesh):
                # Text generation does not read SAM's large images.
                placed = sharding.shard_global_batch(dataclasses.replace(batch, sam_image_BHWC=None), self.mesh)
                output = sharding.gather_to_host(generate(self.model, self.params, placed, config, key))
                require_finite_output(output, len(part))
                timing.num_tokens = int(output.length_B[: len(part)].sum())
            masks: Sequence = [None] * len(part)
            if image_sizes is not None:
                masks = self.predict_masks(batch, output, image_sizes[start : start + BATCH_SIZE_BUCKETS[-1]])
            answers += [
                self.decode_output(output, k, row, mask, config) for k, (row, mask) in enumerate(zip(part, masks))
            ]
        return answers

    def can_stream(self, config: GenerationConfig) -> bool:
        """Whether answers can be generated in slots (`answer_stream`): without beams."""
        return config.num_beams == 1 and self.model.info.rows_can_join

    def open_session(
        self, config: GenerationConfig, row: EncodedExample, lengths: tuple[int, int], sizes: SessionSizes | None = None
    ) -> AnswerSession:
        """A session (`inference.session`) for rows like `row`, of `lengths` or longer; `sizes`: default by memory."""
        if sizes is None:
            free = free_bytes(self.mesh, self.params)
            arguments = ([row], lengths, True)
            one_slot = free and slot_bytes(self.model, self.params, self._collate_exactly(*arguments), config)
            sizes = session_sizes(self.mesh, lengths, one_slot, free)
        return AnswerSession(self.model, self.params, self.mesh, self._collate_exactly, config, sizes, self.image_pools)

    def answer_stream(
        self, questions: Iterable[Question], config: GenerationConfig, lengths: tuple[int, int]
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (number, answer) of each question as it is answered, in slots; numbers count from 0.

        `lengths`: of prompt and question in tokens, which most have at most. Masks are predicted for several answers at
        once. Raises UserError where the model computes NaN or infinity.
        """
        questions = iter(questions)
        if (first := next(questions, None)) is None:
            return
        questions = itertools.chain([first], questions)
        session = self.open_session(config, first.request.row, lengths)
        image_sizes: dict[int, tuple[int, int]] = {}
        for_masks: list[Finished] = []

        def requests():
            for number, question in enumerate(questions):
                if question.image_size is not None:
                    image_sizes[number] = question.image_size
                yield question.request

        began = time.perf_counter()
        for finished in session.run(requests()):
            require_finite_output(finished.output, 1)
            size = image_sizes.get(finished.request_id)
            if size is None or not self.has_places(finished):
                masks = None if size is None else np.zeros((0, *size[::-1]), bool)
                row = finished.request.row
                yield finished.request_id, self.decode_output(finished.output, 0, row, masks, config)
                continue
            for_masks.append(finished)
            if len(for_masks) == BATCH_SIZE_BUCKETS[-1]:
                yield from self.answers_with_masks(for_masks, image_sizes, config)
                for_masks = []
        yield from self.answers_with_masks(for_masks, image_sizes, config)
        self.num_generated_tokens += session.num_tokens
        self.generation_seconds += time.perf_counter() - began

    def answers_with_masks(
        self,
        finished: Sequence[Finished],
        image_sizes: Mapping[int, tuple[int, int]],
        config: GenerationConfig,
        min_shape: tuple[int, int, int] = (1, 1, 1),
    ) -> Iterator[tuple[int, Answer]]:
        """(number, answer) with the masks of some finished requests, predicted in one batch padded to `min_shape`."""
        if not finished:
            return
        numbers = [one.request_id for one in finished]
        output = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[one.output for one in finished])
        batch = self.collate([one.request.row for one in finished], min_shape)
        missing = len(batch.task_B) - len(numbers)
        padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], missing, axis=0)]), output)
        masks = self.predict_masks(batch, padded, [image_sizes[number] for number in numbers])
        for k, (one, mask) in enumerate(zip(finished, masks)):
            yield one.request_id, self.decode_output(output, k, one.request.row, mask, config)

    @contextlib.contextmanager
    def _timed(self, config: GenerationConfig, batch: Batch) -> Iterator[SimpleNamespace]:
        """Counts tokens and seconds of a call, unless it compiles a program for new shapes."""
        shape = (config, batch.image_BHWC.shape, batch.prompt_BL.shape, batch.question_BL.shape)
        began, timing = time.perf_counter(), SimpleNamespace(num_tokens=0)
        yield timing
        if shape in self.compiled_shapes:
            self.num_generated_tokens += timing.num_tokens
            self.generation_seconds += time.perf_counter() - began
        self.compiled_shapes.add(shape)

    def decode_output(
        self, output: GenerateOutput, index: int, row: EncodedExample, masks, config: GenerationConfig
    ) -> Answer:
        """One generated answer as text, with its boxes in fractions of the original image."""
        regions, letterbox = output.aux_outputs, Letterbox(*row["size"].tolist())
        decoded_boxes: list = [] if regions is None or "box" not in regions else regions["box"][index].tolist()
        if masks is not None and (token := self.model.info.mask_token) is not None:
            # Masks of an earlier answer, which is in the prompt, come first.
            masks = masks[int((row["prompt"] * row["prompt_mask"] == token).sum()) :]
            decoded_boxes = [box_around(mask_HW) for mask_HW in masks]
        length = int(output.length_B[index])
        token_ids = output.ids_BM[index, :length].tolist()
        log_probs = () if output.logprob_BM is None else output.logprob_BM[index, :length].tolist()
        has_end = bool(token_ids) and token_ids[-1] in end_token_ids(config)
        # An end token of the tokenizer that does not end this model's answers is left out, as all special tokens are.
        text_ids = [i for i in token_ids[: len(token_ids) - has_end] if i != self.processor.tokenizer.eos_id]
        text, boxes = self.processor.prompt.decode_with_boxes(text_ids, decoded_boxes, letterbox)
        if self.processor.prompt.stop_text:
            text = text.partition(self.processor.prompt.stop_text)[0].rstrip()
        has_region_boxes = regions is not None and (regions["count"][index] > 0 or bool(decoded_boxes))
        box_K4 = np.array(boxes, float).reshape(-1, 4) if has_region_boxes else extract_boxes(text)
        return Answer(text, box_K4, masks, tuple(token_ids), tuple(log_probs))

    def predict_masks(self, batch: Batch, output: GenerateOutput, image_sizes) -> list[np.ndarray]:
        """The masks (K, height, width) of each answer's places; none of a system that makes none."""
        count_B = self._count_masks(batch.prompt_BL, batch.prompt_mask_BL, output)
        if batch.sam_image_BHWC is None or not count_B.any():
            return [np.zeros((0, height, width), bool) for width, height in image_sizes]
        with sharding.use_mesh(self.mesh):
            placed = sharding.shard_global_batch(batch, self.mesh)
            logits_BKHW = sharding.gather_to_host(
                predict_mask_logits(self.model, self.params, placed, output.aux_outputs, count_B)
            )
        require_finite(np.isfinite(logits_BKHW[: len(image_sizes)]).all(axis=(1, 2, 3)), "masks")
        pixels = batch.sam_image_BHWC.shape[1]
        return masks_in_images(logits_BKHW, count_B, image_sizes, pixels, self.processor.sam_corner)

    def has_places(self, finished: Finished) -> bool:
        """Whether an answer has places with masks; for others SAM need not read the image."""
        row = finished.request.row
        return bool(self._count_masks(row["prompt"][None], row["prompt_mask"][None], finished.output).any())

    def _count_masks(self, prompt_BL, prompt_mask_BL, output: GenerateOutput) -> np.ndarray:
        location = self.processor.prompt.box_codec.box_token_id
        return count_masks(self.model.info.mask_token, location, prompt_BL, prompt_mask_BL, output)

    def teacher_forced_boxes(
        self, rows: Sequence[EncodedExample], min_shape=(1, 1, 1), image_blind: bool = False
    ) -> list[np.ndarray]:
        """The boxes (K, 4) that the model points at in rows with answers, each read behind the true words before it."""
        found = []
        for start in range(0, len(rows), BATCH_SIZE_BUCKETS[-1]):
            part = rows[start : start + BATCH_SIZE_BUCKETS[-1]]
            batch = self.collate(part, min_shape, with_targets=True)
            batch = blank_images(batch) if image_blind else batch
            padded = [*part, *part[-1:] * (len(batch.task_B) - len(part))]
            with self.image_pools.lock, sharding.use_mesh(self.mesh):
                pool, place_B = self.image_pools.find(padded, image_blind)
                batch = batch if pool is None else dataclasses.replace(batch, image_BHWC=None)
                placed = sharding.shard_global_batch((batch, place_B), self.mesh)
                boxes = predict_boxes(self.model, self.params, *placed, pool)
            box_BK4, real_BK = sharding.gather_to_host(boxes)
            is_finite_BK = np.isfinite(box_BK4).all(axis=2) | ~real_BK.astype(bool)
            require_finite(is_finite_BK.all(axis=1)[: len(part)], "boxes")
            for row, box_K4, real_K in zip(part, box_BK4, real_BK):
                square, box_K4 = Letterbox(*row["size"].tolist()), np.clip(box_K4[real_K], 0, 1)
                low_K2 = np.minimum(box_K4[:, :2], box_K4[:, 2:])
                box_K4 = np.concatenate([low_K2, np.maximum(box_K4[:, :2], box_K4[:, 2:])], 1)
                found.append(np.array([square.from_padded(box) for box in box_K4]).reshape(-1, 4))
        return found

    def answer_nll(self, rows: Sequence[EncodedExample]) -> np.ndarray:
        """How unlikely each row's own answer is, in nats summed over its tokens: (rows,)."""
        nats = []
        for start in range(0, len(rows), BATCH_SIZE_BUCKETS[-1]):
            part = rows[start : start + BATCH_SIZE_BUCKETS[-1]]
            batch = self.collate(part, with_targets=True)
            with sharding.use_mesh(self.mesh):
                placed = sharding.shard_global_batch(batch, self.mesh)
                found_B = sharding.gather_to_host(target_nll(self.model, self.params, placed))
            nats += found_B[: len(part)].tolist()
        require_finite(np.isfinite(nats), "losses")
        return np.array(nats)

    def candidate_nll(self, groups: Sequence[Sequence[EncodedExample]]) -> list[np.ndarray]:
        """As `answer_nll` for groups of rows with one prompt and different answers: one array (K,) for each group.

        The prompt of a group is read once. A model whose answers hold boxes as embeddings reads it for each answer.
        """
        info = self.model.info
        if info.box_token is not None or info.mask_token is not None or not info.rows_can_join:
            nats = self.answer_nll([row for group in groups for row in group])
            return np.split(nats, np.cumsum([len(group) for group in groups])[:-1])
        most = round_up_to_bucket(max(map(len, groups)), BATCH_SIZE_BUCKETS, max(map(len, groups)))
        lengths = [int(row["target_mask"].sum()) for group in groups for row in group]
        length = round_up_to_bucket(max(lengths), LENGTH_BUCKETS, groups[0][0]["target"].shape[0])
        found, prompts = [], max(1, BATCH_SIZE_BUCKETS[-1] // most)
        for start in range(0, len(groups), prompts):
            part = groups[start : start + prompts]
            batch = self.collate([group[0] for group in part], (min(prompts, len(groups)), 1, 1))
            padded = [[*group, *[group[-1]] * (most - len(group))] for group in part]
            padded += [padded[-1]] * (len(batch.task_B) - len(part))
            target_BKM, mask_BKM = (
                np.stack([np.stack([row[name][:length] for row in group]) for group in padded])
                for name in ("target", "loss_mask")
            )
            with sharding.use_mesh(self.mesh):
                placed = sharding.shard_global_batch((batch, target_BKM, mask_BKM), self.mesh)
                nats_BK = sharding.gather_to_host(candidate_nll(self.model, self.params, *placed))
            found += [nats_K[: len(group)] for group, nats_K in zip(part, nats_BK)]
        require_finite(np.isfinite(np.concatenate(found)), "losses")
        return found

    def collate(
        self, rows: Sequence[EncodedExample], min_shape: tuple[int, int, int] = (1, 1, 1), with_targets: bool = False
    ) -> Batch:
        """Rows as a batch of a size that few others have: the last row is repeated, and padding is added or cut."""
        count = round_up_to_bucket(max(len(rows), min_shape[0]), BATCH_SIZE_BUCKETS, BATCH_SIZE_BUCKETS[-1])
        rows = [*rows, *[rows[-1]] * (count - len(rows))]
        prompt, question = bucketed_lengths(rows)
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        wanted = {"prompt": max(prompt, min_shape[1]), "question": max(question, min_shape[2])}
        longest, most = int(stacked["target_mask"].sum(axis=1).max()), stacked["target_mask"].shape[1]
        wanted["target"] = round_up_to_bucket(longest, LENGTH_BUCKETS, most) if with_targets else 1
        for name, length in wanted.items():
            for field in (name, f"{name}_mask"):
                stacked[field] = stacked[field][:, :length]
        return self.processor.collate(stacked)

    def _collate_exactly(self, rows: Sequence[EncodedExample], lengths: tuple[int, int], with_images: bool) -> Batch:
        """Rows as a batch with prompt and question of exactly `lengths`, without targets and SAM's images."""
        dropped = () if with_images else ("pixels",)
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in ("sam", *dropped)}
        for name, length in (*zip(("prompt", "question"), lengths), ("target", 1)):
            for field in (name, f"{name}_mask"):
                stacked[field] = stacked[field][:, :length]
        stacked.setdefault("pixels", np.zeros((len(rows), 1, 1, 3), np.uint8))
        batch = self.processor.collate(stacked)
        return batch if with_images else dataclasses.replace(batch, image_BHWC=None)


def blank_images(batch: Batch) -> Batch:
    """The batch with blank pictures and regions of zeros."""
    return blank_rows(batch, np.ones(len(batch.task_B), bool))


def require_finite_output(output: GenerateOutput, num_rows: int) -> None:
    """Raise UserError where logits or decoded boxes of the first `num_rows` rows are NaN or infinite."""
    require_finite(output.is_finite_B[:num_rows])
    if (regions := output.aux_outputs) is not None and "box" in regions:
        unused_BK = np.arange(regions["box"].shape[1]) >= regions["count"][:, None]
        require_finite((np.isfinite(regions["box"]).all(axis=2) | unused_BK).all(axis=1)[:num_rows], "boxes")


def bucketed_lengths(rows: Sequence[EncodedExample]) -> tuple[int, int]:
    """The bucketed lengths of prompt and question that hold all of some rows."""
    prompt, question = (
        round_up_to_bucket(max(int(row[mask].sum()) for row in rows), LENGTH_BUCKETS, rows[0][mask].shape[0])
        for mask in ("prompt_mask", "question_mask")
    )
    return prompt, question
