# SPDX-License-Identifier: Apache-2.0
"""Records in LLaVA's form, the checks of what a language model wrote, and the files of a run.

A run writes instructions.json, which `Conversations` reads and configs train on, refused.jsonl with a reason for each
item that is left out, and report.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.files import make_folder, write_json, write_jsonl
from lionjax.data.boxes import Box, box_to_text
from lionjax.data.letterbox import Letterbox
from lionjax.data.rounds import IMAGE_MARK
from lionjax.pipelines.completion import Completion, LanguageModel

INSTRUCTIONS_FILE, REFUSED_FILE, REPORT_FILE = "instructions.json", "refused.jsonl", "report.json"
MAX_TEXT = 20_000  # characters of a reply
SOURCES = re.compile(r"\bcaptions?\b|\bbounding box|\bcoordinates?\b|[\[(]\s*[01]?\.\d", re.IGNORECASE)
REFUSALS = re.compile(
    r"\s*(i'?m sorry|i am sorry|sorry,|i can(no|')t\b|i am unable|i'm unable|as an ai\b)", re.IGNORECASE
)


class RefusedError(Exception):
    """An item that is left out, with the reason."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was made of an item: a record, or the reason why there is none; `reply`: what the reason is about."""

    id: str
    record: Mapping[str, Any] | None = None
    reason: str = ""
    reply: str = ""


def readable_text(reply: Completion | None) -> str:
    """The text of a reply. Raises RefusedError for one that was not asked, is cut, refused or too long."""
    if reply is None:
        raise RefusedError("not asked: the budget is used up")
    if not reply.is_readable:
        raise RefusedError(f"unreadable reply: {reply.problem}")
    if len(reply.text) > MAX_TEXT:
        raise RefusedError(f"a reply of more than {MAX_TEXT} characters")
    return reply.text.strip()


def check_text(text: str, may_have_boxes: bool = False) -> str:
    """The text. Raises RefusedError if it is empty, refuses, has an image mark, or names captions and boxes."""
    if not text.strip():
        raise RefusedError("empty text")
    if IMAGE_MARK in text:
        raise RefusedError(f"{IMAGE_MARK} in a text")
    if REFUSALS.match(text):
        raise RefusedError("the answer refuses")
    if not may_have_boxes and (found := SOURCES.search(text)):
        raise RefusedError(f"names its source: {found[0].strip()!r}")
    return text.strip()


def draw(seed: int, name: str, count: int) -> int:
    """A number below `count` that follows from the seed and a name."""
    digits = int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:15], 16)
    return int(np.random.default_rng(digits).integers(count))


def to_record(name: str, image: str, pairs: Sequence[tuple[str, str]], image_last: bool = False) -> dict[str, Any]:
    """A record of LLaVA: the image mark on a line of its own before the first question, or after it."""
    first = f"{pairs[0][0]}\n{IMAGE_MARK}" if image_last else f"{IMAGE_MARK}\n{pairs[0][0]}"
    turns = [(first, pairs[0][1]), *pairs[1:]]
    messages = [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)]
    return {"id": name, "image": image, "conversations": messages}


def padded_box_text(box: Box, size: tuple[int, int]) -> str:
    """A box of an image of `size` as text in fractions of the padded square, as in LLaVA's mixture."""
    return box_to_text(Letterbox(*size).to_padded(box))


def write_outcomes(
    folder: Path, kind: str, outcomes: Sequence[Outcome], model: LanguageModel | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files of a run; returns the content of report.json: counts, reasons, settings, language model."""
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    refused = [outcome for outcome in outcomes if outcome.record is None]
    make_folder(folder)
    write_json(folder / INSTRUCTIONS_FILE, records)
    rows = [{"id": one.id, "reason": one.reason, "reply": one.reply[:MAX_TEXT]} for one in refused]
    write_jsonl(folder / REFUSED_FILE, rows)
    report = {
        "kind": kind,
        "settings": dict(settings),
        "language_model": None if model is None else model.describe(),
        "num_items": len(outcomes),
        "num_records": len(records),
        "refused": dict(Counter(one.reason.partition(":")[0] for one in refused).most_common()),
    }
    write_json(folder / REPORT_FILE, report)
    return report
