# SPDX-License-Identifier: Apache-2.0
"""Prompt building: question, tags, boxes and answer to token ids, and generated ids back to text and boxes.

The question is tokenized twice: alone for the Q-Former (InstructBLIP, arXiv 2305.06500), and for the language model
inside a prompt template (such as Vicuna's) and after LION's tag prompt (arXiv 2311.11860). Boxes are written in the
config's `box_format`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

from lionjax.core.errors import LongPromptError
from lionjax.core.types import UserError
from lionjax.data import rounds, sentences, tokenizer
from lionjax.data.boxes import MASK_TEXT, Box, BoxCodec, join_text_and_boxes, sort_corners, split_text_and_boxes
from lionjax.data.chat import DEFAULT_FORMAT, BuiltExample, PromptFormat, flatten_turns, strip_prompt
from lionjax.data.letterbox import Letterbox, pad_boxes, split_padded_boxes
from lionjax.data.processor_config import ProcessorConfig
from lionjax.data.whole_prompt import Piece, WholePromptBuilder

NO_LETTERBOX = Letterbox(1, 1)
FIRST_LOCATION_TOKEN = "<patch_index_0000>"  # the first of Kosmos-2's location tokens
REGION_QUERY_TOKEN, BOX_TOKEN = "<at>", "<boxes>"  # NExT-Chat's region tokens; the next line has its image tokens
IMAGE_START_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_patch>", "<im_end>"
# LION's tag prompt. The embedding of its soft prompt token is learned and weights the tags, which may be wrong.
TAGS_PREFIX = f"According to {tokenizer.SOFT_PROMPT_TOKEN}, you are allowed to use or partially use the following tags:"


class PromptBuilder:
    """The text half of `Processor`. Raises UserError for a tokenizer without the tokens that the config needs."""

    def __init__(self, config: ProcessorConfig):
        self.config = config
        is_whole = config.prompt_tokenization == "whole"
        self.tokenizer = tokenizer.load(config.tokenizer, is_whole)
        self.question_tokenizer = tokenizer.load(config.question_tokenizer, is_whole)
        if config.use_tags and self.tokenizer.soft_prompt_id is None:
            problem = f"the tokenizer {config.tokenizer!r} has no {tokenizer.SOFT_PROMPT_TOKEN}"
            raise UserError(f"{problem}, which processor.use_tags needs; set processor.use_tags to false")
        self._tags_prefix_ids = self.tokenizer.encode(TAGS_PREFIX, parse_special=True)
        find_token = self.tokenizer.backend.token_to_id
        first_bin = find_token(FIRST_LOCATION_TOKEN) or self.tokenizer.vocab_size
        self.box_codec = BoxCodec(
            first_bin,
            config.location_bins_per_side,
            find_token(REGION_QUERY_TOKEN),
            find_token(BOX_TOKEN),
            find_token(config.mask_token),
        )
        self._template_ids = self._encode_template(config.prompt_template)
        self._text_only_template_ids = self._encode_template(config.prompt_template.replace("{image}", ""))
        self._followup_template_ids = self._encode_template(config.followup_template or "{question}")
        ends = {"shot": config.shot_end or None, "answer": config.answer_end, "plain": config.caption_end}
        self._end_ids = {kind: self._encode_end(text) for kind, text in ends.items()}
        self._whole_prompt = WholePromptBuilder(
            self.tokenizer,
            config.prompt_template,
            config.followup_template,
            ends,
            # Spaces around the image's own tokens are not tokenized, as in Shikra.
            tuple(Piece(ids=(i,), strips=config.image_token is None) for i in self._image_token_ids())
            if is_whole and "{image}" in config.prompt_template
            else (),
            config.reader == "decoder",
            lambda text: self._pieces_with_boxes(text)[0],
        )
        # Text that ends an answer where no special token does, such as "###".
        is_text_end = is_whole and not self.tokenizer.spells_special_token(config.answer_end)
        self.stop_text = config.answer_end.strip() if is_text_end else ""
        # Questions and tags repeat. The caches are bounded and shared by all threads.
        self._cached_encode = functools.lru_cache(50_000)(lambda text: tuple(self.tokenizer.encode(text)))
        self._cached_encode_question = functools.lru_cache(50_000)(
            lambda text: tuple(self.question_tokenizer.encode(text))
        )

    def _encode_template(self, template: str) -> tuple[list[int], list[int]]:
        """(ids before, ids after) the question in a template."""
        before, after = template.split("{question}")
        return self._encode_template_side(before), self._encode_template_side(after)

    def _encode_end(self, text: str | None) -> list[int]:
        """Ids that end an answer: those of `text`, the end token for an empty text, none for None."""
        if text is None:
            return []
        return self.tokenizer.encode(text, parse_special=True) if text else [self.tokenizer.eos_id]

    def _encode_template_side(self, text: str) -> list[int]:
        """Ids of one side of a template, with the image tokens at {image}."""
        ids: list[int] = []
        for number, part in enumerate(text.split("{image}")):
            if number:
                ids += self._image_token_ids()
            ids += self.tokenizer.encode(part.strip()) if part.strip() else []
        return ids

    def _image_token_ids(self) -> list[int]:
        """Ids of the image tokens of one image."""
        if self.config.image_token is not None:
            return [self.config.image_token] * max(1, self.config.num_image_tokens)
        names = (IMAGE_START_TOKEN, *[IMAGE_PATCH_TOKEN] * self.config.num_image_tokens, IMAGE_END_TOKEN)
        return [self.tokenizer.token_to_id(name) for name in names]

    def encode_with_boxes(
        self,
        text: str,
        exact_boxes: Iterable[Box] = (),
        image_letterbox: Letterbox = NO_LETTERBOX,
        box_format: str | None = None,
    ) -> tuple[list[int], list[Box]]:
        """(ids, boxes): a text with its boxes encoded in `box_format`, and the boxes as fractions of the padded square.

        `exact_boxes`: unrounded coordinates of boxes in the text. `box_format`: default is the config's. Raises
        UserError for a box outside the image or without area, unless the format is "digits".
        """
        pieces, boxes = self._split_boxes(text, exact_boxes, image_letterbox, box_format)
        ids: list[int] = []
        for piece in pieces:
            if not isinstance(piece, str):
                ids += piece
            elif len(pieces) == 1 or piece.strip():
                ids += self._cached_encode(piece if len(pieces) == 1 else piece.strip())
        return ids, boxes

    def _split_boxes(self, text: str, exact_boxes=(), image_letterbox=NO_LETTERBOX, box_format=None):
        """(texts and ids of boxes in order, boxes) of a text; as one text where boxes are digits."""
        box_format = box_format or self.config.box_format
        pieces, boxes = split_padded_boxes(text, exact_boxes, image_letterbox, box_format == "digits")
        return [p if isinstance(p, str) else self.box_codec.encode(p, box_format) for p in pieces], boxes

    def _pieces_with_boxes(self, text: str, *arguments) -> tuple[list[Piece], list[Box]]:
        """As `_split_boxes`, with `Piece`s; arguments as there."""
        parts, boxes = self._split_boxes(text, *arguments)
        return [Piece(part) if isinstance(part, str) else Piece(ids=tuple(part), strips=True) for part in parts], boxes

    def encode_prompt(self, question: str, tags: Sequence[str] = ()) -> list[int]:
        """Prompt ids for the language model: LION's tag prompt if there are tags, then the question.

        A prompt that is too long loses tags from the end of the list, never the soft prompt token or a part of the
        question. Raises UserError if it is too long without tags.
        """
        if self.config.prompt_tokenization == "whole":
            return self._frame_prompt(question, self._whole_prompt.build(question, None, "answer", DEFAULT_FORMAT)[0])
        return self._assemble_prompt(question, self.encode_with_boxes(strip_prompt(question))[0], tags)

    def encode_history(
        self, turns: Sequence[tuple[str, str]], image_per_turn: bool, text_only: bool = False, box_arguments=()
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(question ids, answer ids) of earlier turns.

        `image_per_turn`: every turn has its own image (in-context examples), else all turns share one. `text_only`:
        the turns have no image tokens. `box_arguments`: exact boxes and letterbox of the turns.
        """
        if image_per_turn and "{image}" not in self.config.prompt_template:
            raise UserError("in-context examples (shots) need {image} in processor.prompt_template; add {image} to it")
        questions, answers = [], []
        for turn_index, (question, answer) in enumerate(turns):
            before, after = self._template_ids if image_per_turn or not turn_index else self._followup_template_ids
            if text_only:
                before, after = self._text_only_template_ids
            questions.append([*before, *self.encode_with_boxes(strip_prompt(question), *box_arguments)[0], *after])
            end = self._end_ids["shot" if image_per_turn else "answer"]
            answers.append([*self.encode_with_boxes(strip_prompt(answer), *box_arguments)[0], *end])
        return questions, answers

    def _assemble_prompt(
        self,
        question: str,
        question_ids: Sequence[int],
        tags: Sequence[str] = (),
        prefix_ids: Sequence[int] = (),
        template_ids: tuple[list[int], list[int]] | None = None,
    ) -> list[int]:
        before, after = self._template_ids if template_ids is None else template_ids
        is_decoder = self.config.reader == "decoder"
        start = self.tokenizer.bos_ids if is_decoder else []
        room = self.config.max_prompt_tokens - (len(start) if is_decoder else 1)
        num_template_tokens = len(prefix_ids) + len(before) + len(after)
        if self.config.use_tags and tags:
            room_for_tags = room - num_template_tokens - len(self._tags_prefix_ids) - len(question_ids)
            question_ids = [*self._tags_prefix_ids, *self._encode_tags(tags, room_for_tags), *question_ids]
        return self._frame_prompt(question, [*prefix_ids, *before, *question_ids, *after])

    def _frame_prompt(self, question: str, ids: Sequence[int]) -> list[int]:
        """Prompt ids with the start token of a decoder or the end token of an encoder.

        Raises LongPromptError if they are too many.
        """
        is_decoder = self.config.reader == "decoder"
        start, max_tokens = self.tokenizer.bos_ids if is_decoder else [], self.config.max_prompt_tokens
        room = max_tokens - (len(start) if is_decoder else 1)
        if len(ids) > room:
            raise LongPromptError(
                f"the prompt {question[:40]!r} takes {len(ids) + max_tokens - room} tokens, but at most {max_tokens} "
                "are allowed; shorten it or raise processor.max_prompt_tokens"
            )
        return [*start, *ids] if is_decoder else self.tokenizer.truncate_and_add_special(list(ids), max_tokens)

    def _encode_tags(self, tags: Sequence[str], max_tokens: int) -> tuple[int, ...]:
        """Ids of the bracketed tag list, cut from its end to at most `max_tokens` ids; never less than "[]."."""
        names = [tag.strip() for tag in tags if tag.strip()]
        for num_tags in range(len(names), -1, -1):
            ids = self._cached_encode(f"[{', '.join(names[:num_tags])}].")
            if len(ids) <= max_tokens or not num_tags:
                return ids
        return ids

    def encode_question(self, question: str) -> list[int]:
        """Ids of the question alone for the Q-Former; a long question is cut at its beginning, as in LION."""
        ids = list(self._cached_encode_question(strip_prompt(question)))
        return self.question_tokenizer.truncate_and_add_special(ids, self.config.max_question_tokens, keep="back")

    def encode_target(self, answer: str) -> list[int]:
        """Ids of an answer with its end token; a longer answer than `max_target_tokens` is cut and has no end token."""
        return self._cut_target(
            [*self.encode_with_boxes(answer)[0], *self._end_ids["answer"]], self._end_ids["answer"]
        )[0]

    def _cut_target(self, ids: Sequence[int], end_ids: Sequence[int] = ()) -> tuple[list[int], int]:
        """(ids, number of ids cut) of a target that ends in `end_ids`.

        A target of more than `max_target_tokens` loses its end ids and what is too long: an end token there would teach
        the model to stop in the middle of an answer.
        """
        num_cut = len(ids) - self.config.max_target_tokens
        if num_cut <= 0:
            return list(ids), 0
        kept_ids = list(ids[: len(ids) - len(end_ids)][: self.config.max_target_tokens])
        if kept_ids and kept_ids[-1] == self.box_codec.region_query_token_id:
            kept_ids.pop()  # its box token was cut off
        return kept_ids, num_cut

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids up to the end token, stripped."""
        return self.tokenizer.decode(ids).strip()

    def decode_with_boxes(
        self, ids: Iterable[int], boxes: Iterable[Box | None] = (), image_letterbox: Letterbox = NO_LETTERBOX
    ) -> tuple[str, list[Box]]:
        """(text, boxes) of generated ids: boxes are fractions of the image, and the text has them in digits.

        `boxes`: predicted boxes of the box tokens, or those around the masks of the mask tokens (None: no mask), as
        fractions of the padded square. Text with boxes in digits is
        returned unchanged if the image is square.
        """
        ids = list(map(int, ids))
        ids = ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids
        parts: list[str | Box] = []
        for part in self.box_codec.decode(ids, (box and sort_corners(box) for box in boxes)):
            parts += [self.decode(part)] if isinstance(part, list) else [part]
        is_square = image_letterbox.width == image_letterbox.height
        if all(isinstance(part, str) and part != MASK_TEXT for part in parts) and is_square:
            text = "".join(parts)
            return text, [box for box in split_text_and_boxes(text) if not isinstance(box, str)]
        pieces = [
            piece for part in parts for piece in (split_text_and_boxes(part) if isinstance(part, str) else [part])
        ]
        image_pieces = [piece if isinstance(piece, str) else image_letterbox.from_padded(piece) for piece in pieces]
        return join_text_and_boxes(image_pieces), [piece for piece in image_pieces if not isinstance(piece, str)]

    def build_example(
        self,
        question: str,
        answer: str | None,
        tags=(),
        boxes=(),
        image_letterbox=NO_LETTERBOX,
        box_format=None,
        prompt_format: PromptFormat = DEFAULT_FORMAT,
    ) -> BuiltExample:
        """The ids of one example. Without an `answer` there is no target.

        A target longer than `max_target_tokens` is cut: an answer loses its end, a conversation its last turns. Raises
        UserError for in-context examples that are longer.
        """
        if prompt_format.image_per_turn and not prompt_format.padded_boxes:  # the turns are padded, each by its image
            question, answer = (text and pad_boxes(text, image_letterbox, boxes) for text in (question, answer))
            boxes = tuple(map(image_letterbox.to_padded, boxes))
        if prompt_format.image_per_turn or prompt_format.padded_boxes:
            image_letterbox = NO_LETTERBOX
        box_arguments = (tuple(boxes), image_letterbox, box_format)
        if (box_format or self.config.box_format) == "masks":
            _refuse_boxes(question, *(asked for asked, _ in prompt_format.turns))
        end = "plain" if prompt_format.kind == "plain" else "answer"
        if self.is_sentence(question, prompt_format):
            return self._build_sentence(question, answer, end, box_arguments, prompt_format)
        if prompt_format.image_marks:
            question, prompt_format = rounds.merge_rounds(question, prompt_format, self.config.followup_template)
        if self.config.prompt_tokenization == "whole":
            return self._build_whole(strip_prompt(question), answer, end, box_arguments, prompt_format)
        if prompt_format.image_marks:
            return self._build_rounds(question, answer, box_arguments, prompt_format)
        question_ids, question_boxes = self.encode_with_boxes(strip_prompt(question), *box_arguments)
        answer_ids, answer_boxes = ([], []) if answer is None else self.encode_with_boxes(answer, *box_arguments)
        end_ids = [] if answer is None else self._end_ids[end]
        built = self.build(question, question_ids, tags, [*answer_ids, *end_ids], prompt_format, box_arguments[:2])
        return self._fit_target(*built, [*question_boxes, *answer_boxes], end_ids, prompt_format)

    def is_sentence(self, question: str, prompt_format: PromptFormat = DEFAULT_FORMAT) -> bool:
        """Whether a question or an earlier turn is a sentence with slots, for a model that has them.

        `image_marks` are for others.
        """
        is_plain = prompt_format.image_marks or prompt_format.kind == "plain"
        texts = (*(asked for asked, _ in prompt_format.turns), question)
        return self.config.slots is not None and not is_plain and any(map(sentences.has_marks, texts))

    def _build_sentence(self, question, answer, end: str, box_arguments, prompt_format: PromptFormat) -> BuiltExample:
        """`build_example` for sentences with slots, in the template without its image; turns may have slots too."""
        c, end_ids, boxes = self.config, self._end_ids[end], []
        questions: list[list[int]] = []
        answers: list[list[int]] = []
        for asked, said in (*prompt_format.turns, (question, answer)):
            before, after = self._followup_template_ids if questions else self._text_only_template_ids
            arguments = strip_prompt(asked), self._cached_encode, self._image_token_ids(), c.slots
            questions.append([*before, *sentences.encode_sentence(*arguments), *after])
            if said is not None:
                answer_ids, answer_boxes = self.encode_with_boxes(said, *box_arguments)
                answers.append([*answer_ids, *end_ids])
                boxes += answer_boxes
        prompt_ids, *built = rounds.join_parts(questions, answers, c.reader == "decoder")
        return self._fit_target(self._frame_prompt(question, prompt_ids), *built, boxes, end_ids, DEFAULT_FORMAT)

    def _build_whole(self, question, answer, end: str, box_arguments, prompt_format: PromptFormat):
        """`build_example` for `prompt_tokenization` "whole"."""
        texts = (*itertools.chain(*prompt_format.turns), question) if prompt_format.image_marks else (question,)
        boxes = [box for text in texts for box in self._split_boxes(text, *box_arguments)[1]]
        pieces, answer_boxes = (None, []) if answer is None else self._pieces_with_boxes(answer.strip(), *box_arguments)
        builder = dataclasses.replace(
            self._whole_prompt, to_pieces=lambda text: self._pieces_with_boxes(text, *box_arguments)[0]
        )
        ids, target_ids, loss_mask, num_end = builder.build(question, pieces, end, prompt_format)
        end_ids = target_ids[len(target_ids) - num_end :]
        prompt_ids = self._frame_prompt(question, ids)
        return self._fit_target(prompt_ids, target_ids, loss_mask, [*boxes, *answer_boxes], end_ids, prompt_format)

    def _fit_target(self, prompt_ids, target_ids, loss_mask, boxes, end_ids, prompt_format) -> BuiltExample:
        """The example with its target cut to `max_target_tokens`; see `build_example`."""
        kept_ids, num_cut = self._cut_target(target_ids, end_ids)
        if num_cut and prompt_format.image_per_turn and self.config.reader == "decoder":
            raise UserError(
                f"{len(prompt_format.turns) + 1} turns take {len(target_ids)} tokens after the first question, "
                f"but at most {self.config.max_target_tokens} are allowed; raise processor.max_target_tokens"
            )
        if num_cut and (box_id := self.box_codec.box_token_id) is not None:
            num_cut_boxes = list(target_ids).count(box_id) - kept_ids.count(box_id)
            boxes = boxes[: max(0, len(boxes) - num_cut_boxes)]
        return BuiltExample(prompt_ids, kept_ids, loss_mask[: len(kept_ids)], boxes, num_cut)

    def _build_rounds(self, question, answer, box_arguments, prompt_format: PromptFormat) -> BuiltExample:
        """`build_example` for texts with `<image>` marks and `prompt_tokenization` "parts"."""
        c, end_ids = self.config, self._end_ids["answer"]
        image_ids = self._image_token_ids() if "{image}" in c.prompt_template else []
        texts = (*prompt_format.turns, (question, answer)), (c.prompt_template, c.followup_template)
        encoders = self._encode_template_side, lambda text: self.encode_with_boxes(text, *box_arguments)
        prompt_ids, *built = rounds.encode_parts(*texts, *encoders, image_ids, end_ids, c.reader == "decoder")
        return self._fit_target(self._frame_prompt(question, prompt_ids), *built, end_ids, prompt_format)

    def build(
        self, question: str, question_ids: list[int], tags, target_ids: list[int], prompt_format, box_arguments=()
    ) -> tuple[list[int], list[int], list[int]]:
        """(prompt ids, target ids of any length, loss mask of the target); `box_arguments`: as `encode_history`."""
        if prompt_format.kind == "plain":
            image_ids = self._image_token_ids() if "{image}" in self.config.prompt_template else []
            return self._assemble_prompt(question, [], (), image_ids, ([], [])), target_ids, [1] * len(target_ids)
        if not prompt_format.turns:
            sides = self._text_only_template_ids if prompt_format.kind == "told" else self._template_ids
            return self._assemble_prompt(question, question_ids, tags, (), sides), target_ids, [1] * len(target_ids)
        is_text_only = prompt_format.kind == "told"
        arguments = (prompt_format.turns, prompt_format.image_per_turn, is_text_only, box_arguments)
        questions, answers = self.encode_history(*arguments)
        sides = self._template_ids if prompt_format.image_per_turn else self._followup_template_ids
        if self.config.reader == "encoder" or not target_ids:
            history_ids = [token_id for pair in zip(questions, answers) for part in pair for token_id in part]
            prompt_ids = self._assemble_prompt(question, question_ids, (), history_ids, sides)
            return prompt_ids, target_ids, [1] * len(target_ids)
        before, after = sides
        questions.append([*before, *question_ids, *after])
        prefix_ids, target_ids, loss_mask = flatten_turns(questions, [*answers, target_ids])
        return self._assemble_prompt(prompt_format.turns[0][0], [], (), prefix_ids, ([], [])), target_ids, loss_mask


def _refuse_boxes(*questions: str) -> None:
    """Raises UserError for a question with a box, which a model of masks cannot read."""
    for question in questions:
        if any(not isinstance(piece, str) for piece in split_text_and_boxes(question)):
            raise UserError(
                f"the question {question[:40]!r} has a box, which a model with processor.box_format 'masks' cannot "
                "read; say in words what is meant"
            )
