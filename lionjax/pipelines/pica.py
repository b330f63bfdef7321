# SPDX-License-Identifier: Apache-2.0
"""PICa (arXiv 2109.05014): a frozen language model answers questions about captions, shown examples like the question.

Each member of an ensemble sees other examples; the member whose answer has the largest log-probability is chosen.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lionjax.core.errors import UserError, check_ranges
from lionjax.pipelines import captions_as_text
from lionjax.pipelines.captions_as_text import CaptionedQuestion, Shot, build_prompt, clean_answer, first_line
from lionjax.pipelines.completion import Completion, LanguageModel

SIMILARITIES = ("question", "imagequestion")
MAX_ANSWER_TOKENS = 5
LOWEST_LOG_PROB = -999.0  # members at or below it are never chosen, as in the released code


@dataclasses.dataclass(frozen=True)
class PicaConfig:
    """`num_ensemble` members see `num_shots` examples each (paper: 16 and 5). `use_tags`: tags follow the caption.

    `similarity`: of question features alone, or of the sum over question and image features. Raises UserError for
    values that are not possible.
    """

    num_shots: int = 16
    num_ensemble: int = 1
    use_tags: bool = True
    similarity: str = "imagequestion"

    def __post_init__(self):
        check_ranges(self, num_shots=">= 0", num_ensemble=">= 1")
        if self.similarity not in SIMILARITIES:
            raise UserError(f"similarity is {self.similarity!r}; it can be one of {', '.join(SIMILARITIES)}")


@dataclasses.dataclass(frozen=True)
class ExampleFeatures:
    """CLIP features of questions and images, one row a question; `image_ND` None for similarity "question"."""

    question_ND: np.ndarray
    image_ND: np.ndarray | None = None

    def joint(self, similarity: str) -> np.ndarray:
        """Rows whose dot products are the similarity. Raises UserError where image features are missing."""
        if similarity == "question":
            return self.question_ND
        if self.image_ND is None:
            raise UserError("similarity is 'imagequestion' but no image features were given; give them or 'question'")
        return np.concatenate([self.question_ND, self.image_ND], axis=1)


def context_of(row: CaptionedQuestion, use_tags: bool) -> str:
    """What the prompt says of the asked image: its caption, with tags "caption. tag, tag"."""
    return f"{row.captions[0]}. {', '.join(row.tags)}" if use_tags else row.captions[0]


def to_shot(row: CaptionedQuestion, generator: np.random.Generator | None = None) -> Shot:
    """A solved example: a human caption (drawn with `generator`, else the first) and the first annotator's answer."""
    if not row.answers:
        raise UserError(f"the example {row.question!r} has no answers; give the annotators' answers of all examples")
    caption = row.captions[0] if generator is None else row.captions[generator.integers(len(row.captions))]
    return Shot(caption, row.question, row.answers[0])


def build_prompts(
    row: CaptionedQuestion,
    examples: Sequence[CaptionedQuestion],
    order: Sequence[int],
    config: PicaConfig,
    generator: np.random.Generator | None = None,
) -> list[str]:
    """The prompt of each member of the ensemble; `order`: places of examples, the most similar first.

    Member r sees the examples from r * num_shots on, the most similar of them first.
    """
    prompts = []
    for member in range(config.num_ensemble):
        chosen = order[member * config.num_shots : (member + 1) * config.num_shots]
        shots = [to_shot(examples[place], generator) for place in chosen]
        prompts.append(build_prompt(shots, context_of(row, config.use_tags), row.question))
    return prompts


def log_prob_of_answer(completion: Completion) -> float:
    """The sum of the log-probabilities of the tokens before the first that holds a line break; 0 without any."""
    total = 0.0
    for token, log_prob in zip(completion.tokens, completion.token_log_probs):
        if "\n" in token:
            break
        total += log_prob
    return total


def choose_answer(members: Sequence[Completion | None]) -> str:
    """The cleaned answer of the likeliest member, the first of equal ones; "" if no member has a readable answer.

    Where members have no log-probabilities, the most frequent answer.
    """
    readable = [member for member in members if member is not None and member.is_readable]
    answers = [clean_answer(first_line(member.text)) for member in readable]
    if not answers:
        return ""
    if len(answers) > 1 and not all(member.token_log_probs for member in readable):
        return collections.Counter(answers).most_common(1)[0][0]
    scores = [log_prob_of_answer(member) for member in readable]
    best = max(range(len(scores)), key=lambda place: -math.inf if math.isnan(scores[place]) else scores[place])
    return answers[best] if scores[best] > LOWEST_LOG_PROB else ""


def answer_questions(
    model: LanguageModel,
    rows: Sequence[CaptionedQuestion],
    examples: Sequence[CaptionedQuestion],
    orders: Sequence[Sequence[int]],
    config: PicaConfig,
    seed: int = 0,
) -> list[str | None]:
    """The answer to each question; None where the model was not asked for lack of budget.

    `orders`: for each question the places of its examples, the most similar first (`similar_examples`). `seed` draws
    the caption of an example that has several.
    """
    generator = np.random.default_rng(seed)
    prompts = [
        prompt
        for row, order in zip(rows, orders, strict=True)
        for prompt in build_prompts(row, examples, order, config, generator)
    ]
    completions = model.complete(captions_as_text.greedy_requests(prompts, MAX_ANSWER_TOKENS))
    groups = [completions[start : start + config.num_ensemble] for start in range(0, len(prompts), config.num_ensemble)]
    return [None if None in members else choose_answer(members) for members in groups]


def similar_examples(questions: ExampleFeatures, examples: ExampleFeatures, config: PicaConfig) -> list[list[int]]:
    """For each question the places of its num_shots * num_ensemble examples, the most similar first."""
    query_ND, key_ND = questions.joint(config.similarity), examples.joint(config.similarity)
    return [
        captions_as_text.most_similar(query_D, key_ND, config.num_shots * config.num_ensemble) for query_D in query_ND
    ]


def random_examples(num_questions: int, num_examples: int, count: int, seed: int) -> list[list[int]]:
    """For each question the places of `count` different examples drawn with `seed`: what retrieval is compared with."""
    generator = np.random.default_rng(seed)
    count = min(count, num_examples)
    return [generator.choice(num_examples, count, replace=False).tolist() for _ in range(num_questions)]
