# SPDX-License-Identifier: Apache-2.0
"""A picture and a question become arrays. The same way in training, in evaluation and in talk.

The picture is shrunk to a square and normalised as CLIP's were. The question is read twice: bare by the
Q-Former, and by the language model behind LION's sentence about tags. Texts are padded on the right to
fixed lengths, so that nothing is compiled twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lionjax.data import pictures, tokenizer
from lionjax.interfaces import CATEGORIES, Batch, UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# LION's words. The sentinel's embedding is learned: how far the tags are to be trusted.
TAGS_BEFORE = f"According to {tokenizer.SOFT_PROMPT}, you are allowed to use or partially use the following tags:"


@dataclass(frozen=True)
class ProcessorConfig:
    """Sizes and tokenizers: `"tiny"`, or a local folder with T5's for the language model and BERT's for the Q-Former.

    Lengths count tokens with the end token. `tags` puts LION's sentence about tags before the question.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    tokenizer: str = "tiny"
    question_tokenizer: str = "tiny"
    prompt_length: int = 128
    question_length: int = 128
    target_length: int = 128
    tags: bool = True
    max_pixels: int = pictures.MAX_PIXELS

    def __post_init__(self):
        for field in (
            "image_size",
            "prompt_length",
            "question_length",
            "target_length",
            "max_pixels",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give at least 1")


@dataclass(frozen=True)
class Input:
    """One thing to ask. `image`: a path, the bytes of a file, a PIL picture or a uint8 array."""

    image: object
    question: str
    tags: tuple[str, ...] = ()
    category: str = "image_level"


class Processor:
    """Turns pictures, prompts and answers into the arrays of a `Batch`."""

    def __init__(self, config: ProcessorConfig):
        self.config = config
        self.tokenizer = tokenizer.load(config.tokenizer)
        self.question_tokenizer = tokenizer.load(config.question_tokenizer)
        if config.tags and self.tokenizer.soft_prompt_id is None:
            name = f"the tokenizer {config.tokenizer!r} has no {tokenizer.SOFT_PROMPT}"
            raise UserError(f"{name}, which tags need; set processor.tags to false")
        self._before_tags = self.tokenizer.encode(TAGS_BEFORE, special=True)
        # Questions repeat: the same wordings, the same words. Bounded, and shared by all threads.
        self._ids = functools.lru_cache(50_000)(lambda text: tuple(self.tokenizer.encode(text)))
        self._question_ids = functools.lru_cache(50_000)(
            lambda text: tuple(self.question_tokenizer.encode(text))
        )

    def __reduce__(self):
        return Processor, (self.config,)

    # ------------------------------------------------------------------ pictures

    def pixels(self, source, window: pictures.Box = pictures.WHOLE) -> np.ndarray:
        """A picture as uint8 (size, size, 3); see `pictures.as_picture` for what may be given."""
        picture = pictures.as_picture(source, max_pixels=self.config.max_pixels)
        return pictures.resize(picture, self.config.image_size, window)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., 3) to float32: divided by 255, less the mean, by the deviation."""
        image = pixels.astype(np.float32)
        # A row of pixels at a time: three numbers at a time keep numpy busy with its own loop.
        rows = image.reshape(*pixels.shape[:-2], -1)
        mean, std = (
            np.tile(np.float32(c), pixels.shape[-2]) for c in (self.config.mean, self.config.std)
        )
        rows /= np.float32(255)
        rows -= mean
        rows /= std
        return image

    def image(self, source) -> np.ndarray:
        """A picture as a model reads it, float32 (size, size, 3)."""
        return self.normalise(self.pixels(source))

    # ------------------------------------------------------------------ texts

    def prompt(self, question: str, tags: Sequence[str] = ()) -> list[int]:
        """Ids for the language model: LION's sentence about tags where there are any, then the question.

        What is too long loses tags from the end of the list, never the learned slot nor a word of the question.
        """
        room = self.config.prompt_length - 1
        asked = self._ids(_asked(question))
        if not (self.config.tags and tags):
            ids = list(asked)
        else:
            room_for_tags = room - len(self._before_tags) - len(asked)
            ids = [*self._before_tags, *self._tags(tags, room_for_tags), *asked]
        if len(ids) > room:
            raise UserError(
                f"the prompt {question[:40]!r} takes {len(ids) + 1} tokens where the model takes {room + 1}; "
                "shorten it, or raise processor.prompt_length"
            )
        return self.tokenizer.frame(ids, self.config.prompt_length)

    def _tags(self, tags: Sequence[str], room: int) -> tuple[int, ...]:
        """The list in brackets with as many of the first tags as fit; with none if it must be."""
        words = [tag.strip() for tag in tags if tag.strip()]
        for kept in range(len(words), -1, -1):
            ids = self._ids(f"[{', '.join(words[:kept])}].")
            if len(ids) <= room or not kept:
                return ids
        return ids

    def question(self, question: str) -> list[int]:
        """Ids of the bare question for the Q-Former; a long one loses its front, as in LION."""
        ids = list(self._question_ids(_asked(question)))
        return self.question_tokenizer.frame(ids, self.config.question_length, keep="back")

    def target(self, answer: str) -> list[int]:
        """Ids of an answer, closed by the end token; a long one loses its back."""
        return self.tokenizer.frame(list(self._ids(answer)), self.config.target_length)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the end token."""
        return self.tokenizer.decode(ids).strip()

    # ------------------------------------------------------------------ arrays

    def row(
        self,
        pixels: np.ndarray,
        question: str,
        tags=(),
        answer: str | None = None,
        category: str = "image_level",
    ) -> dict[str, np.ndarray]:
        """One example as arrays of fixed shape, which stack to what `assemble` reads."""
        c = self.config
        asked = _padded(self.prompt(question, tags), c.prompt_length, self.tokenizer.pad_id)
        bare = _padded(self.question(question), c.question_length, self.question_tokenizer.pad_id)
        learned = [] if answer is None else self.target(answer)
        said = _padded(learned, c.target_length, self.tokenizer.pad_id)
        names = ("prompt", "question", "target")
        texts = dict(zip(names, (asked, bare, said)))
        masks = {f"{name}_mask": mask for name, (_, mask) in texts.items()}
        ids = {name: ids for name, (ids, _) in texts.items()}
        return {"pixels": pixels, "task": np.int32(_task(category)), **ids, **masks}

    def assemble(self, rows: dict[str, np.ndarray], buckets: Sequence[int] = ()) -> Batch:
        """Stacked rows as a `Batch`. Texts are padded to the shortest of `buckets` that holds them all, if given."""
        text = {}
        for name in ("prompt", "question", "target"):
            ids, mask = rows[name], rows[f"{name}_mask"]
            longest = int(mask.sum(1).max(initial=1))
            length = min((b for b in buckets if b >= longest), default=ids.shape[1])
            text[name], text[f"{name}_mask"] = ids[:, :length], mask[:, :length]
        return Batch(
            image_BHWC=self.normalise(rows["pixels"]),
            prompt_BL=text["prompt"],
            prompt_mask_BL=text["prompt_mask"],
            question_BL=text["question"],
            question_mask_BL=text["question_mask"],
            target_BM=text["target"],
            target_mask_BM=text["target_mask"],
            loss_mask_BM=text["target_mask"],
            task_B=rows["task"],
            record_B=rows.get("record", np.arange(len(rows["task"]), dtype=np.int32)),
            boxes_BK4=rows.get("boxes"),
            boxes_mask_BK=rows.get("boxes_mask"),
        )

    def batch(
        self,
        inputs: Sequence[Input],
        answers: Sequence[str] | None = None,
        buckets: Sequence[int] = (),
    ) -> Batch:
        """A `Batch` of questions, with their answers when a loss is wanted."""
        if not inputs:
            raise UserError("there is nothing to ask; give at least one picture and one question")
        said = [None] * len(inputs) if answers is None else list(answers)
        if len(said) != len(inputs):
            raise UserError(
                f"{len(said)} answers were given for {len(inputs)} questions; give one each"
            )
        rows = [
            self.row(self.pixels(one.image), one.question, one.tags, answer, one.category)
            for one, answer in zip(inputs, said)
        ]
        return self.assemble(
            {key: np.stack([row[key] for row in rows]) for key in rows[0]}, buckets
        )


def _asked(question: str) -> str:
    if not question.strip():
        raise UserError("the prompt is empty; ask something about the picture")
    return question.strip()


def _task(category: str) -> int:
    if category not in CATEGORIES:
        raise UserError(f"there is no category {category!r}; choose {' or '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def _padded(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    row, mask = np.full(length, pad, np.int32), np.zeros(length, np.int32)
    row[: len(ids)], mask[: len(ids)] = ids, 1
    return row, mask
