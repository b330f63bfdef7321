# SPDX-License-Identifier: Apache-2.0
"""LLM-as-a-judge of open answers: LLaVA-Bench (COCO and in the wild) of LLaVA (arXiv 2304.08485).

The layout of what the judge reads, its temperature and the reading "llava" of its scores are those of LLaVA's code; the
rubric is ours, with the same contract. LLaVA's code resumes by counting lines and repeats for ever; here replies have a
journal, and a reply without two scores is asked for once more and then left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lionjax.core.errors import UserError, check_choices, check_ranges
from lionjax.core.files import make_folder, write_json, write_jsonl
from lionjax.data.datasets.annotation_files import read_all_rows
from lionjax.evaluation.metrics import judged
from lionjax.evaluation.published.predictions import prediction_text, read_predictions
from lionjax.pipelines.completion import ChatRequest, Completion, LanguageModel
from lionjax.pipelines.image_contexts import by_image, format_context, read_contexts

READINGS = ("readable", "llava")
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
ROLE = "Assistant"
RUBRIC = (
    "Two AI assistants answered the question above about an image, which the context describes for you. Judge how "
    "helpful, relevant, accurate and detailed each answer is, and give each an overall score from 1 to 10, where "
    "higher is better. The first line of your reply has only the two scores, of Assistant 1 and of Assistant 2, with a "
    "space between them. Explain your scores in the lines below, without favor for the order of the answers."
)
REVIEWS_FILE, REPORT_FILE = "reviews.jsonl", "report.json"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """How answers are judged. Raises UserError for values out of range.

    `reading`: "readable" takes two scores of 1 to 10 with spaces, commas or slashes and leaves other replies out;
    "llava" is LLaVA's reading, in which a failed one counts as -1. `both_orders`: ask with the reference first and
    second, and take the mean, as judges favor a place.
    """

    reading: str = "readable"
    both_orders: bool = False
    temperature: float = 0.2
    max_tokens: int = 1024

    def __post_init__(self):
        check_choices(self, UserError, reading=READINGS)
        check_ranges(self, temperature=">= 0", max_tokens=">= 1")


@dataclasses.dataclass(frozen=True)
class JudgedQuestion:
    """A question with the context of its image, the reference answer and the answer to judge."""

    question_id: str
    category: str
    question: str
    context: str
    reference: str
    answer: str
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Review:
    """The scores (reference, answer) of a question, None if a reply is unreadable or was not asked, and the replies."""

    scores: tuple[float, float] | None
    replies: tuple[str, ...]
    was_asked: bool = True


def read_questions(questions: Path, context: Path, references: Path, answers: Path) -> list[JudgedQuestion]:
    """The questions of LLaVA-Bench with what the judge reads. Raises UserError for files that do not fit together."""
    for path in (questions, references, answers):
        if not path.is_file():
            raise UserError(f"there is no file {path}; give LLaVA-Bench's questions and the answers to them")
    rows = read_all_rows(questions)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(key in row for key in ("question_id", "image", "text", "category")):
            raise UserError(f"{questions}: row {number} is no question; it has question_id, image, text and category")
    contexts = by_image(read_contexts(context), [row["image"] for row in rows], context)
    found = []
    by_id = [(path, read_predictions(path)[0]) for path in (references, answers)]
    for row, described in zip(rows, contexts):
        texts = []
        for path, given in by_id:
            if str(row["question_id"]) not in given:
                raise UserError(
                    f"{path} has no answer to question {row['question_id']}; give all answers with their ids"
                )
            texts.append(given[str(row["question_id"])])
        model = texts[1].get("model_id", "") if isinstance(texts[1], dict) else ""
        reference, answer = map(prediction_text, texts)
        fields = (str(row["question_id"]), f"llava_bench_{row['category']}", row["text"], format_context(described))
        found.append(JudgedQuestion(*fields, reference, answer, str(model)))
    return found


def build_request(row: JudgedQuestion, config: JudgeConfig, swapped: bool = False, again: bool = False) -> ChatRequest:
    """What the judge is asked. `swapped`: the answer to judge is first. `again`: greedy, after an unreadable reply."""
    first, second = (row.answer, row.reference) if swapped else (row.reference, row.answer)
    blocks = [f"[Context]\n{row.context}", f"[Question]\n{row.question}"]
    for number, text in ((1, first), (2, second)):
        blocks += [f"[{ROLE} {number}]\n{text}", f"[End of {ROLE} {number}]"]
    content = "\n\n".join([*blocks, f"[System]\n{RUBRIC}", ""])
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": content})
    settings = {"max_tokens": config.max_tokens, "temperature": 0.0 if again else config.temperature}
    return ChatRequest(messages, **settings, sample=int(again), may_be_cut=True)


def judge_answers(model: LanguageModel, rows: Sequence[JudgedQuestion], config: JudgeConfig) -> list[Review]:
    """The review of each question in order."""
    orders = (False, True) if config.both_orders else (False,)
    places = [(k, swapped) for k in range(len(rows)) for swapped in orders]
    replies = model.complete([build_request(rows[k], config, swapped) for k, swapped in places])
    if config.reading == "readable":
        failed = [n for n, reply in enumerate(replies) if reply is not None and _scores(reply, config) is None]
        requests = [build_request(rows[places[n][0]], config, places[n][1], again=True) for n in failed]
        for n, reply in zip(failed, model.complete(requests) if requests else ()):
            replies[n] = replies[n] if reply is None else reply
    found = []
    for start in range(0, len(replies), len(orders)):
        group = replies[start : start + len(orders)]
        pairs = [reply and _scores(reply, config) for reply in group]
        oriented = [pair and (pair[::-1] if swapped else pair) for pair, swapped in zip(pairs, orders)]
        complete = all(pair is not None for pair in oriented)
        means = tuple(sum(values) / len(orders) for values in zip(*oriented)) if complete else None
        texts = tuple(reply.text for reply in group if reply is not None)
        found.append(Review(means, texts, all(reply is not None for reply in group)))
    return found


def _scores(reply: Completion, config: JudgeConfig) -> tuple[float, float] | None:
    """The two scores of a reply; None for an unreadable one, also for one that is cut."""
    if config.reading == "llava":
        return tuple(judged.parse_judge_scores(reply.text if reply.is_readable else ""))
    return judged.read_scores(reply.text) if reply.is_readable else None


def write_reviews(
    folder: Path, rows: Sequence[JudgedQuestion], reviews: Sequence[Review], model: LanguageModel, config: JudgeConfig
) -> dict[str, Any]:
    """Write reviews.jsonl, in LLaVA's form with the judge's name, and report.json, whose content is returned.

    Raises UserError if no reply has two scores.
    """
    described = model.describe()
    scored = [(row, review) for row, review in zip(rows, reviews, strict=True) if review.scores is not None]
    make_folder(folder)
    lines = [
        {
            "question_id": row.question_id,
            "category": row.category,
            "content": "\n\n".join(review.replies),
            "tuple": list(review.scores or judged.UNREADABLE),
            "judge": described["model"],
            "model_id": row.model,
        }
        for row, review in zip(rows, reviews)
        if review.was_asked
    ]
    write_jsonl(folder / REVIEWS_FILE, lines)
    if not scored:
        raise UserError(f"none of {len(lines)} replies of the judge has two scores in its first line; see {folder}")
    table = judged.judge_table([review.scores for _, review in scored], [row.category for row, _ in scored])
    is_failed = [review.was_asked and review.scores in (None, tuple(judged.UNREADABLE)) for review in reviews]
    report = {
        "benchmark": "llava_bench",
        "judge": described,
        "settings": dataclasses.asdict(config),
        "models": sorted({row.model for row in rows}),
        "num_questions": len(rows),
        "num_unreadable": sum(is_failed),
        "num_not_asked": sum(not review.was_asked for review in reviews),
        "table": table,
        "printed": judged.judge_lines(table),
    }
    write_json(folder / REPORT_FILE, report)
    return report
