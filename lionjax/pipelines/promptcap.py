# SPDX-License-Identifier: Apache-2.0
"""PromptCap (arXiv 2211.09699): captions made for a question, and a frozen language model that answers from them.

Also how its training data is made: a language model writes captions that help to answer, and those from which another
prompt finds the answer are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lionjax.core.errors import UserError
from lionjax.core.prompt_formats import PROMPTCAP_CAPTIONER as CAPTIONER_PROMPT
from lionjax.evaluation.metrics.vqa import edit_distance
from lionjax.pipelines.captions_as_text import (
    SCORE_PER_MATCH,
    STOP,
    CaptionedQuestion,
    Shot,
    build_prompt,
    clean_answer,
    first_line,
    greedy_requests,
    most_similar,
    quick_accuracy,
)
from lionjax.pipelines.completion import Completion, CompletionRequest, LanguageModel

if TYPE_CHECKING:
    from lionjax.inference.model import Model

MAX_ANSWER_TOKENS, MAX_CAPTION_TOKENS = 20, 128
NUM_SAMPLES, SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 10, 1.0, 0.96
BEST_REFERENCES = 3  # of the soft score
# Whole answers that the released code replaces before it cleans them.
REPLACEMENTS = {"one world": "1 world", "takeoff": "take off", "virgin australia": "virgin"}
# Examples of our own in front of the prompt that makes captions; the released ones are not repeated here.
FEW_SHOT_EXAMPLES = """Summarize the contexts in one sentence that helps to answer the question.

Original contexts: A man holds a red umbrella.. Somebody stands in the rain near a bus stop.
Question: What keeps the man dry?
Answer: umbrella
Summary: A man keeps dry in the rain under the red umbrella that he holds.

Original contexts: Two dogs run over a lawn.. Dogs play outside with a ball.
Question: How many animals are there?
Answer: 2
Summary: Two dogs, the only animals, run after a ball on a lawn.

Original contexts: A kitchen with a white stove.. A pot stands on a stove next to a window.
Question: What color is the pot?
Answer: blue
Summary: A blue pot stands on a white stove next to a window."""


def context_of(caption: str, tags: Sequence[str]) -> str:
    """What a prompt says of an image: the caption, a space, the tags with commas."""
    return f"{caption} {', '.join(tags)}"


def majority_answer(answers: Sequence[str]) -> str:
    """The most frequent answer; of equally frequent ones that whose first mention comes last, as in the released code.

    Raises UserError without answers.
    """
    if not answers:
        raise UserError("an example has no answers; give the annotators' answers of all examples")
    counts = dict.fromkeys(answers, 0)
    for answer in answers:
        counts[answer] += 1
    return sorted(counts, key=counts.__getitem__)[-1]


def clean_direct_answer(text: str) -> str:
    """`clean_answer`, with three whole answers replaced first."""
    return clean_answer(REPLACEMENTS.get(text.lower(), text))


def select_shots(query_D: np.ndarray, keys_ND: np.ndarray, num_shots: int, skip_self: bool) -> list[int]:
    """The places of the examples like a question, the most similar first.

    `skip_self`: the question is one of the examples itself; the best match is left out as such.
    """
    found = most_similar(query_D, keys_ND, num_shots + 1)
    return found[1:] if skip_self else found[:num_shots]


def to_shot(row: CaptionedQuestion) -> Shot:
    """A solved example: its first caption with tags, and the annotators' majority answer."""
    return Shot(context_of(row.captions[0], row.tags), row.question, majority_answer(row.answers))


def build_direct_prompt(
    caption: str, row: CaptionedQuestion, examples: Sequence[CaptionedQuestion], order: Sequence[int]
) -> str:
    """The prompt for a question about an image with `caption`; of the examples the most similar is shown last.

    `order`: places of the examples, the most similar first.
    """
    shots = [to_shot(examples[place]) for place in reversed(order)]
    return build_prompt(shots, context_of(caption, row.tags), row.question)


def answer_questions(
    model: LanguageModel,
    rows: Sequence[CaptionedQuestion],
    examples: Sequence[CaptionedQuestion],
    orders: Sequence[Sequence[int]],
) -> list[str | None]:
    """The answer to each question from its first caption; None where the model was not asked for lack of budget.

    An unreadable reply is an empty answer. `orders` as in `build_direct_prompt`.
    """
    prompts = [build_direct_prompt(row.captions[0], row, examples, o) for row, o in zip(rows, orders, strict=True)]
    return [
        None if reply is None else clean_direct_answer(_readable_line(reply).strip())
        for reply in model.complete(greedy_requests(prompts, MAX_ANSWER_TOKENS))
    ]


def _readable_line(reply: Completion) -> str:
    return first_line(reply.text) if reply.is_readable else ""


# ---------------------------------------------------------------- captioner and small QA models


def captioner_prompt(question: str, ocr: str = "") -> str:
    """The prompt of a captioner that describes an image for a question; `ocr`: text read in the image."""
    return f"{CAPTIONER_PROMPT}{question}" + (f" OCR inputs: {ocr}" if ocr else "")


def captions_for_questions(
    model: Model, images: Sequence[object], questions: Sequence[str], ocr: Sequence[str] | None = None
) -> list[str]:
    """A caption for each image that helps to answer its question, by a model trained on `captioner_prompt`s."""
    texts = ocr or [""] * len(questions)
    prompts = [captioner_prompt(question, text) for question, text in zip(questions, texts, strict=True)]
    return [answer.text for answer in model.answer(images, prompts)]


def unified_qa_input(question: str, caption: str, choices: Sequence[str] = ()) -> str:
    """The input of UnifiedQA: question, caption and numbered choices on lines of their own, with spaces around."""
    listed = " \n " + "".join(f"({number}) {choice} " for number, choice in enumerate(choices, 1)) if choices else ""
    return f"{question} \n {caption}{listed}"


def choose(answer: str, choices: Sequence[str]) -> int:
    """The place of the choice that a generated answer means: the one with the fewest edits for its length.

    The released code compares sentence embeddings instead. Raises UserError without choices.
    """
    if not choices:
        raise UserError("the question has no choices; give at least one")
    answer, cleaned = clean_answer(answer), [clean_answer(choice) for choice in choices]
    rates = [edit_distance(answer, choice) / max(len(choice), len(answer), 1) for choice in cleaned]
    return rates.index(min(rates))


# ---------------------------------------------------------------- training data


def creation_prompt(row: CaptionedQuestion, few_shot: str = FEW_SHOT_EXAMPLES) -> str:
    """The prompt whose continuation is a caption that helps to answer a question with a known answer."""
    lines = [
        f"Original contexts: {'. '.join(row.captions)}",
        f"Question: {row.question}",
        f"Answer: {majority_answer(row.answers)}",
        "Summary:",
    ]
    return f"{few_shot}\n\n" + "\n".join(lines)


def create_captions(
    model: LanguageModel, rows: Sequence[CaptionedQuestion], num_samples: int = NUM_SAMPLES, few_shot=FEW_SHOT_EXAMPLES
) -> list[list[str]]:
    """For each question the different captions among `num_samples` samples, in the order of their first mention.

    Each sample is a request of its own, as many servers refuse several in one.
    """
    requests = [
        CompletionRequest(
            creation_prompt(row, few_shot),
            max_tokens=MAX_CAPTION_TOKENS,
            stop=STOP[:1],
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            sample=sample,
        )
        for row in rows
        for sample in range(num_samples)
    ]
    replies = [reply and _readable_line(reply).removeprefix(" ").rstrip() for reply in model.complete(requests)]
    groups = [replies[start : start + num_samples] for start in range(0, len(replies), num_samples)]
    return [list(dict.fromkeys(filter(None, group))) for group in groups]


@dataclasses.dataclass(frozen=True)
class ScoredCaption:
    """A candidate with the answer that the filter's prompt finds from it, and its scores."""

    caption: str
    answer: str
    soft_score: float
    hard_score: float


def soft_score(answer: str, references: Sequence[str]) -> float:
    """The sum of the three largest of 1 - character error rate over the references, divided by 3, at most 1.

    The error rate is in characters of the reference, so that long answers score below 0; fewer than three references
    are divided by 3 too. An empty reference counts as one character.
    """
    rates = [edit_distance(answer, reference) / max(len(reference), 1) for reference in references]
    best = sorted((1 - rate for rate in rates), reverse=True)[:BEST_REFERENCES]
    return min(1.0, sum(best) / BEST_REFERENCES)


hard_score = quick_accuracy


def score_candidates(
    model: LanguageModel,
    rows: Sequence[CaptionedQuestion],
    candidates: Sequence[Sequence[str]],
    examples: Sequence[CaptionedQuestion],
    orders: Sequence[Sequence[int]],
) -> list[list[ScoredCaption]]:
    """For each question its candidate captions with the answers found from them and their scores.

    Candidates that were not asked about, for lack of budget, or whose reply is unreadable are left out.
    """
    places, prompts = [], []
    for place, (row, captions, order) in enumerate(zip(rows, candidates, orders, strict=True)):
        for caption in captions:
            places.append((place, caption))
            prompts.append(build_direct_prompt(caption, row, examples, order))
    scored: list[list[ScoredCaption]] = [[] for _ in rows]
    for (place, caption), reply in zip(places, model.complete(greedy_requests(prompts, MAX_ANSWER_TOKENS))):
        if reply is not None and reply.is_readable:
            answer, references = clean_answer(first_line(reply.text)), rows[place].answers
            scores = soft_score(answer, references), hard_score(answer, references)
            scored[place].append(ScoredCaption(caption, answer, *scores))
    return scored


def keep_best(candidates: Sequence[ScoredCaption], min_hard_score: float = SCORE_PER_MATCH) -> list[str]:
    """The captions with the largest soft score, the shortest first; none whose hard score is below the least.

    The default least score keeps captions from which the answer of at least one annotator was found.
    """
    good = [one for one in candidates if one.hard_score >= min_hard_score]
    best = max((one.soft_score for one in good), default=0.0)
    return sorted((one.caption for one in good if one.soft_score == best), key=len)
