# SPDX-License-Identifier: Apache-2.0
"""Question-aware captions of synthetic scenes: what a captioner of PromptCap (arXiv 2211.09699) learns.

A caption states the answer to the question: "What color is the large star?" and "red" give "The large star is red."
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import numpy as np

from lionjax.core.prompt_formats import PROMPTCAP_CAPTIONER
from lionjax.core.types import UserError
from lionjax.data import templates
from lionjax.data.scenes import tasks
from lionjax.data.scenes.dataset import OpenScenes, Scenes

# Wordings of a question, and the statement for each answer; "" is any other answer.
STATEMENTS = (
    (templates.COLOR, {"": "{expr} is {answer}."}),
    (templates.SHAPE, {"": "{expr} is a {answer}."}),
    (templates.COUNT, {"1": "there is 1 of the {nouns}.", "": "there are {answer} {nouns}."}),
    (templates.ATTRIBUTE_YESNO, {"yes": "yes, {expr} is {word}.", "no": "no, {expr} is not {word}."}),
    (
        templates.COUNT_COMPARISON,
        {"yes": "yes, there are more {first} than {second}.", "no": "no, there are not more {first} than {second}."},
    ),
    (templates.EXISTENCE, {"yes": "yes, there is {noun}.", "no": "no, there is not {noun}."}),
)


@dataclass(frozen=True)
class QuestionCaptions:
    """The scenes with one task, `caption`: a caption for a question about the scene, which is in the prompt.

    `sizes`, `image_size` and `seed` are those of `Scenes`.
    """

    sizes: tuple[int, int, int] = (3000, 500, 500)
    image_size: int = 128
    seed: int = 0
    name: str = "question_captions"

    def open(self, split: str, max_pixels: int) -> OpenQuestionCaptions:
        return OpenQuestionCaptions(Scenes(self.sizes, self.image_size, self.seed), split)


class OpenQuestionCaptions(OpenScenes):
    """One split."""

    def __init__(self, config: Scenes, split: str):
        super().__init__(config, split)
        self.task_sizes = {"caption": self.num_scenes}

    def make_example(self, task: str, index: int, truth, rng: np.random.Generator, tag_noise: float) -> tasks.Example:
        asked = super().make_example("vqa", index, truth, rng, tag_noise)
        caption = statement(asked.question, asked.answer)
        question = PROMPTCAP_CAPTIONER + asked.question
        return dataclasses.replace(asked, task="caption", question=question, answer=caption, answers=(caption,))


def statement(question: str, answer: str) -> str:
    """The sentence that a question about a scene and its answer make. Raises UserError for another question."""
    for pattern, by_answer in PATTERNS:
        if match := pattern.fullmatch(question):
            words = {name.lower(): word[0].lower() + word[1:] for name, word in match.groupdict().items()}
            text = by_answer.get(answer, by_answer.get("", "")).format(answer=answer, **words)
            return text[0].upper() + text[1:]
    raise UserError(f"the question {question!r} is none about a scene; give one of the task vqa")


def _compile(wording: str) -> re.Pattern:
    """A wording as a regular expression with a group for each placeholder."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(wording)))


# The longest wordings first: "Is it true that {expr} is {word}?" is an "Is {expr} {word}?" too.
PATTERNS = tuple(
    (_compile(wording), by_answer)
    for wording, by_answer in sorted(
        ((wording, by_answer) for wordings, by_answer in STATEMENTS for wording in wordings),
        key=lambda pair: -len(re.sub(r"{\w+}", "", pair[0])),
    )
)
