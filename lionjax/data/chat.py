# SPDX-License-Identifier: Apache-2.0
"""How a row is written where it is more than one question and its answer: rounds of a talk, examples, captions alone.

A decoder learns every answer of a row at once: what is asked in between is read, and only what is said is learned
(LLaVA's label masks by round; OpenFlamingo's between the end of a chunk and the next picture). An encoder reads all
rounds but the last answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lionjax.core.types import UserError

TEMPLATE_KINDS = ("plain", "told")


@dataclass(frozen=True)
class PromptFormat:
    """How a row is written. `kind` "plain": a picture and what is said of it, no question (LLaVA's first stage);
    "told": no picture, the prompt is words alone; "": as the template says.

    `turns` were asked and answered before, about the same picture, or where `pictured` each about its own; of the kind
    "told" these are examples in words, and only the question itself has its picture.
    """

    kind: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    image_per_turn: bool = False

    def __post_init__(self):
        if self.kind not in ("", *TEMPLATE_KINDS):
            raise UserError(f"a row is written as {self.kind!r}; choose {' or '.join(TEMPLATE_KINDS)}")


DEFAULT_FORMAT = PromptFormat()


def flatten_turns(
    question_ids: Sequence[list[int]], answer_ids: Sequence[list[int]]
) -> tuple[list[int], list[int], list[int]]:
    """(prompt, target, learned) of rounds: the first question is the prompt, all that follows is the target.

    `learned` is 1 at the tokens of answers, their end tokens among them, and 0 at those of later questions.
    """
    target, learned = [], []
    for number, (question, answer) in enumerate(zip(question_ids, answer_ids, strict=True)):
        between = question if number else []
        target += [*between, *answer]
        learned += [0] * len(between) + [1] * len(answer)
    return list(question_ids[0]), target, learned


def render_history(turns: Sequence[tuple[str, str]], question: str) -> str:
    """What was said before, and the question that is open now, as one prompt."""
    plain = [(asked, answer.removeprefix("Answer: ")) for asked, answer in turns]
    said = "".join(f"Question: {asked} Answer: {answer} " for asked, answer in plain)
    return f"{said}Question: {question}" if turns else question
