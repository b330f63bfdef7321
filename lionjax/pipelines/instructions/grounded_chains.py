# SPDX-License-Identifier: Apache-2.0
"""Shikra-RD (arXiv 2306.15195): questions with grounded chains of thought, from sentences and boxes.

A reply marks phrases as `[words](numbers of objects)`. A row in Shikra's form, which `ShikraJsonl` reads, has phrases
between <ph_st> and <ph_ed> and for each the indices of its boxes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lionjax.core.errors import UserError
from lionjax.data.boxes import Box
from lionjax.data.datasets.shikra import PHRASE_END, PHRASE_START
from lionjax.pipelines.completion import ChatRequest, Completion
from lionjax.pipelines.image_contexts import ImageContext
from lionjax.pipelines.instructions.few_shot import CHAIN, FewShot
from lionjax.pipelines.instructions.llava_kinds import MAX_TOKENS, TEMPERATURE, split_blocks
from lionjax.pipelines.instructions.records import (
    Outcome,
    RefusedError,
    check_text,
    padded_box_text,
    readable_text,
    to_record,
)

HEADERS = ("Question:", "Thought:", "Answer:")
PHRASE = re.compile(r"\[([^\[\]\n]{1,200})\]\((\d{1,3}(?:, ?\d{1,3}){0,63})\)")
MARKED = re.compile(f"{PHRASE_START}(.*?){PHRASE_END}")
VERSIONS = ("a", "c", "bc")  # answer alone; thought without boxes; thought with boxes
SHIKRA_FILE = "shikra.jsonl"


def format_numbered(context: ImageContext) -> str:
    """The captions, and below an empty line the objects with their numbers."""
    lines = [f"{k} {name}: {[round(edge, 3) for edge in box]}" for k, (name, box) in enumerate(context.instances)]
    return "\n".join([*context.captions, "", *lines])


def build_requests(contexts: Sequence[ImageContext], few_shot: FewShot | None = None) -> list[ChatRequest]:
    """The request of each context. Raises UserError for one without boxes."""
    for context in contexts:
        if not context.instances:
            raise UserError(f"{context.image} has no instances; grounded chains need boxes")
    shots = few_shot or CHAIN
    return [
        ChatRequest(shots.messages(format_numbered(context)), max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
        for context in contexts
    ]


def mark_phrases(text: str, num_objects: int) -> tuple[str, list[list[int]]]:
    """(text with phrases in Shikra's marks, the objects of each). Raises RefusedError for an unknown object."""
    groups: list[list[int]] = []

    def marked(match: re.Match) -> str:
        numbers = [int(number) for number in match[2].split(",")]
        if wrong := [number for number in numbers if number >= num_objects]:
            raise RefusedError(f"no such object: {wrong[0]} of {num_objects}")
        groups.append(numbers)
        return f"{PHRASE_START}{match[1]}{PHRASE_END}"

    if PHRASE_START in text or PHRASE_END in text:
        raise RefusedError("Shikra's marks in a reply")
    return PHRASE.sub(marked, text), groups


def to_shikra_row(context: ImageContext, text: str, size: tuple[int, int]) -> dict[str, Any]:
    """The row of a reply in Shikra's form, boxes in pixels of the image of `size`.

    Raises RefusedError for a reply that is not of the form, names places in digits, or has no phrase in its thought.
    """
    question, thought, answer = (check_text(part) for part in _three(text))
    count = len(context.instances)
    question, question_groups = mark_phrases(question, count)
    thought, thought_groups = mark_phrases(thought, count)
    answer, answer_groups = mark_phrases(answer, count)
    if not thought_groups:
        raise RefusedError("no phrase of the thought has a box")
    answer = answer.rstrip(".")
    ends = (*size, *size)
    return {
        "img_path": context.image,
        "width": size[0],
        "height": size[1],
        "boxes": [[round(edge * end, 2) for edge, end in zip(box, ends)] for _, box in context.instances],
        "question": question,
        "question_boxes_seq": question_groups,
        "cot_with_ans": f"{thought} So the answer is {answer}.",
        "answer_boxes_seq": thought_groups + answer_groups,
        "answer": MARKED.sub(r"\1", answer),
    }


def _three(text: str) -> list[str]:
    blocks = split_blocks(text, HEADERS)
    if len(blocks) != len(HEADERS):
        raise RefusedError(f"wrong number of blocks: {len(blocks)} instead of {len(HEADERS)}")
    return blocks


def place_boxes(text: str, groups: Sequence[Sequence[int]], boxes: Sequence[Box], size: tuple[int, int]) -> str:
    """The text with the boxes of each marked phrase behind it, as fractions of the padded square."""
    left = iter(groups)
    return MARKED.sub(lambda match: match[1] + "".join(padded_box_text(boxes[k], size) for k in next(left)), text)


def to_outcome(
    context: ImageContext, reply: Completion | None, size: tuple[int, int], version: str = "bc"
) -> tuple[Outcome, dict[str, Any] | None]:
    """(record in LLaVA's form in a version of the paper, or why there is none; row in Shikra's form)."""
    text = ""
    try:
        text = readable_text(reply)
        row = to_shikra_row(context, text, size)
    except RefusedError as error:
        return Outcome(context.id, reason=str(error), reply=text), None
    boxes = [box for _, box in context.instances]
    question = place_boxes(row["question"], row["question_boxes_seq"], boxes, size)
    answers = {
        "a": f"The answer is {row['answer']}.",
        "c": MARKED.sub(r"\1", row["cot_with_ans"]),
        "bc": place_boxes(row["cot_with_ans"], row["answer_boxes_seq"], boxes, size),
    }
    return Outcome(context.id, to_record(context.id, context.image, [(question, answers[version])])), row
