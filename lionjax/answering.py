# SPDX-License-Identifier: Apache-2.0
"""From questions in words to answers in words: prompts as LION writes them, few shapes to compile, texts read back.

Rows of any length are padded to one of a few sizes, so that asking again compiles nothing. Talking to a model and
evaluating it both go through `Answerer.say`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import sharding
from lionjax.config import AnswerConfig
from lionjax.data import pictures
from lionjax.data.processors import Processor
from lionjax.data.tasks import Box, box_text
from lionjax.generate import generate
from lionjax.interfaces import Batch, Params, System, UserError
from lionjax.scores import GenerateConfig

ROWS = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
SHORT = 16  # tokens of an answer of a word or two
SHORT_TASKS = ("vqa", "relation", "existence")

PLACE = "{box}"  # where a prompt wants a box written
NUMBER = r"\s*(\d*\.?\d+)\s*"
BOX = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]")
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
    words = [box_text(pictures.unit_box(box)) for box in boxes]
    places = prompt.count(PLACE)
    if places > len(words):
        raise UserError(
            f"the prompt has {places} {PLACE} and {len(words)} boxes were given; give one for each"
        )
    for word in words[:places]:
        prompt = prompt.replace(PLACE, word, 1)
    left = "".join(words[places:])
    return f"{prompt.rstrip()} {left}" if left else prompt


def boxes_in(text: str) -> np.ndarray:
    """All boxes `[x0,y0,x1,y1]` of a text, (K, 4) in 0..1, cut at the picture's edges; none without area."""
    found_K4 = np.array([box.groups() for box in BOX.finditer(text)], float).reshape(-1, 4)
    found_K4 = np.clip(found_K4, 0, 1)
    return found_K4[(found_K4[:, 2:] > found_K4[:, :2]).all(axis=1)]


def settings(
    answer: AnswerConfig, processor: Processor, category: str, task: str = ""
) -> GenerateConfig:
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
    )


def bucket(size: int, buckets: Sequence[int], most: int) -> int:
    """The smallest of `buckets` that holds `size`, or `most` where that is smaller or none does."""
    return min([b for b in buckets if b >= size] + [most])


@dataclasses.dataclass
class Answerer:
    """A model that answers: its system and parameters, the processor it was trained with, the mesh it lies on.

    `tokens` were generated in `seconds`, counting the calls that compiled nothing.
    """

    system: System
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
    ) -> list[str]:
        """The answer to each row. `blind` shows a blank picture: the mean color of all, which normalises to zero.

        `least`: rows, and lengths of prompt and question, that the batch is padded to at least.
        """
        texts: list[str] = []
        for start in range(0, len(rows), ROWS[-1]):
            part = rows[start : start + ROWS[-1]]
            batch = self.batch(part, least)
            if blind:
                batch = dataclasses.replace(batch, image_BHWC=np.zeros_like(batch.image_BHWC))
            ids_BM = self.ids(batch, config, len(part), key)
            texts += [self.processor.decode(ids) for ids in ids_BM]
        return texts

    def batch(self, rows: Sequence[Row], least: tuple[int, int, int] = (1, 1, 1)) -> Batch:
        """Rows as a batch of a size that few others have: the last row is repeated, and padding is added or cut."""
        missing = bucket(max(len(rows), least[0]), ROWS, ROWS[-1]) - len(rows)
        rows = [*rows, *[rows[-1]] * missing]
        prompt, question = lengths(rows)
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        wanted = {"prompt": max(prompt, least[1]), "question": max(question, least[2]), "target": 1}
        for name, length in wanted.items():
            for field in (name, f"{name}_mask"):
                stacked[field] = stacked[field][:, :length]
        return self.processor.assemble(stacked)

    def ids(self, batch: Batch, config: GenerateConfig, rows: int, key=None) -> np.ndarray:
        """Generated ids (rows, M) of the first rows of a batch."""
        shape = (config, batch.image_BHWC.shape, batch.prompt_BL.shape, batch.question_BL.shape)
        began = time.perf_counter()
        with sharding.use(self.mesh):
            placed = sharding.put_batch(batch, self.mesh) if self.mesh.size > 1 else batch
            made = jax.device_get(generate(self.system, self.params, placed, config, key))
        if shape in self.known:
            self.tokens += int(made.length_B[:rows].sum())
            self.seconds += time.perf_counter() - began
        self.known.add(shape)
        return made.ids_BM[:rows]


def lengths(rows: Sequence[Row]) -> tuple[int, int]:
    """The bucketed lengths of prompt and question that hold all of some rows."""
    prompt, question = (
        bucket(max(int(row[mask].sum()) for row in rows), LENGTHS, rows[0][mask].shape[0])
        for mask in ("prompt_mask", "question_mask")
    )
    return prompt, question
