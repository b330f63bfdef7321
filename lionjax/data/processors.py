# SPDX-License-Identifier: Apache-2.0
"""A picture and a question become arrays. The same way in training, in evaluation and in talk.

The picture is shrunk or padded to a square and normalised as CLIP's were. The question is read twice: bare by the
Q-Former, and by the language model behind LION's sentence about tags, in a template such as Vicuna's. Boxes in texts
are written as the model knows them. Texts are padded on the right to fixed lengths, so that nothing is compiled twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lionjax.data import pictures, places, squares, tokenizer
from lionjax.data.pictures import Box
from lionjax.data.squares import Square
from lionjax.data.turns import AS_ASKED, Form, spread, transcript
from lionjax.interfaces import CATEGORIES, Batch, UserError

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
        lengths = (
            *("image_size", "prompt_length", "question_length", "target_length", "max_pixels"),
            "pictures",
        )
        for field in lengths:
            if getattr(self, field) < 1:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give at least 1")
        for field in ("image_tokens", "bins", "boxes", "sam_size"):
            if getattr(self, field) < 0:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give 0 or more")
        if self.template.count("{question}") != 1 or self.template.count("{image}") > 1:
            raise UserError(
                f"processor.template is {self.template!r}; it wants {{question}} once, {{image}} at most once"
            )
        if self.next_turn and (
            self.next_turn.count("{question}") != 1 or "{image}" in self.next_turn
        ):
            raise UserError(
                f"processor.next_turn is {self.next_turn!r}; it wants {{question}} once, and no {{image}}"
            )
        if self.places == "embeddings" and not self.boxes:
            raise UserError("places are embeddings, but processor.boxes is 0; say how many at most")
        if self.places == "bins" and not self.bins:
            raise UserError(
                "places are location tokens, but processor.bins is 0; say how many a side (Kosmos-2: 32)"
            )
        if self.sam_size and not self.padded:
            raise UserError(
                "processor.sam_size wants processor.padded, so that a box is the same place to SAM"
            )


@dataclass(frozen=True)
class Input:
    """One thing to ask. `image`: a path, the bytes of a file, a PIL picture or a uint8 array."""

    image: object
    question: str
    tags: tuple[str, ...] = ()
    category: str = "image_level"
    boxes: tuple[Box, ...] = ()  # with all the decimals that the question does not write
    shots: tuple[tuple[object, str, str], ...] = ()  # picture, question and answer, shown before
    turns: tuple[tuple[str, str], ...] = ()  # what was asked and answered before of this picture


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
        piece = self.tokenizer.backend.token_to_id
        first_bin = piece(FIRST_BIN) or self.tokenizer.size
        self.codec = places.Codec(first_bin, config.bins, piece(TRIGGER), piece(LOCATION))
        self._sides = self._both(config.template)
        self._sides_told = self._both(config.template.replace("{image}", ""))
        self._sides_next = self._both(config.next_turn or "{question}")
        ends = {
            "shot": config.shot_end or None,
            "answer": config.answer_end,
            "plain": config.plain_end,
        }
        self._ends = {name: self._end(text) for name, text in ends.items()}
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
        c = self.config
        picture = pictures.as_picture(source, max_pixels=c.max_pixels)
        if not c.padded:
            return pictures.resize(picture, c.image_size, window)
        if window != pictures.WHOLE:
            width, height = picture.size
            edges = np.array(window) * (width, height, width, height)
            picture = picture.crop(tuple(edges.round().astype(int).tolist()))
        color = squares.WHITE if c.padding == "white" else tuple(int(255 * m) for m in c.mean)
        return squares.padded(picture, c.image_size, color)

    def square(self, source, window: pictures.Box = pictures.WHOLE) -> Square:
        """The square whose fractions the model's boxes are, of a picture or of a window of it."""
        if not self.config.padded:
            return STRETCHED
        width, height = pictures.as_picture(source, max_pixels=self.config.max_pixels).size
        across, down = window[2] - window[0], window[3] - window[1]
        return Square(max(1, round(width * across)), max(1, round(height * down)))

    def large(self, source) -> dict[str, np.ndarray]:
        """The picture for SAM, to stand in a row; nothing where no masks are made."""
        if not self.config.sam_size:
            return {}
        picture = pictures.as_picture(source, max_pixels=self.config.max_pixels)
        return {"sam": squares.sam_pixels(picture, self.config.sam_size)}

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
        self,
        text: str,
        known: Iterable[Box] = (),
        square: Square = STRETCHED,
        how: str | None = None,
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
        return self._prompt(question, self.spell(_asked(question))[0], tags)

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
            asked.append([*before, *self.spell(_asked(question))[0], *after])
            end = self._ends["shot" if pictured else "answer"]
            said.append([*self.spell(_asked(answer))[0], *end])
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
        ids = list(self._question_ids(_asked(question)))
        return self.question_tokenizer.frame(ids, self.config.question_length, keep="back")

    def target(self, answer: str) -> list[int]:
        """Ids of an answer, closed by the end token; a long one loses its back."""
        return self._target(self.spell(answer)[0])

    def _target(self, ids: Sequence[int], end: str = "answer") -> list[int]:
        last = self._ends[end]
        kept = list(ids[: self.config.target_length - len(last)])
        if kept and kept[-1] == self.codec.trigger:
            kept.pop()  # its place was cut off
        return [*kept, *last]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the end token."""
        return self.tokenizer.decode(ids).strip()

    def read(
        self, ids: Iterable[int], boxes: Iterable[Box] = (), square: Square = STRETCHED
    ) -> tuple[str, list[Box]]:
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
        whole = [
            piece
            for part in parts
            for piece in (places.pieces(part) if isinstance(part, str) else [part])
        ]
        back = [piece if isinstance(piece, str) else square.back(piece) for piece in whole]
        return places.joined(back), [piece for piece in back if not isinstance(piece, str)]

    # ------------------------------------------------------------------ arrays

    def row(
        self,
        pixels: np.ndarray,
        question: str,
        tags=(),
        answer: str | None = None,
        category: str = "image_level",
        boxes: Iterable[Box] = (),
        square: Square = STRETCHED,
        how: str | None = None,
        form: Form = AS_ASKED,
    ) -> dict[str, np.ndarray]:
        """One example as arrays of fixed shape, which stack to what `assemble` reads.

        `boxes`, `square`, `how`: see `spell`. `size` is the picture's, for the way back. `form`: see there; its turns
        write their boxes in digits.
        """
        c, boxes = self.config, tuple(boxes)
        asked, asked_boxes = self.spell(_asked(question), boxes, square, how)
        said, said_boxes = ([], []) if answer is None else self.spell(answer, boxes, square, how)
        end = "plain" if form.kind == "plain" else "answer"
        target = [] if answer is None else self._target(said, end)
        prompt, target, learned = self._written(question, asked, tags, target, form)
        pad = self.tokenizer.pad_id
        texts = {
            "prompt": _padded(prompt, c.prompt_length, pad),
            "question": _padded(
                self.question(question), c.question_length, self.question_tokenizer.pad_id
            ),
            "target": _padded(target, c.target_length, pad),
        }
        masks = {f"{name}_mask": mask for name, (_, mask) in texts.items()}
        masks["loss_mask"] = _padded(learned, c.target_length, 0)[0]
        ids = {name: ids for name, (ids, _) in texts.items()}
        size = np.array((square.width, square.height), np.int32)
        row = {"pixels": pixels, "task": np.int32(_task(category)), "size": size, **ids, **masks}
        return row | self._boxes([*asked_boxes, *said_boxes], how or c.places)

    def _written(
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

    def _boxes(self, boxes: Sequence[Box], how: str) -> dict[str, np.ndarray]:
        most = self.config.boxes
        if how == "embeddings" and len(boxes) > most:
            raise UserError(
                f"question and answer name {len(boxes)} regions where {most} are allowed; ask about fewer, "
                "or raise processor.boxes"
            )
        if not most:
            return {}
        box_K4, mask_K = np.zeros((most, 4), np.float32), np.zeros(most, np.int32)
        kept = boxes[:most]
        box_K4[: len(kept)], mask_K[: len(kept)] = np.reshape(kept, (-1, 4)), 1
        return {"boxes": box_K4, "boxes_mask": mask_K}

    def assemble(self, rows: dict[str, np.ndarray], buckets: Sequence[int] = ()) -> Batch:
        """Stacked rows as a `Batch`. Texts are padded to the shortest of `buckets` that holds them all, if given."""
        text = {}
        for name in ("prompt", "question", "target"):
            ids, mask = rows[name], rows[f"{name}_mask"]
            longest = int(mask.sum(1).max(initial=1))
            length = min((b for b in buckets if b >= longest), default=ids.shape[1])
            text[name], text[f"{name}_mask"] = ids[:, :length], mask[:, :length]
        learned_BM = rows.get("loss_mask", rows["target_mask"])[:, : text["target"].shape[1]]
        return Batch(
            image_BHWC=self.normalise(rows["pixels"]),
            prompt_BL=text["prompt"],
            prompt_mask_BL=text["prompt_mask"],
            question_BL=text["question"],
            question_mask_BL=text["question_mask"],
            target_BM=text["target"],
            target_mask_BM=text["target_mask"],
            loss_mask_BM=learned_BM,
            task_B=rows["task"],
            record_B=rows.get("record", np.arange(len(rows["task"]), dtype=np.int32)),
            boxes_BK4=rows.get("boxes"),
            boxes_mask_BK=rows.get("boxes_mask"),
            masks_BKHW=rows.get("masks"),
            masks_mask_BK=rows.get("masks_mask"),
            part_B=rows.get("part"),
            sam_image_BHWC=(
                squares.sam_normalised(rows["sam"], rows["size"]) if "sam" in rows else None
            ),
        )

    def row_of(self, one: Input, answer: str | None = None) -> dict[str, np.ndarray]:
        """The row of one thing to ask, with the picture for SAM where masks may be wanted.

        With shots its pixels are (K, H, W, 3): theirs, then its own. Turns before it are part of the prompt: by
        `processor.next_turn`, or where there is none as one question.
        """
        if one.turns and not self.config.next_turn:
            one = replace(one, question=transcript(one.turns, one.question), turns=())
        picture = pictures.as_picture(one.image, max_pixels=self.config.max_pixels)
        words = (one.question, one.tags, answer, one.category, one.boxes, self.square(picture))
        if one.shots and one.turns:
            raise UserError("a question has shots or turns before it, not both")
        form = Form(
            "", tuple((asked, said) for _, asked, said in one.shots) or one.turns, bool(one.shots)
        )
        pixels = [self.pixels(source) for source, *_ in (*one.shots, (picture,))]
        pixels = self.filled(pixels)
        return self.row(pixels, *words, form=form) | self.large(picture)

    def filled(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures of a row as one array, (K, H, W, 3) where rows have several; what is left is blank."""
        c, many = self.config, max(self.config.pictures, len(pixels))
        if many == 1:
            return pixels[0]
        blank = np.broadcast_to(np.uint8([round(255 * mean) for mean in c.mean]), pixels[0].shape)
        return np.stack([*pixels, *[blank] * (many - len(pixels))])

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
        if len(counts := {len(one.shots) for one in inputs}) > 1:
            raise UserError(
                f"questions of one batch have {sorted(counts)} shots; give each as many"
            )
        rows = [self.row_of(one, answer) for one, answer in zip(inputs, said)]
        return self.assemble(
            {key: np.stack([row[key] for row in rows]) for key in rows[0]}, buckets
        )


def _asked(question: str) -> str:
    if not question.strip():
        raise UserError("the prompt is empty; ask something about the picture")
    return question.strip()


def _in_order(box: Sequence[float]) -> Box:
    """Corners sorted and inside the square, whatever a head has read."""
    x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _task(category: str) -> int:
    if category not in CATEGORIES:
        raise UserError(f"there is no category {category!r}; choose {' or '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def _padded(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    row, mask = np.full(length, pad, np.int32), np.zeros(length, np.int32)
    row[: len(ids)], mask[: len(ids)] = ids, 1
    return row, mask
