# SPDX-License-Identifier: Apache-2.0
"""What a `LiveModel` is asked and what it tells: questions, answers, limits and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lionjax.core.errors import RetryError, check_ranges
from lionjax.data.processor import ImageTextInput
from lionjax.inference.engine import Answer


class BusyError(RetryError):
    """So many questions wait that another is refused."""


class TimeLimitError(RetryError):
    """A question that was not answered in time."""


@dataclasses.dataclass(frozen=True)
class LiveConfig:
    """Limits of a `LiveModel`. Raises UserError for values out of range.

    `num_slots`: answers generated at once (fewer where the memory holds fewer). `max_new_tokens`: of an answer, 0: what
    the model's own settings say. `max_waiting`: questions beyond those in slots before another is refused.
    `timeout_seconds`: from a question's arrival to the end of its answer.
    """

    num_slots: int = 8
    max_new_tokens: int = 0
    max_waiting: int = 64
    timeout_seconds: float = 120.0

    def __post_init__(self):
        check_ranges(self, num_slots=">= 1", max_new_tokens=">= 0", max_waiting=">= 0", timeout_seconds="> 0")


@dataclasses.dataclass(frozen=True)
class LiveQuestion:
    """One question; None leaves a setting as the model's own.

    `sample.image` is a PIL image; None for a text alone (a model that reads images sees a blank one). `temperature` 0
    is greedy. `stops`: texts that end an answer. `seed`: of sampling, None: a random one.
    """

    sample: ImageTextInput
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LiveAnswer:
    """A whole answer. `finish_reason`: "stop", or "length" where the limit of tokens ended it.

    `rest`: the text after the pieces that were streamed. `num_prompt_tokens`, `num_tokens`: of prompt and answer.
    """

    answer: Answer
    finish_reason: str
    rest: str
    num_prompt_tokens: int
    num_tokens: int


Event = str | LiveAnswer | Exception  # a piece of text, the whole answer, or why there is none
Listener = Callable[[Event], None]
