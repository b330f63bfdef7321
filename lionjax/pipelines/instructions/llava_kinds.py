# SPDX-License-Identifier: Apache-2.0
"""LLaVA's three kinds of instruction data (arXiv 2304.08485): conversations, detailed descriptions, and reasoning.

The messages, the form of contexts and replies, and where the image mark stands are those of LLaVA's code. A reply that
is not of the form is refused with a reason, where LLaVA's code drops it without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lionjax.pipelines.completion import ChatRequest, Completion
from lionjax.pipelines.image_contexts import ImageContext, format_context
from lionjax.pipelines.instructions.few_shot import CONVERSATION, DETAIL, REASONING, FewShot
from lionjax.pipelines.instructions.records import Outcome, RefusedError, check_text, draw, readable_text, to_record

SEPARATOR = "==="
PAIR = ("Question:", "Answer:")
MAX_TOKENS, TEMPERATURE = 2048, 0.7
DETAIL_QUESTIONS = (
    "Describe this image in detail.",
    "What do you see in this image? Leave nothing out.",
    "Give a thorough description of the image.",
    "Please explain everything that is in this image.",
    "Write a detailed account of what the image shows.",
    "Can you tell me all about this image?",
    "Walk me through this image piece by piece.",
    "Characterize the image with a full description.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of data: its examples, and whether contexts have boxes."""

    few_shot: FewShot
    has_boxes: bool


KINDS = {"conversation": Kind(CONVERSATION, False), "detail": Kind(DETAIL, True), "reasoning": Kind(REASONING, True)}


def split_blocks(text: str, headers: Sequence[str]) -> list[str]:
    """The texts of blocks between lines `===`, whose first lines are the headers in turn.

    Raises RefusedError for a number of blocks that is no multiple of the headers', another header, or an empty text.
    """
    blocks: list[list[str]] = [[]]
    for line in text.strip().split("\n"):
        if line.strip() == SEPARATOR:
            blocks.append([])
        else:
            blocks[-1].append(line)
    if len(blocks) % len(headers):
        raise RefusedError(f"wrong number of blocks: {len(blocks)}, no multiple of {len(headers)}")
    texts = []
    for number, lines in enumerate(blocks):
        header = headers[number % len(headers)]
        if not lines or lines[0].strip() != header:
            raise RefusedError(f"wrong header: block {number + 1} does not begin with {header}")
        texts.append("\n".join(lines[1:]).strip())
        if not texts[-1]:
            raise RefusedError("empty text")
    return texts


def parse_conversation(text: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a reply. Raises RefusedError as `split_blocks` and `check_text`."""
    texts = [check_text(part) for part in split_blocks(text, PAIR)]
    return list(zip(texts[::2], texts[1::2]))


def build_requests(kind: str, contexts: Sequence[ImageContext], few_shot: FewShot | None = None) -> list[ChatRequest]:
    """The request of each context; `few_shot` replaces our examples."""
    shots, has_boxes = few_shot or KINDS[kind].few_shot, KINDS[kind].has_boxes
    return [
        ChatRequest(shots.messages(format_context(context, has_boxes)), max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
        for context in contexts
    ]


def to_outcome(kind: str, context: ImageContext, reply: Completion | None, seed: int = 0) -> Outcome:
    """The record of a reply, or why there is none. `seed` draws the place of the image and the question of "detail"."""
    text = ""
    try:
        text = readable_text(reply)
        if kind == "detail":
            question = DETAIL_QUESTIONS[draw(seed, f"question {context.id}", len(DETAIL_QUESTIONS))]
            pairs = [(question, check_text(text))]
        else:
            pairs = parse_conversation(text)
        if kind == "reasoning" and len(pairs) != 1:
            raise RefusedError(f"wrong number of blocks: {len(pairs)} pairs instead of one")
    except RefusedError as error:
        return Outcome(context.id, reason=str(error), reply=text)
    image_last = bool(draw(seed, f"image {context.id}", 2))
    return Outcome(context.id, to_record(context.id, context.image, pairs, image_last))
