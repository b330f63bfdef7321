# SPDX-License-Identifier: Apache-2.0
"""Prompt formats of multi-turn conversations, in-context examples and captions without a question.

A decoder is trained on all answers of an example at once: later questions are in the target with loss mask 0 (as in
LLaVA, arXiv 2304.08485, and OpenFlamingo, arXiv 2308.01390). An encoder gets all turns except the last answer in its
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lionjax.core.experiment import MIX_TEMPLATES
from lionjax.core.types import UserError
from lionjax.data.boxes import Box

TEMPLATE_KINDS = MIX_TEMPLATES


@dataclass(frozen=True)
class PromptFormat:
    """The format of one example. `kind`: "" follows the prompt template, "plain" is an image and its caption
    without a question (LLaVA's first stage), and "told" is a prompt of text without an image.

    `turns`: earlier (question, answer) pairs about the same image, or each about its own if `image_per_turn`. With
    "told", turns are text-only in-context examples, and the last question follows the template. `image_marks`: the
    images stand where question and turns have `<image>`, and nowhere else. `padded_boxes`: boxes in the texts are
    fractions of the image padded to a square already; with `image_per_turn`, boxes in the turns always are. Raises
    UserError for an unknown `kind`.
    """

    kind: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    image_per_turn: bool = False
    image_marks: bool = False
    padded_boxes: bool = False

    def __post_init__(self):
        if self.kind not in ("", *TEMPLATE_KINDS):
            raise UserError(
                f"PromptFormat.kind is {self.kind!r}; choose {' or '.join(TEMPLATE_KINDS)}, or leave it empty"
            )


DEFAULT_FORMAT = PromptFormat()


class BuiltExample(NamedTuple):
    """Token ids of one example. `loss_mask`: of the target. `boxes`: of question and answer.

    `num_cut`: target tokens, its end included, beyond `max_target_tokens`; the target of such an example has no end.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    loss_mask: list[int]
    boxes: list[Box]
    num_cut: int


def flatten_turns(
    question_ids: Sequence[list[int]], answer_ids: Sequence[list[int]]
) -> tuple[list[int], list[int], list[int]]:
    """(prompt ids, target ids, loss mask) of several turns: the first question is the prompt, the rest the target.

    The loss mask is 1 at answer tokens, including their end tokens, and 0 at the tokens of later questions.
    """
    target, loss_mask = [], []
    for turn_index, (question, answer) in enumerate(zip(question_ids, answer_ids, strict=True)):
        between = question if turn_index else []
        target += [*between, *answer]
        loss_mask += [0] * len(between) + [1] * len(answer)
    return list(question_ids[0]), target, loss_mask


def render_history(turns: Sequence[tuple[str, str]], question: str) -> str:
    """Earlier turns and the current question as one prompt in the form "Question: ... Answer: ... Question: ..."."""
    turn_texts = [(turn_question, answer.removeprefix("Answer: ")) for turn_question, answer in turns]
    history = "".join(f"Question: {turn_question} Answer: {answer} " for turn_question, answer in turn_texts)
    return f"{history}Question: {question}" if turns else question


def strip_prompt(question: str) -> str:
    """The question without surrounding spaces. Raises UserError for an empty one."""
    if not question.strip():
        raise UserError("the prompt is empty; give a question about the image")
    return question.strip()
