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

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data import boxes as places
from lionjax.data import images as pictures
from lionjax.data import tokenizer
from lionjax.data.chat import PromptFormat, flatten_turns
from lionjax.data.images import Box
from lionjax.data.letterbox import Letterbox

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NO_LETTERBOX = Letterbox(1, 1)
# LION's words. The sentinel's embedding is learned: how far the tags are to be trusted.
FIRST_LOCATION_TOKEN = "<patch_index_0000>"  # of Kosmos-2's location tokens
REGION_QUERY_TOKEN, BOX_TOKEN = "<at>", "<boxes>"  # NExT-Chat's words for places, and for pictures
IMAGE_START_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_patch>", "<im_end>"
TAGS_PREFIX = f"According to {tokenizer.SOFT_PROMPT_TOKEN}, you are allowed to use or partially use the following tags:"


@renamed_fields(
    mean="image_mean",
    std="image_std",
    prompt_length="max_prompt_tokens",
    question_length="max_question_tokens",
    target_length="max_target_tokens",
    tags="use_tags",
    padded="pad_to_square",
    padding="pad_color",
    template="prompt_template",
    image_tokens="num_image_tokens",
    plain_end="caption_end",
    next_turn="followup_template",
    pictures="max_images",
    places="box_format",
    bins="location_bins_per_side",
    boxes="max_boxes",
    sam_size="sam_image_size",
)
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
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    tokenizer: str = "tiny"
    question_tokenizer: str = "tiny"
    max_prompt_tokens: int = 128
    max_question_tokens: int = 128
    max_target_tokens: int = 128
    use_tags: bool = True
    max_pixels: int = pictures.MAX_PIXELS
    pad_to_square: bool = False
    pad_color: Literal["white", "mean"] = "white"
    reader: Literal["encoder", "decoder"] = "encoder"
    prompt_template: str = "{question}"
    num_image_tokens: int = 0
    image_token: int | None = None
    shot_end: str = ""
    answer_end: str = ""
    caption_end: str = ""
    followup_template: str = ""
    max_images: int = 1
    box_format: Literal["digits", "bins", "embeddings"] = "digits"
    location_bins_per_side: int = 0
    max_boxes: int = 0
    sam_image_size: int = 0

    def __post_init__(self):
        lengths = (
            *("image_size", "max_prompt_tokens", "max_question_tokens", "max_target_tokens"),
            *("max_pixels", "max_images"),
        )
        for field in lengths:
            if getattr(self, field) < 1:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give at least 1")
        for field in ("num_image_tokens", "location_bins_per_side", "max_boxes", "sam_image_size"):
            if getattr(self, field) < 0:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give 0 or more")
        named = set(re.findall(r"{(\w+)}", self.prompt_template + self.followup_template))
        if unknown := sorted(named - {"question", "image"}):
            raise UserError(
                f"a template of processor says {{{unknown[0]}}}; only {{question}} and {{image}} are filled in"
            )
        if self.prompt_template.count("{question}") != 1 or self.prompt_template.count("{image}") > 1:
            raise UserError(
                f"processor.prompt_template is {self.prompt_template!r}; it wants {{question}} once, {{image}} at most once"
            )
        if self.followup_template and (
            self.followup_template.count("{question}") != 1 or "{image}" in self.followup_template
        ):
            raise UserError(
                f"processor.followup_template is {self.followup_template!r}; it wants {{question}} once, and no {{image}}"
            )
        if self.box_format == "embeddings" and not self.max_boxes:
            raise UserError("places are embeddings, but processor.max_boxes is 0; say how many at most")
        if self.box_format == "bins" and not self.location_bins_per_side:
            raise UserError(
                "places are location tokens, but processor.location_bins_per_side is 0; say how many a side (Kosmos-2: 32)"
            )
        if self.sam_image_size and not self.pad_to_square:
            raise UserError(
                "processor.sam_image_size wants processor.pad_to_square, so that a box is the same place to SAM"
            )


class PromptBuilder:
    """What a `Processor` does with words. Raises UserError for a tokenizer that lacks what the config wants."""

    def __init__(self, config: ProcessorConfig):
        self.config = config
        self.tokenizer = tokenizer.load(config.tokenizer)
        self.question_tokenizer = tokenizer.load(config.question_tokenizer)
        if config.use_tags and self.tokenizer.soft_prompt_id is None:
            name = f"the tokenizer {config.tokenizer!r} has no {tokenizer.SOFT_PROMPT_TOKEN}"
            raise UserError(f"{name}, which tags need; set processor.use_tags to false")
        self._tags_prefix_ids = self.tokenizer.encode(TAGS_PREFIX, parse_special=True)
        piece = self.tokenizer.backend.token_to_id
        first_bin = piece(FIRST_LOCATION_TOKEN) or self.tokenizer.vocab_size
        self.box_codec = places.BoxCodec(
            first_bin, config.location_bins_per_side, piece(REGION_QUERY_TOKEN), piece(BOX_TOKEN)
        )
        self._template_ids = self._encode_template(config.prompt_template)
        self._text_only_template_ids = self._encode_template(config.prompt_template.replace("{image}", ""))
        self._followup_template_ids = self._encode_template(config.followup_template or "{question}")
        ends = {"shot": config.shot_end or None, "answer": config.answer_end, "plain": config.caption_end}
        self._end_ids = {name: self._encode_end(text) for name, text in ends.items()}
        # Questions repeat: the same wordings, the same words. Bounded, and shared by all threads.
        self._cached_encode = functools.lru_cache(50_000)(lambda text: tuple(self.tokenizer.encode(text)))
        self._cached_encode_question = functools.lru_cache(50_000)(
            lambda text: tuple(self.question_tokenizer.encode(text))
        )

    def _encode_template(self, template: str) -> tuple[list[int], list[int]]:
        """Ids of both sides of a question."""
        before, after = template.split("{question}")
        return self._encode_template_side(before), self._encode_template_side(after)

    def _encode_end(self, text: str | None) -> list[int]:
        """Ids that close an answer: the end token where none are said, nothing for None."""
        if text is None:
            return []
        return self.tokenizer.encode(text, parse_special=True) if text else [self.tokenizer.eos_id]

    def _encode_template_side(self, text: str) -> list[int]:
        """Ids of one side of the template, with the picture's tokens where it says {image}."""
        ids: list[int] = []
        for number, part in enumerate(text.split("{image}")):
            if number:
                ids += self._image_token_ids()
            ids += self.tokenizer.encode(part.strip()) if part.strip() else []
        return ids

    def _image_token_ids(self) -> list[int]:
        """Ids that stand for a picture."""
        if self.config.image_token is not None:
            return [self.config.image_token]
        names = (IMAGE_START_TOKEN, *[IMAGE_PATCH_TOKEN] * self.config.num_image_tokens, IMAGE_END_TOKEN)
        return [self.tokenizer.token_to_id(name) for name in names]

    def encode_with_boxes(
        self,
        text: str,
        exact_boxes: Iterable[Box] = (),
        image_letterbox: Letterbox = NO_LETTERBOX,
        box_format: str | None = None,
    ) -> tuple[list[int], list[Box]]:
        """Ids of a text with its boxes written as the model writes them, and those boxes within its square.

        `known` are boxes with all their decimals. `how` is another way than the processor's own. Raises UserError for
        a box that is none where it must be more than digits.
        """
        box_format = box_format or self.config.box_format
        found = places.split_text_and_boxes(text, exact_boxes)
        boxes = [image_letterbox.to_padded(piece) for piece in found if not isinstance(piece, str)]
        if box_format == "digits":
            if image_letterbox.width != image_letterbox.height:
                said = iter(map(places.box_to_text, boxes))
                text = "".join(piece if isinstance(piece, str) else next(said) for piece in found)
            return list(self._cached_encode(text)), boxes
        boxes = [pictures.normalize_box(box) for box in boxes]
        ids, rest = [], iter(boxes)
        for piece in found:
            if not isinstance(piece, str):
                ids += self.box_codec.encode(next(rest), box_format)
            elif piece.strip():
                ids += self._cached_encode(piece.strip())
        return ids, boxes

    def encode_prompt(self, question: str, tags: Sequence[str] = ()) -> list[int]:
        """Ids for the language model: LION's sentence about tags where there are any, then the question.

        What is too long loses tags from the end of the list, never the learned slot nor a word of the question.
        """
        return self._assemble_prompt(question, self.encode_with_boxes(strip_prompt(question))[0], tags)

    def encode_history(
        self, turns: Sequence[tuple[str, str]], image_per_turn: bool, text_only: bool = False
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of what was asked and of what was answered before: about one picture, each about its own, or told."""
        if image_per_turn and "{image}" not in self.config.prompt_template:
            raise UserError("shots want a processor.prompt_template that says where {image} stands")
        asked, said = [], []
        for number, (question, answer) in enumerate(turns):
            before, after = self._template_ids if image_per_turn or not number else self._followup_template_ids
            if text_only:
                before, after = self._text_only_template_ids
            asked.append([*before, *self.encode_with_boxes(strip_prompt(question))[0], *after])
            end = self._end_ids["shot" if image_per_turn else "answer"]
            said.append([*self.encode_with_boxes(strip_prompt(answer))[0], *end])
        return asked, said

    def _assemble_prompt(
        self,
        question: str,
        question_ids: Sequence[int],
        tags: Sequence[str] = (),
        prefix_ids: Sequence[int] = (),
        template_ids: tuple[list[int], list[int]] | None = None,
    ) -> list[int]:
        before, after = self._template_ids if template_ids is None else template_ids
        reads_on = self.config.reader == "decoder"
        start = self.tokenizer.bos_ids if reads_on else []
        room = self.config.max_prompt_tokens - (len(start) if reads_on else 1)
        around = len(prefix_ids) + len(before) + len(after)
        if self.config.use_tags and tags:
            room_for_tags = room - around - len(self._tags_prefix_ids) - len(question_ids)
            question_ids = [*self._tags_prefix_ids, *self._encode_tags(tags, room_for_tags), *question_ids]
        ids = [*prefix_ids, *before, *question_ids, *after]
        if len(ids) > room:
            whole = self.config.max_prompt_tokens
            raise UserError(
                f"the prompt {question[:40]!r} takes {len(ids) + whole - room} tokens where the model takes "
                f"{whole}; shorten it, or raise processor.max_prompt_tokens"
            )
        return (
            [*start, *ids] if reads_on else self.tokenizer.truncate_and_add_special(ids, self.config.max_prompt_tokens)
        )

    def _encode_tags(self, tags: Sequence[str], max_tokens: int) -> tuple[int, ...]:
        """The list in brackets with as many of the first tags as fit; with none if it must be."""
        words = [tag.strip() for tag in tags if tag.strip()]
        for kept in range(len(words), -1, -1):
            ids = self._cached_encode(f"[{', '.join(words[:kept])}].")
            if len(ids) <= max_tokens or not kept:
                return ids
        return ids

    def encode_question(self, question: str) -> list[int]:
        """Ids of the bare question for the Q-Former; a long one loses its front, as in LION."""
        ids = list(self._cached_encode_question(strip_prompt(question)))
        return self.question_tokenizer.truncate_and_add_special(ids, self.config.max_question_tokens, keep="back")

    def encode_target(self, answer: str) -> list[int]:
        """Ids of an answer, closed by the end token; a long one loses its back."""
        return self.append_end(self.encode_with_boxes(answer)[0])

    def append_end(self, ids: Sequence[int], end: str = "answer") -> list[int]:
        """Ids of an answer with what closes one of its kind behind them: "shot", "answer" or "plain"."""
        last = self._end_ids[end]
        kept = list(ids[: self.config.max_target_tokens - len(last)])
        if kept and kept[-1] == self.box_codec.region_query_token_id:
            kept.pop()  # its place was cut off
        return [*kept, *last]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the end token."""
        return self.tokenizer.decode(ids).strip()

    def decode_with_boxes(
        self, ids: Iterable[int], boxes: Iterable[Box] = (), image_letterbox: Letterbox = NO_LETTERBOX
    ) -> tuple[str, list[Box]]:
        """The text of generated ids with its boxes in digits, and those boxes, both in 0..1 of the picture.

        `boxes` are those of the location tokens, as the model has them. Of digits, the text stays as it is where the
        picture fills its square.
        """
        ids = list(map(int, ids))
        ids = ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids
        parts: list[str | Box] = []
        for part in self.box_codec.decode(ids, map(_sort_corners, boxes)):
            parts += [self.decode(part)] if isinstance(part, list) else [part]
        if all(isinstance(part, str) for part in parts) and image_letterbox.width == image_letterbox.height:
            text = "".join(parts)
            return text, [box for box in places.split_text_and_boxes(text) if not isinstance(box, str)]
        whole = [
            piece
            for part in parts
            for piece in (places.split_text_and_boxes(part) if isinstance(part, str) else [part])
        ]
        back = [piece if isinstance(piece, str) else image_letterbox.from_padded(piece) for piece in whole]
        return places.join_text_and_boxes(back), [piece for piece in back if not isinstance(piece, str)]

    def build(
        self, question: str, question_ids: list[int], tags, target_ids: list[int], prompt_format: PromptFormat
    ) -> tuple[list[int], list[int], list[int]]:
        """(prompt, target, which of it is learned) of a row."""
        if prompt_format.kind == "plain":
            picture = self._image_token_ids() if "{image}" in self.config.prompt_template else []
            return self._assemble_prompt(question, [], (), picture, ([], [])), target_ids, [1] * len(target_ids)
        if not prompt_format.turns:
            sides = self._text_only_template_ids if prompt_format.kind == "told" else self._template_ids
            return self._assemble_prompt(question, question_ids, tags, (), sides), target_ids, [1] * len(target_ids)
        questions, answers = self.encode_history(
            prompt_format.turns, prompt_format.image_per_turn, prompt_format.kind == "told"
        )
        sides = self._template_ids if prompt_format.image_per_turn else self._followup_template_ids
        if self.config.reader == "encoder" or not target_ids:
            shown = [number for pair in zip(questions, answers) for part in pair for number in part]
            return self._assemble_prompt(question, question_ids, (), shown, sides), target_ids, [1] * len(target_ids)
        before, after = sides
        questions.append([*before, *question_ids, *after])
        first, target_ids, learned = flatten_turns(questions, [*answers, target_ids])
        if len(target_ids) > self.config.max_target_tokens:
            raise UserError(
                f"{len(prompt_format.turns) + 1} rounds take {len(target_ids)} tokens behind the first question where the model "
                f"takes {self.config.max_target_tokens}; raise processor.max_target_tokens"
            )
        return self._assemble_prompt(prompt_format.turns[0][0], [], (), first, ([], [])), target_ids, learned


def strip_prompt(question: str) -> str:
    if not question.strip():
        raise UserError("the prompt is empty; ask something about the picture")
    return question.strip()


def _sort_corners(box: Sequence[float]) -> Box:
    """Corners sorted and inside the square, whatever a head has read."""
    x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
