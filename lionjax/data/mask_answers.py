# SPDX-License-Identifier: Apache-2.0
"""Answers with masks as LISA (arXiv 2308.00692) learns them: a short sentence around the mask tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from lionjax.data.boxes import box_to_text
from lionjax.data.scenes.tasks import MASK_TASKS, Example
from lionjax.data.templates import sample_question

MASK_ANSWERS = (
    "It is {masks}.",
    "Sure, {masks}.",
    "Sure, it is {masks}.",
    "Sure, the segmentation result is {masks}.",
    "{masks}.",
)


def with_mask_answer(example: Example, rng: np.random.Generator) -> Example:
    """An example of `MASK_TASKS` whose answer is a sentence with its masks, and not only "Answer:" with its boxes."""
    masks = "".join(map(box_to_text, example.boxes))
    if example.task not in MASK_TASKS or not masks or example.answer != f"Answer: {masks}":
        return example
    return dataclasses.replace(example, answer=sample_question(MASK_ANSWERS, rng, masks=masks))
