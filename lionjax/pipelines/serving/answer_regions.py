# SPDX-License-Identifier: Apache-2.0
"""The boxes and masks of an answer as JSON, each with the characters of the text that write it and that name it."""

from __future__ import annotations

import re
from typing import Any

from lionjax.data.boxes import BOX_PATTERN, MASK_TEXT
from lionjax.data.rle import encode_rle
from lionjax.inference.engine import Answer

PLACE = re.compile(BOX_PATTERN.pattern + "|" + re.escape(MASK_TEXT))
CLAUSE_END = re.compile(r"[.,;:!?()\n]|\band\b|\bor\b")
DETERMINER = re.compile(r"\b(a|an|the|this|that|these|those|his|her|its|their|one|two|three|some|another)\b", re.I)
MAX_PHRASE_WORDS = 5  # before a box, where no determiner begins the phrase
Span = tuple[int, int]


def answer_regions(answer: Answer) -> list[dict[str, Any]]:
    """The places of an answer in the order of the text: rows with those of these keys that apply.

    - `box`: x0, y0, x1, y1 as fractions of the image. `mask`: COCO's compressed run lengths, {"size", "counts"}.
    - `start`, `end`: the characters of the text that write the box. `phrase`: [start, end] of the words that name it.
    """
    places = list(PLACE.finditer(answer.text))
    masks = [] if answer.masks is None else list(answer.masks)
    boxes = [list(map(float, box)) for box in answer.boxes]
    is_aligned = len(boxes) == sum(place[0] != MASK_TEXT for place in places)
    rows, phrases = [], place_phrases(answer.text, [place.span() for place in places])
    remaining = iter(boxes)
    for number, (place, phrase) in enumerate(zip(places, phrases)):
        row: dict[str, Any] = {"start": place.start(), "end": place.end()}
        if place[0] != MASK_TEXT:
            row["box"] = next(remaining) if is_aligned else list(map(float, place.groups()))
        if number < len(masks) and masks[number].any():
            row["mask"] = encode_rle(masks[number])
        if phrase is not None:
            row["phrase"] = list(phrase)
        if "box" in row or "mask" in row:
            rows.append(row)
    if not places:  # boxes that the text does not write
        rows = [{"box": box} for box in boxes]
        for row, mask in zip(rows, masks):
            row["mask"] = encode_rle(mask)
    return rows


def place_phrases(text: str, spans: list[Span]) -> list[Span | None]:
    """For each place in a text the words before it that name it, None for none.

    They begin at the last determiner of the clause, or are its last words. Places one after another share a phrase.
    """
    found: list[Span | None] = []
    begin = 0
    for start, end in spans:
        between = text[begin:start]
        if found and not between.strip(" ,") or between.strip(" ,") in ("and", "or"):
            found.append(found[-1] if found else None)
        else:
            found.append(_phrase(text, begin, start))
        begin = end
    return found


def _phrase(text: str, begin: int, end: int) -> Span | None:
    """The phrase at the end of `text[begin:end]`."""
    end = begin + len(text[begin:end].rstrip())
    ends = [match.end() for match in CLAUSE_END.finditer(text, begin, end)]
    begin = ends[-1] if ends else begin
    starts = [match.start() for match in DETERMINER.finditer(text, begin, end)]
    words = [match.start() for match in re.finditer(r"\S+", text[begin:end])][-MAX_PHRASE_WORDS:]
    if not words:
        return None
    return (starts[-1] if starts else begin + words[0]), end
