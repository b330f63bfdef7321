# SPDX-License-Identifier: Apache-2.0
"""What a session of answering is given and gives: `AnswerRequest`, `SessionSizes` and `Finished`."""

from __future__ import annotations

import dataclasses
import functools

from lionjax.inference.image_pool import EncodedExample, hash_arrays, image_digest
from lionjax.inference.sampling import GenerateOutput

UNREAD_FIELDS = ("sam", "target", "target_mask", "loss_mask", "num_cut", "size")  # of a row, while text is generated


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerRequest:
    """One question. `seed`: of its sampling; `max_new_tokens`: at most that of the session's settings, None: all.

    `temperature` (0: greedy) and `top_p` are read in a session with `GenerationConfig.row_sampling`.
    """

    row: EncodedExample
    seed: int = 0
    image_blind: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0

    @functools.cached_property
    def image_digest(self) -> bytes:
        """A hash of the pixels; empty for the blank image."""
        return b"" if self.image_blind else image_digest(self.row)

    def digest(self, is_greedy: bool) -> bytes:
        """A hash of all that decides the answer, which is not the seed in greedy decoding."""
        texts = [self.row[name] for name in sorted(self.row) if name not in (*UNREAD_FIELDS, "pixels")]
        settings = (self.image_blind, self.max_new_tokens)
        settings += () if is_greedy else (self.seed, self.temperature, self.top_p)
        return hash_arrays(*texts) + self.image_digest + repr(settings).encode()

    @functools.cached_property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.row["prompt_mask"].sum())

    @functools.cached_property
    def question_length(self) -> int:
        """Tokens of the question that a Q-Former reads."""
        return int(self.row["question_mask"].sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """What was generated for a request: `output` has one row."""

    request_id: int
    request: AnswerRequest
    output: GenerateOutput


@dataclasses.dataclass(frozen=True)
class SessionSizes:
    """Fixed shapes of a session. `num_slots` and `admission_rows` are multiples of the batch shards of the mesh.

    `prompt_length`, `question_length`: longest texts; `short_lengths`: shorter prompt lengths that have a program too.
    """

    num_slots: int
    admission_rows: int
    prompt_length: int
    question_length: int
    short_lengths: tuple[int, ...] = ()

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """All padded prompt lengths."""
        return *self.short_lengths, self.prompt_length

    def padded_length(self, length: int) -> int:
        """The shortest padded prompt length that holds `length` tokens."""
        return min(size for size in self.prompt_lengths if size >= length)

    def hold(self, request: AnswerRequest) -> bool:
        """Whether the texts of a request fit."""
        return request.length <= self.prompt_length and request.question_length <= self.question_length

    def grown_for(self, request: AnswerRequest) -> SessionSizes:
        """Sizes with lengths doubled until a request fits, at most to the lengths of its arrays."""
        prompt, question = self.prompt_length, self.question_length
        while prompt < request.length:
            prompt = min(2 * prompt, len(request.row["prompt"]))
        while question < request.question_length:
            question = min(2 * question, len(request.row["question"]))
        return dataclasses.replace(self, prompt_length=prompt, question_length=question)
