# SPDX-License-Identifier: Apache-2.0
"""MiniGPT-4's second stage data (arXiv 2304.10592): long descriptions, rewritten by a language model, kept by a person.

A description is continued while it has fewer than 80 words, as in the paper with tokens. The person chooses on
review.html; with the saved file the kept ones are written as filter_cap.json with images/, and as instructions.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lionjax.core.files import write_json
from lionjax.pipelines.completion import ChatRequest, Completion
from lionjax.pipelines.image_contexts import ImageContext
from lionjax.pipelines.instructions.llava_kinds import DETAIL_QUESTIONS
from lionjax.pipelines.instructions.records import Outcome, RefusedError, check_text, draw, readable_text, to_record
from lionjax.pipelines.review_page import ReviewItem, write_page

if TYPE_CHECKING:
    from lionjax.inference.model import Model

MIN_WORDS, MAX_CONTINUATIONS = 80, 4
QUESTION, CONTINUE = "Describe this image in detail. Give as many details as possible.", "Continue"
REWRITE = (
    "Correct the description below. Remove what is said twice, what is no sentence or not English, signs without "
    "meaning, and words of doubt about the image; complete or drop sentences that break off. Reply with the corrected "
    "description alone, or with the description as it is if nothing is wrong.\n\n"
)
CHOICES = {"keep": "true of the image, complete, well written", "drop": "anything else"}
PAGE_FILE, REVIEW_FILE, CAPTIONS_FILE, IMAGE_FOLDER = "review.html", "review.jsonl", "filter_cap.json", "image"


def describe_image(model: Model, image: Image.Image, min_words: int = MIN_WORDS) -> str:
    """A description of at least `min_words` words, as far as the model continues that long."""
    turns: list[tuple[str, str]] = []
    text = ""
    while len(text.split()) < min_words and len(turns) <= MAX_CONTINUATIONS:
        prompt = CONTINUE if turns else QUESTION
        answer = model.answer([image], [prompt], history=[turns])[0].text.strip()
        if not answer:
            break
        turns.append((prompt, answer))
        text = f"{text} {answer}".strip()
    return text


def build_requests(drafts: Sequence[str]) -> list[ChatRequest]:
    """The request that rewrites each draft."""
    return [ChatRequest(({"role": "user", "content": REWRITE + draft},), max_tokens=1024) for draft in drafts]


def check_description(reply: Completion | None, min_words: int = MIN_WORDS) -> str:
    """The rewritten description. Raises RefusedError for one that is too short, repeats itself, or is no answer."""
    text = check_text(readable_text(reply))
    if (count := len(text.split())) < min_words:
        raise RefusedError(f"too short: {count} words of {min_words}")
    sentences = [one.strip().lower() for one in re.split(r"[.!?]\s", text + " ") if one.strip()]
    if len(set(sentences)) < len(sentences):
        raise RefusedError("a sentence stands twice")
    return text


def to_outcome(context: ImageContext, reply: Completion | None, min_words: int = MIN_WORDS, seed: int = 0) -> Outcome:
    """The record of a rewritten description, or why there is none."""
    try:
        text = check_description(reply, min_words)
    except RefusedError as error:
        return Outcome(context.id, reason=str(error), reply=reply.text if reply else "")
    question = DETAIL_QUESTIONS[draw(seed, f"question {context.id}", len(DETAIL_QUESTIONS))]
    return Outcome(context.id, to_record(context.id, context.image, [(question, text)]))


def write_review(folder: Path, outcomes: Sequence[Outcome], open_image: Callable[[str], Image.Image] | None) -> int:
    """Write review.html with the descriptions that may be kept; returns their number."""
    items = [
        ReviewItem(
            outcome.id,
            {"Description": outcome.record["conversations"][1]["value"]},
            None if open_image is None else open_image(outcome.record["image"]),
        )
        for outcome in outcomes
        if outcome.record is not None
    ]
    write_page(folder / PAGE_FILE, "Descriptions to keep", items, CHOICES, "id", "choice", REVIEW_FILE)
    return len(items)


def apply_review(outcomes: Sequence[Outcome], choices: Mapping[str, str]) -> list[Outcome]:
    """The outcomes with those refused that the person dropped, or made no choice about."""
    found = []
    for outcome in outcomes:
        choice = choices.get(outcome.id)
        if outcome.record is None or choice == "keep":
            found.append(outcome)
        else:
            reason = "dropped by the reviewer" if choice == "drop" else "not reviewed"
            found.append(Outcome(outcome.id, reason=reason, reply=outcome.record["conversations"][1]["value"]))
    return found


def write_captions(
    folder: Path, outcomes: Sequence[Outcome], open_image: Callable[[str], Image.Image] | None
) -> list[dict[str, Any]]:
    """Write filter_cap.json and image/NUMBER.jpg in MiniGPT-4's form, of the kept descriptions; returns the rows."""
    kept = [outcome.record for outcome in outcomes if outcome.record is not None]
    rows = [{"image_id": str(n), "caption": record["conversations"][1]["value"]} for n, record in enumerate(kept)]
    write_json(folder / CAPTIONS_FILE, {"annotations": rows})
    if open_image is not None:
        (folder / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
        for row, record in zip(rows, kept):
            open_image(record["image"]).save(folder / IMAGE_FOLDER / f"{row['image_id']}.jpg", quality=95)
    return rows
