# SPDX-License-Identifier: Apache-2.0
"""From questions in words to answers in words: prompts as LION writes them, few shapes to compile, texts read back.

Rows of any length are padded to one of a few sizes, so that asking again compiles nothing. Talking to a model and
evaluating it both go through `Answerer.say`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.experiment import AnswerConfig
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.data import images
from lionjax.data.boxes import BOX, Box, box_text
from lionjax.data.letterbox import Square
from lionjax.data.processor import Processor
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerateConfig, Generated
from lionjax.models.vision.sam_decoder import to_picture
from lionjax.nn.losses import answer_nats

ROWS = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
SHORT = 16  # tokens of an answer of a word or two
SHORT_TASKS = ("vqa", "relation", "existence", "box_vqa")

PLACE = "{box}"  # where a prompt wants a box written
LOCATION = re.compile(
    r"\b(where|locat\w*|coordinates?|positions?|bounding|with (a |the )?box|box(es)? (of|for|around|after)|region|"
    r"point (out|to)|segment\w*|mask|outline|every pixel|cut out)\b",
    re.IGNORECASE,
)

Row = Mapping[str, np.ndarray]  # one question as `Processor.row` makes it


def category_of(prompt: str) -> str:
    """The router's row for a prompt: "region_level" where it names a box or asks for a place, else "image_level"."""
    return "region_level" if BOX.search(prompt) or LOCATION.search(prompt) else "image_level"


def with_boxes(prompt: str, boxes: Sequence[Box]) -> str:
    """The prompt with boxes as `[x0,y0,x1,y1]`: one at each `{box}` in turn, those left over at the end.

    Raises UserError for a box outside 0..1 or without area, and for a `{box}` that no box is given for.
    """
    words = [box_text(images.unit_box(box)) for box in boxes]
    places = prompt.count(PLACE)
    if places > len(words):
        raise UserError(f"the prompt has {places} {PLACE} and {len(words)} boxes were given; give one for each")
    for word in words[:places]:
        prompt = prompt.replace(PLACE, word, 1)
    left = "".join(words[places:])
    return f"{prompt.rstrip()} {left}" if left else prompt


def boxes_in(text: str) -> np.ndarray:
    """All boxes `[x0,y0,x1,y1]` of a text, (K, 4) in 0..1, cut at the picture's edges; none without area."""
    found_K4 = np.array([box.groups() for box in BOX.finditer(text)], float).reshape(-1, 4)
    found_K4 = np.clip(found_K4, 0, 1)
    return found_K4[(found_K4[:, 2:] > found_K4[:, :2]).all(axis=1)]


def settings(answer: AnswerConfig, processor: Processor, category: str, task: str = "") -> GenerateConfig:
    """How to generate the answer to one kind of prompt.

    LION's release punishes repetition everywhere, also of the digits and commas of a box, which repeat by right; here
    only image-level prompts are answered with the penalty. Tasks answered by a word or two stop after a few tokens.
    """
    tokenizer = processor.tokenizer
    longest = answer.max_new_tokens or processor.config.target_length
    return GenerateConfig(
        max_new_tokens=min(longest, SHORT) if task in SHORT_TASKS else longest,
        beams=answer.beams,
        length_penalty=answer.length_penalty,
        repetition_penalty=1.0 if category == "region_level" else answer.repetition_penalty,
        eos=tokenizer.end_id,
        pad=tokenizer.pad_id,
        start=0 if processor.config.reader == "encoder" else None,
    )


def bucket(size: int, buckets: Sequence[int], most: int) -> int:
    """The smallest of `buckets` that holds `size`, or `most` where that is smaller or none does."""
    return min([b for b in buckets if b >= size] + [most])


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer: its text, in which all boxes stand in digits, those boxes (K, 4) in 0..1 of the picture, and masks.

    Masks (K, height, width) are those of boxes that the model pointed at; None where they were not asked for.
    """

    text: str
    boxes: np.ndarray
    masks: np.ndarray | None = None


@functools.partial(jax.jit, static_argnames=("system",))
def locate(system: VLM, params: Params, batch: Batch):
    """Boxes (B, K, 4) at the triggers of the given answers, and which are real."""
    box_BK4, _, real_BK = system.predict_boxes(params, batch)
    return box_BK4, real_BK


@functools.partial(jax.jit, static_argnames=("system",))
def segment(system: VLM, params: Params, batch: Batch, kept):
    """Mask logits (B, K, h, w) of the places that answers kept."""
    asked_BK = jnp.arange(kept["box"].shape[1]) < kept["count"][:, None]
    return system.predict_masks(params, batch, kept["box"], kept["state"], asked_BK)[0]


@functools.partial(jax.jit, static_argnames=("system",))
def unlikely(system: VLM, params: Params, batch: Batch):
    """-log p of the given answers, summed over their tokens: (B,)."""
    return answer_nats(system.logits(params, batch), batch.target_BM, batch.loss_mask_BM)


@dataclasses.dataclass
class Answerer:
    """A model that answers: its system and parameters, the processor it was trained with, the mesh it lies on.

    `tokens` were generated in `seconds`, counting the calls that compiled nothing.
    """

    system: VLM
    params: Params
    processor: Processor
    mesh: Mesh
    tokens: int = 0
    seconds: float = 0.0
    known: set = dataclasses.field(default_factory=set)  # what has been compiled

    def say(
        self,
        rows: Sequence[Row],
        config: GenerateConfig,
        blind: bool = False,
        least: tuple[int, int, int] = (1, 1, 1),
        key=None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Said]:
        """The answer to each row. `blind` shows a blank picture: the mean color of all, which normalises to zero.

        `least`: rows, and lengths of prompt and question, that the batch is padded to at least. `sizes` (width,
        height) of the pictures: masks are made too, as large as these.
        """
        answers: list[Said] = []
        for start in range(0, len(rows), ROWS[-1]):
            part = rows[start : start + ROWS[-1]]
            batch = self.batch(part, least)
            if blind:
                batch = blank(batch)
            made = self.made(batch, config, len(part), key)
            masks = [None] * len(part)
            if sizes is not None:
                masks = self.masks(batch, made, sizes[start : start + ROWS[-1]])
            answers += [self.said(made, *given) for given in zip(range(len(part)), part, masks)]
        return answers

    def said(self, made: Generated, number: int, row: Row, masks) -> Said:
        """One generated answer in words, its boxes on the picture."""
        told = [] if made.kept is None else made.kept["box"][number].tolist()
        text, boxes = self.processor.read(made.ids_BM[number], told, Square(*row["size"].tolist()))
        pointed = made.kept is not None and made.kept["count"][number] > 0
        found = np.array(boxes, float).reshape(-1, 4) if pointed else boxes_in(text)
        return Said(text, found, masks)

    def masks(self, batch: Batch, made: Generated, sizes) -> list[np.ndarray]:
        """The masks (K, height, width) of each answer's places; none of a system that makes none."""
        if made.kept is None or batch.sam_image_BHWC is None:
            return [np.zeros((0, height, width), bool) for width, height in sizes]
        with sharding.use(self.mesh):
            placed = sharding.put_whole(batch, self.mesh)
            logits_BKHW = sharding.fetch(segment(self.system, self.params, placed, made.kept))
        pixels, masks = batch.sam_image_BHWC.shape[1], []
        location = self.processor.codec.location
        for number, (width, height) in enumerate(sizes):
            # A trigger at the very end has no place behind it.
            count = min(int((made.ids_BM[number] == location).sum()), logits_BKHW.shape[1])
            inside = Square(width, height).inside(pixels)
            logits_KHW = logits_BKHW[number, :count]
            masks.append(to_picture(logits_KHW, pixels, inside, (height, width)) > 0)
        return masks

    def locate(self, rows: Sequence[Row], least=(1, 1, 1), blind: bool = False) -> list[np.ndarray]:
        """The boxes (K, 4) that the model points at in rows with answers, each read behind the true words before it."""
        found = []
        for start in range(0, len(rows), ROWS[-1]):
            part = rows[start : start + ROWS[-1]]
            batch = self.batch(part, least, answers=True)
            batch = blank(batch) if blind else batch
            with sharding.use(self.mesh):
                placed = sharding.put_whole(batch, self.mesh)
                box_BK4, real_BK = sharding.fetch(locate(self.system, self.params, placed))
            for row, box_K4, real_K in zip(part, box_BK4, real_BK):
                square, box_K4 = Square(*row["size"].tolist()), np.clip(box_K4[real_K], 0, 1)
                low_K2 = np.minimum(box_K4[:, :2], box_K4[:, 2:])
                box_K4 = np.concatenate([low_K2, np.maximum(box_K4[:, :2], box_K4[:, 2:])], 1)
                found.append(np.array([square.back(box) for box in box_K4]).reshape(-1, 4))
        return found

    def rank(self, rows: Sequence[Row]) -> np.ndarray:
        """How unlikely each row's own answer is, in nats summed over its tokens: (rows,)."""
        nats = []
        for start in range(0, len(rows), ROWS[-1]):
            part = rows[start : start + ROWS[-1]]
            batch = self.batch(part, answers=True)
            with sharding.use(self.mesh):
                placed = sharding.put_whole(batch, self.mesh)
                found_B = sharding.fetch(unlikely(self.system, self.params, placed))
            nats += found_B[: len(part)].tolist()
        return np.array(nats)

    def batch(self, rows: Sequence[Row], least: tuple[int, int, int] = (1, 1, 1), answers: bool = False) -> Batch:
        """Rows as a batch of a size that few others have: the last row is repeated, and padding is added or cut."""
        missing = bucket(max(len(rows), least[0]), ROWS, ROWS[-1]) - len(rows)
        rows = [*rows, *[rows[-1]] * missing]
        prompt, question = lengths(rows)
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        wanted = {"prompt": max(prompt, least[1]), "question": max(question, least[2])}
        wanted |= {} if answers else {"target": 1}
        for name, length in wanted.items():
            for field in (name, f"{name}_mask"):
                stacked[field] = stacked[field][:, :length]
        return self.processor.assemble(stacked)

    def made(self, batch: Batch, config: GenerateConfig, rows: int, key=None) -> Generated:
        """What is generated for a batch, of which the first `rows` count."""
        batch = dataclasses.replace(batch, sam_image_BHWC=None)  # words need no large picture
        shape = (config, batch.image_BHWC.shape, batch.prompt_BL.shape, batch.question_BL.shape)
        began = time.perf_counter()
        with sharding.use(self.mesh):
            placed = sharding.put_whole(batch, self.mesh)
            made = sharding.fetch(generate(self.system, self.params, placed, config, key))
        if shape in self.known:
            self.tokens += int(made.length_B[:rows].sum())
            self.seconds += time.perf_counter() - began
        self.known.add(shape)
        return made


def blank(batch: Batch) -> Batch:
    """The batch with blank pictures."""
    large = batch.sam_image_BHWC
    return dataclasses.replace(
        batch,
        image_BHWC=np.zeros_like(batch.image_BHWC),
        sam_image_BHWC=None if large is None else np.zeros_like(large),
    )


def lengths(rows: Sequence[Row]) -> tuple[int, int]:
    """The bucketed lengths of prompt and question that hold all of some rows."""
    prompt, question = (
        bucket(max(int(row[mask].sum()) for row in rows), LENGTHS, rows[0][mask].shape[0])
        for mask in ("prompt_mask", "question_mask")
    )
    return prompt, question
