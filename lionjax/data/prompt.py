# SPDX-License-Identifier: Apache-2.0
"""What becomes of the words of a row: a question, its tags and an answer as ids, and ids as words again.

The question is read twice: bare by the Q-Former, and by the language model behind LION's sentence about tags, in a
template such as Vicuna's. Boxes in texts are written as the model knows them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lionjax.core.types import UserError
from lionjax.data import boxes as places
from lionjax.data import images as pictures
from lionjax.data import tokenizer
from lionjax.data.chat import Form, spread
from lionjax.data.images import Box
from lionjax.data.letterbox import Square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STRETCHED = Square(1, 1)
# LION's words. The sentinel's embedding is learned: how far the tags are to be trusted.
FIRST_BIN = "<patch_index_0000>"  # of Kosmos-2's location tokens
TRIGGER, LOCATION = "<at>", "<boxes>"  # NExT-Chat's words for places, and for pictures
IMAGE_START, IMAGE_PATCH, IMAGE_END = "<im_start>", "<im_patch>", "<im_end>"
TAGS_BEFORE = f"According to {tokenizer.SOFT_PROMPT}, you are allowed to use or partially use the following tags:"


@dataclass(frozen=True)
class ProcessorConfig:
    """Sizes and tokenizers: `"tiny"`, or a local folder with T5's for the language model and BERT's for the Q-Former.

    Lengths count tokens with the end token. `tags` puts LION's sentence about tags before the question.
    `padded`: the picture lies in a square, and boxes are fractions of that; else it is stretched. The square is white
    as NExT-Chat's, or by `padding` "mean" of the mean color as LLaVA-1.5's.
    `reader`: an encoder reads the prompt up to an end token, a decoder from a start token (if it has one) on into the
    answer. `template` is what stands around a question; {image} is where so many `image_tokens` come, or the one
    `image_token` of a system that knows by itself how many words a picture has.
    `shot_end` closes the answer of an example that is shown before the question (OpenFlamingo: <|endofchunk|>),
    `answer_end` any other, `plain_end` what is said of a picture without a question; empty: the end token does.
    `next_turn` is the template of the questions that follow the first about one picture; empty: they are put as one
    question. `pictures`: how many a row has; what is left is filled with blank ones, which no token stands for.
    `places`: how the model writes boxes, see `places`; `bins` a side of location tokens stand where the tokenizer
    has Kosmos-2's, else behind its vocabulary (32 in Kosmos-2; 0: the model has none).
    `boxes`: how many boxes an example may have as arrays. `sam_size`: pixels of the picture and the masks for SAM.
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
    padded: bool = False
    padding: Literal["white", "mean"] = "white"
    reader: Literal["encoder", "decoder"] = "encoder"
    template: str = "{question}"
    image_tokens: int = 0
    image_token: int | None = None
    shot_end: str = ""
    answer_end: str = ""
    plain_end: str = ""
    next_turn: str = ""
    pictures: int = 1
    places: Literal["digits", "bins", "embeddings"] = "digits"
    bins: int = 0
    boxes: int = 0
    sam_size: int = 0

    def __post_init__(self):
        lengths = (*("image_size", "prompt_length", "question_length", "target_length", "max_pixels"), "pictures")
        for field in lengths:
            if getattr(self, field) < 1:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give at least 1")
        for field in ("image_tokens", "bins", "boxes", "sam_size"):
            if getattr(self, field) < 0:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give 0 or more")
        named = set(re.findall(r"{(\w+)}", self.template + self.next_turn))
        if unknown := sorted(named - {"question", "image"}):
            raise UserError(
                f"a template of processor says {{{unknown[0]}}}; only {{question}} and {{image}} are filled in"
            )
        if self.template.count("{question}") != 1 or self.template.count("{image}") > 1:
            raise UserError(
                f"processor.template is {self.template!r}; it wants {{question}} once, {{image}} at most once"
            )
        if self.next_turn and (self.next_turn.count("{question}") != 1 or "{image}" in self.next_turn):
            raise UserError(f"processor.next_turn is {self.next_turn!r}; it wants {{question}} once, and no {{image}}")
        if self.places == "embeddings" and not self.boxes:
            raise UserError("places are embeddings, but processor.boxes is 0; say how many at most")
        if self.places == "bins" and not self.bins:
            raise UserError("places are location tokens, but processor.bins is 0; say how many a side (Kosmos-2: 32)")
        if self.sam_size and not self.padded:
            raise UserError("processor.sam_size wants processor.padded, so that a box is the same place to SAM")


class Texts:
    """What a `Processor` does with words. Raises UserError for a tokenizer that lacks what the config wants."""

    def __init__(self, config: ProcessorConfig):
        self.config = config
        self.tokenizer = tokenizer.load(config.tokenizer)
        self.question_tokenizer = tokenizer.load(config.question_tokenizer)
        if config.tags and self.tokenizer.soft_prompt_id is None:
            name = f"the tokenizer {config.tokenizer!r} has no {tokenizer.SOFT_PROMPT}"
            raise UserError(f"{name}, which tags need; set processor.tags to false")
        self._before_tags = self.tokenizer.encode(TAGS_BEFORE, special=True)
        piece = self.tokenizer.backend.token_to_id
        first_bin = piece(FIRST_BIN) or self.tokenizer.size
        self.codec = places.Codec(first_bin, config.bins, piece(TRIGGER), piece(LOCATION))
        self._sides = self._both(config.template)
        self._sides_told = self._both(config.template.replace("{image}", ""))
        self._sides_next = self._both(config.next_turn or "{question}")
        ends = {"shot": config.shot_end or None, "answer": config.answer_end, "plain": config.plain_end}
        self._ends = {name: self._end(text) for name, text in ends.items()}
        # Questions repeat: the same wordings, the same words. Bounded, and shared by all threads.
        self._ids = functools.lru_cache(50_000)(lambda text: tuple(self.tokenizer.encode(text)))
        self._question_ids = functools.lru_cache(50_000)(lambda text: tuple(self.question_tokenizer.encode(text)))

    def _both(self, template: str) -> tuple[list[int], list[int]]:
        """Ids of both sides of a question."""
        before, after = template.split("{question}")
        return self._around(before), self._around(after)

    def _end(self, text: str | None) -> list[int]:
        """Ids that close an answer: the end token where none are said, nothing for None."""
        if text is None:
            return []
        return self.tokenizer.encode(text, special=True) if text else [self.tokenizer.end_id]

    def _around(self, text: str) -> list[int]:
        """Ids of one side of the template, with the picture's tokens where it says {image}."""
        ids: list[int] = []
        for number, part in enumerate(text.split("{image}")):
            if number:
                ids += self._picture()
            ids += self.tokenizer.encode(part.strip()) if part.strip() else []
        return ids

    def _picture(self) -> list[int]:
        """Ids that stand for a picture."""
        if self.config.image_token is not None:
            return [self.config.image_token]
        names = (IMAGE_START, *[IMAGE_PATCH] * self.config.image_tokens, IMAGE_END)
        return [self.tokenizer.id(name) for name in names]

    def spell(
        self, text: str, known: Iterable[Box] = (), square: Square = STRETCHED, how: str | None = None
    ) -> tuple[list[int], list[Box]]:
        """Ids of a text with its boxes written as the model writes them, and those boxes within its square.

        `known` are boxes with all their decimals. `how` is another way than the processor's own. Raises UserError for
        a box that is none where it must be more than digits.
        """
        how = how or self.config.places
        found = places.pieces(text, known)
        boxes = [square.into(piece) for piece in found if not isinstance(piece, str)]
        if how == "digits":
            if square.width != square.height:
                said = iter(map(places.box_text, boxes))
                text = "".join(piece if isinstance(piece, str) else next(said) for piece in found)
            return list(self._ids(text)), boxes
        boxes = [pictures.unit_box(box) for box in boxes]
        ids, rest = [], iter(boxes)
        for piece in found:
            if not isinstance(piece, str):
                ids += self.codec.ids(next(rest), how)
            elif piece.strip():
                ids += self._ids(piece.strip())
        return ids, boxes

    def prompt(self, question: str, tags: Sequence[str] = ()) -> list[int]:
        """Ids for the language model: LION's sentence about tags where there are any, then the question.

        What is too long loses tags from the end of the list, never the learned slot nor a word of the question.
        """
        return self._prompt(question, self.spell(stripped(question))[0], tags)

    def rounds(
        self, turns: Sequence[tuple[str, str]], pictured: bool, told: bool = False
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of what was asked and of what was answered before: about one picture, each about its own, or told."""
        if pictured and "{image}" not in self.config.template:
            raise UserError("shots want a processor.template that says where {image} stands")
        asked, said = [], []
        for number, (question, answer) in enumerate(turns):
            before, after = self._sides if pictured or not number else self._sides_next
            if told:
                before, after = self._sides_told
            asked.append([*before, *self.spell(stripped(question))[0], *after])
            end = self._ends["shot" if pictured else "answer"]
            said.append([*self.spell(stripped(answer))[0], *end])
        return asked, said

    def _prompt(
        self,
        question: str,
        asked: Sequence[int],
        tags: Sequence[str] = (),
        shown: Sequence[int] = (),
        sides: tuple[list[int], list[int]] | None = None,
    ) -> list[int]:
        before, after = self._sides if sides is None else sides
        reads_on = self.config.reader == "decoder"
        start = self.tokenizer.start if reads_on else []
        room = self.config.prompt_length - (len(start) if reads_on else 1)
        around = len(shown) + len(before) + len(after)
        if self.config.tags and tags:
            room_for_tags = room - around - len(self._before_tags) - len(asked)
            asked = [*self._before_tags, *self._tags(tags, room_for_tags), *asked]
        ids = [*shown, *before, *asked, *after]
        if len(ids) > room:
            whole = self.config.prompt_length
            raise UserError(
                f"the prompt {question[:40]!r} takes {len(ids) + whole - room} tokens where the model takes "
                f"{whole}; shorten it, or raise processor.prompt_length"
            )
        return [*start, *ids] if reads_on else self.tokenizer.frame(ids, self.config.prompt_length)

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
        ids = list(self._question_ids(stripped(question)))
        return self.question_tokenizer.frame(ids, self.config.question_length, keep="back")

    def target(self, answer: str) -> list[int]:
        """Ids of an answer, closed by the end token; a long one loses its back."""
        return self.closed(self.spell(answer)[0])

    def closed(self, ids: Sequence[int], end: str = "answer") -> list[int]:
        """Ids of an answer with what closes one of its kind behind them: "shot", "answer" or "plain"."""
        last = self._ends[end]
        kept = list(ids[: self.config.target_length - len(last)])
        if kept and kept[-1] == self.codec.trigger:
            kept.pop()  # its place was cut off
        return [*kept, *last]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the end token."""
        return self.tokenizer.decode(ids).strip()

    def read(self, ids: Iterable[int], boxes: Iterable[Box] = (), square: Square = STRETCHED) -> tuple[str, list[Box]]:
        """The text of generated ids with its boxes in digits, and those boxes, both in 0..1 of the picture.

        `boxes` are those of the location tokens, as the model has them. Of digits, the text stays as it is where the
        picture fills its square.
        """
        ids = list(map(int, ids))
        ids = ids[: ids.index(self.tokenizer.end_id)] if self.tokenizer.end_id in ids else ids
        parts: list[str | Box] = []
        for part in self.codec.read(ids, map(_in_order, boxes)):
            parts += [self.decode(part)] if isinstance(part, list) else [part]
        if all(isinstance(part, str) for part in parts) and square.width == square.height:
            text = "".join(parts)
            return text, [box for box in places.pieces(text) if not isinstance(box, str)]
        whole = [piece for part in parts for piece in (places.pieces(part) if isinstance(part, str) else [part])]
        back = [piece if isinstance(piece, str) else square.back(piece) for piece in whole]
        return places.joined(back), [piece for piece in back if not isinstance(piece, str)]

    def written(
        self, question: str, asked: list[int], tags, target: list[int], form: Form
    ) -> tuple[list[int], list[int], list[int]]:
        """(prompt, target, which of it is learned) of a row."""
        if form.kind == "plain":
            picture = self._picture() if "{image}" in self.config.template else []
            return self._prompt(question, [], (), picture, ([], [])), target, [1] * len(target)
        if not form.turns:
            sides = self._sides_told if form.kind == "told" else self._sides
            return self._prompt(question, asked, tags, (), sides), target, [1] * len(target)
        questions, answers = self.rounds(form.turns, form.pictured, form.kind == "told")
        sides = self._sides if form.pictured else self._sides_next
        if self.config.reader == "encoder" or not target:
            shown = [number for pair in zip(questions, answers) for part in pair for number in part]
            return self._prompt(question, asked, (), shown, sides), target, [1] * len(target)
        before, after = sides
        questions.append([*before, *asked, *after])
        first, target, learned = spread(questions, [*answers, target])
        if len(target) > self.config.target_length:
            raise UserError(
                f"{len(form.turns) + 1} rounds take {len(target)} tokens behind the first question where the model "
                f"takes {self.config.target_length}; raise processor.target_length"
            )
        return self._prompt(form.turns[0][0], [], (), first, ([], [])), target, learned


def stripped(question: str) -> str:
    if not question.strip():
        raise UserError("the prompt is empty; ask something about the picture")
    return question.strip()


def _in_order(box: Sequence[float]) -> Box:
    """Corners sorted and inside the square, whatever a head has read."""
    x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
