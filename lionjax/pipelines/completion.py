# SPDX-License-Identifier: Apache-2.0
"""The interface between methods that continue text and the language models that do: an endpoint or a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt to continue, with the settings of the continuation.

    `stop`: texts before which the continuation ends. `sample`: number of the sample where one prompt is continued
    several times. `may_be_cut`: a continuation that reaches `max_tokens` counts as an answer; else it is unreadable.
    """

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    sample: int = 0
    may_be_cut: bool = False


@dataclass(frozen=True)
class Completion:
    """A continuation. `token_log_probs` are those of `tokens`; both are empty where the server gives none.

    `problem`: why there is no usable text, such as "length" or "content_filter"; empty for a usable one.
    """

    text: str
    tokens: tuple[str, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    problem: str = ""

    @property
    def is_readable(self) -> bool:
        return not self.problem


class LanguageModel(Protocol):
    """A language model that continues prompts and is not trained."""

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion | None]:
        """The continuation of each request in the order of the requests; None: not asked, as a budget is used up."""

    def describe(self) -> dict:
        """What report.json says of the model and of its use so far."""
