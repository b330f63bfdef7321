# SPDX-License-Identifier: Apache-2.0
"""Prompts as the original systems tokenize them: template, question and answers are one text between special ids.

A tokenizer gives other ids for parts of a text than for the whole: SentencePiece marks the start of every part, and
byte-pair encoding depends on the space before a word. `Pieces` holds a prompt as texts and special ids in order, and
`encode_pieces` tokenizes each stretch of text at once, as the original code does.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

from lionjax.core.types import UserError
from lionjax.data.rounds import IMAGE_PLACEHOLDER, split_round, text_only_template
from lionjax.data.tokenizer import Tokenizer

# What users of the original systems write where the image stands.
IMAGE_MARKS = ("<image>", "<ImageHere>", "<image-placeholder>")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text, or special `ids`. `learned`: in the loss. `end`: ends an answer.

    `strips`: removes the spaces around it, as LLaMA's tokenizer does at added tokens. `apart`: the original code
    tokenizes what follows by a call of its own.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    learned: bool = False
    end: bool = False
    strips: bool = False
    apart: bool = False


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """(ids, index of the piece that each id comes from).

    Special ids that the tokenizer knows are part of the tokenized text, as in Hugging Face's processors. At other ids,
    such as LLaVA's -200, the text is cut and each part is tokenized alone, as in the original code.
    """
    pieces = _strip_at_added_tokens(pieces)
    ids: list[int] = []
    owners: list[int] = []
    run: list[int] = []  # pieces that are tokenized together

    def finish_run() -> None:
        run_ids, run_owners = _encode_run(tokenizer, pieces, run)
        ids.extend(run_ids)
        owners.extend(run_owners)
        run.clear()

    for index, piece in enumerate(pieces):
        if piece.ids and not all(token_id in tokenizer.added_tokens for token_id in piece.ids):
            finish_run()
            ids.extend(piece.ids)
            owners.extend([index] * len(piece.ids))
        else:
            run.append(index)
        if piece.apart:
            finish_run()
    finish_run()
    return ids, owners


def _strip_at_added_tokens(pieces: Sequence[Piece]) -> list[Piece]:
    stripped = list(pieces)
    for index, piece in enumerate(pieces):
        if not piece.strips:
            continue
        if index and not pieces[index - 1].ids:
            stripped[index - 1] = dataclasses.replace(stripped[index - 1], text=stripped[index - 1].text.rstrip(" "))
        if index + 1 < len(pieces) and not pieces[index + 1].ids:
            stripped[index + 1] = dataclasses.replace(stripped[index + 1], text=stripped[index + 1].text.lstrip(" "))
    return stripped


def _encode_run(tokenizer: Tokenizer, pieces: Sequence[Piece], run: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids, owners) of pieces that are tokenized together."""
    # A special token that the user spells is text. Then the texts between the special ids are tokenized alone.
    spelled = any(tokenizer.spells_special_token(pieces[index].text) for index in run if not pieces[index].ids)
    ids: list[int] = []
    owners: list[int] = []
    for is_ids, group in itertools.groupby(run, key=lambda index: spelled and bool(pieces[index].ids)):
        part = list(group)
        if is_ids:
            for index in part:
                ids += pieces[index].ids
                owners += [index] * len(pieces[index].ids)
            continue
        texts = [
            pieces[i].text or "".join(tokenizer.added_tokens[token_id] for token_id in pieces[i].ids) for i in part
        ]
        starts = list(itertools.accumulate(map(len, texts), initial=0))[:-1]
        text_ids, offsets = tokenizer.encode_with_offsets("".join(texts), parse_special=not spelled)
        ids += text_ids
        # The last piece that starts at or before the token; empty pieces share a start and own nothing.
        filled = [k for k, text in enumerate(texts) if text]
        filled_starts = [starts[k] for k in filled]
        owners += [part[filled[max(bisect.bisect_right(filled_starts, offset) - 1, 0)]] for offset in offsets]
    return ids, owners


def text_to_pieces(tokenizer: Tokenizer, text: str, image_pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of a template's text, with the special tokens in it as ids and the image's pieces at {image}."""
    pieces: list[Piece] = []
    for number, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        pieces += image_pieces if number else ()
        chunks = tokenizer.split_special_tokens(part)
        pieces += [Piece(chunk) if isinstance(chunk, str) else Piece(ids=(chunk,)) for chunk in chunks]
    return pieces


def answer_pieces(before: Sequence[Piece], answer: Sequence[Piece], end: Sequence[Piece]) -> list[Piece]:
    """Pieces of an answer that follows `before`, a space between them where `before` ends in a word.

    Where the template itself ends in a space, the original systems (MiniGPT-4, mPLUG-Owl) tokenize the answer alone.
    """
    last = before[-1].text if before and not before[-1].ids else ""
    space = " " if last and not last[-1].isspace() else ""
    pieces = list(answer)
    if space and pieces and not pieces[0].ids:
        pieces[0] = dataclasses.replace(pieces[0], text=space + pieces[0].text)
    return [dataclasses.replace(p, learned=True) for p in pieces] + [
        dataclasses.replace(p, learned=True, end=True) for p in end
    ]


def cut_before_answer(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with a cut behind them where they end in a space; see `answer_pieces`."""
    if pieces and pieces[-1].text.endswith(" "):
        return [*pieces[:-1], dataclasses.replace(pieces[-1], apart=True)]
    return list(pieces)


def already_formatted(question: str, prompt_template: str, followup_template: str, start: str = "") -> str | None:
    """The text of a prompt that its user has already put into the template, with {image} at the image; else None.

    Recognized by the words before the question (such as "USER:") and behind it ("ASSISTANT:"); the first sentences may
    be missing, as in Hugging Face's chat templates. An image without a mark stands where the template has it. `start`:
    the tokenizer's start token, which is not a part of the text.
    """
    before, _, after = prompt_template.partition("{question}")
    header = (followup_template or prompt_template).partition("{question}")[0].replace(IMAGE_PLACEHOLDER, "")
    header, text = header.strip().removeprefix(start), question.strip().removeprefix(start)
    if not header or not after.strip() or header not in text or not text.endswith(after.strip()):
        return None
    text = _with_image_placeholder(text) + after[len(after.rstrip()) :]
    if IMAGE_PLACEHOLDER not in prompt_template or IMAGE_PLACEHOLDER in text:
        return text
    end_of_header = text.index(header) + len(header)
    image_part = before[before.index(header) + len(header) :]
    return text[:end_of_header] + image_part + text[end_of_header:].lstrip()


def _with_image_placeholder(text: str) -> str:
    """The text with {image} for the original systems' marks of an image; a repeated mark is one image."""
    marks = "|".join(map(re.escape, IMAGE_MARKS))
    return re.sub(rf"(?:{marks})(?:\s?(?:{marks}))*", IMAGE_PLACEHOLDER, text)


def without_image_marks(question: str) -> str:
    """The question without marks of the image, which the template puts in its place (as LLaVA's code does)."""
    for mark in IMAGE_MARKS:
        question = question.replace(mark, "")
    if not question.strip():
        raise UserError("the prompt has only a mark of the image; give a question about the image")
    return question.strip()


@dataclasses.dataclass(frozen=True)
class WholePromptBuilder:
    """Builds the ids of an example as one text. `image_pieces`: those of one image.

    `to_pieces` gives the pieces of a question or an answer, with its boxes in the model's format.
    """

    tokenizer: Tokenizer
    prompt_template: str
    followup_template: str
    ends: dict[str, str | None]  # text that ends a "shot", an "answer" and a "plain" caption; "" the end token
    image_pieces: tuple[Piece, ...]
    is_decoder: bool
    to_pieces: Callable[[str], list[Piece]]

    def build(self, question: str, answer: list[Piece] | None, end: str, prompt_format) -> tuple[list[int], ...]:
        """(prompt ids, target ids, loss mask, number of ids at the target's end that end the answer) of one example.

        `answer` None: no target. An encoder's target holds the last answer only. Start and end tokens of the prompt
        are not included.
        """
        pieces = self.prompt_pieces(question, prompt_format, learned=answer is not None)
        if answer is None:
            return encode_pieces(self.tokenizer, pieces)[0], [], [], 0
        prompt = cut_before_answer(pieces)
        if self.is_decoder:
            pieces = [*prompt, *answer_pieces(prompt, answer, self.end_pieces(end))]
            ids, owners = encode_pieces(self.tokenizer, pieces)
        else:
            target = answer_pieces((), answer, self.end_pieces(end))
            prompt_ids, _ = encode_pieces(self.tokenizer, [dataclasses.replace(p, learned=False) for p in pieces])
            ids, owners = encode_pieces(self.tokenizer, target)
            return prompt_ids, ids, [1] * len(ids), sum(target[owner].end for owner in owners)
        learned = [int(pieces[owner].learned) for owner in owners]
        start = learned.index(1) if 1 in learned else len(ids)
        num_end = sum(pieces[owner].end for owner in itertools.takewhile(lambda o: pieces[o].end, reversed(owners)))
        return ids[:start], ids[start:], learned[start:], num_end

    def prompt_pieces(self, question: str, prompt_format, learned: bool = False) -> list[Piece]:
        """Pieces of earlier turns and the question, up to where the answer begins."""
        if prompt_format.kind == "plain":
            return list(self.image_pieces) if IMAGE_PLACEHOLDER in self.prompt_template else []
        if prompt_format.image_marks:
            return self.round_pieces(question, prompt_format, learned)
        text_only = text_only_template(self.prompt_template, self.followup_template)
        first = text_only if prompt_format.kind == "told" else self.prompt_template
        later = first if prompt_format.image_per_turn else (self.followup_template or "{question}")
        pieces: list[Piece] = []
        for turn_question, turn_answer in prompt_format.turns:
            pieces += cut_before_answer(self.fill(later if pieces else first, turn_question))
            end = self.end_pieces("shot" if prompt_format.image_per_turn else "answer")
            pieces += self.turn_pieces(pieces, turn_answer, end, learned)
        return [*pieces, *self.fill(later if pieces else first, question)]

    def turn_pieces(self, before: Sequence[Piece], answer: str, end: Sequence[Piece], learned: bool) -> list[Piece]:
        """Pieces of the answer of an earlier turn, in the loss or not."""
        turn = answer_pieces(before, self.to_pieces(answer.strip()), end)
        return turn if learned else [dataclasses.replace(piece, learned=False, end=False) for piece in turn]

    def round_pieces(self, question: str, prompt_format, learned: bool) -> list[Piece]:
        """As `prompt_pieces`, with the images where the texts have `<image>`; see `data.rounds`."""
        pieces: list[Piece] = []
        for index, (text, answer) in enumerate((*prompt_format.turns, (question, None))):
            before, after, texts = split_round(text, self.prompt_template, self.followup_template, not index)
            pieces += text_to_pieces(self.tokenizer, before, self.image_pieces)
            for number, part in enumerate(texts):
                pieces += self.image_pieces if number else ()
                pieces += self.to_pieces(part if len(texts) > 1 else part.strip()) if part else ()
            pieces += text_to_pieces(self.tokenizer, after, ())
            if answer is not None:
                pieces = cut_before_answer(pieces)
                pieces += self.turn_pieces(pieces, answer, self.end_pieces("answer"), learned)
        return pieces

    def fill(self, template: str, question: str) -> list[Piece]:
        """Pieces of a question in a template; a question that is already in the template is taken as it is."""
        start = "".join(self.tokenizer.added_tokens.get(i, "") for i in self.tokenizer.bos_ids)
        text = already_formatted(question, self.prompt_template, self.followup_template, start)
        if text is not None:
            return text_to_pieces(self.tokenizer, text, self.image_pieces)
        before, after = template.split("{question}")
        question = without_image_marks(question) if IMAGE_PLACEHOLDER in self.prompt_template else question.strip()
        parts = (text_to_pieces(self.tokenizer, part, self.image_pieces) for part in (before, after))
        before_pieces, after_pieces = parts
        return [*before_pieces, *self.to_pieces(question), *after_pieces]

    def end_pieces(self, kind: str) -> list[Piece]:
        """Pieces that end an answer: none, the end token, or those of a text."""
        text = self.ends[kind]
        if text is None:
            return []
        return text_to_pieces(self.tokenizer, text, ()) if text else [Piece(ids=(self.tokenizer.eos_id,))]
