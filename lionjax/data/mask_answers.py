# SPDX-License-Identifier: Apache-2.0
"""Answers with masks as LISA (arXiv 2308.00692) learns them, a short sentence around the mask tokens; their phrases."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from lionjax.data.boxes import BOX_PATTERN, MASK_TEXT, box_to_text
from lionjax.data.scenes.tasks import MASK_TASKS, Example
from lionjax.data.templates import sample_question

MASK_ANSWERS = (
    "It is {masks}.",
    "Sure, {masks}.",
    "Sure, it is {masks}.",
    "Sure, the segmentation result is {masks}.",
    "{masks}.",
)
REGION_PATTERN = re.compile(f"{BOX_PATTERN.pattern}|{re.escape(MASK_TEXT)}")
LEAD_INS = r"^sure\b|\band\s|\b(?:it|this|that|there) (?:is|are)\b|\bresult is\b"
PHRASE_START = re.compile(rf"[,.:;?!]\s|{LEAD_INS}", re.IGNORECASE)


def with_mask_answer(example: Example, rng: np.random.Generator) -> Example:
    """An example of `MASK_TASKS` whose answer is a sentence with its masks, and not only "Answer:" with its boxes."""
    masks = "".join(map(box_to_text, example.boxes))
    if example.task not in MASK_TASKS or not masks or example.answer != f"Answer: {masks}":
        return example
    return dataclasses.replace(example, answer=sample_question(MASK_ANSWERS, rng, masks=masks))


def mask_phrases(text: str) -> list[str]:
    """The phrase before each box of an answer, and before each mask that has none: "a star" in "It is a star [SEG].".

    It begins after the last punctuation, "and" or "it is" behind the region before; empty where nothing is left.
    """
    phrases, end = [], 0
    for match in REGION_PATTERN.finditer(text):
        words = text[end : match.start()].strip(" ,.:;?!")
        phrases.append(PHRASE_START.split(words)[-1].strip())
        end = match.end()
    return phrases
