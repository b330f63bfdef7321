# SPDX-License-Identifier: Apache-2.0
"""How the harnesses of referring expressions read a box from an answer, each with its own quirks.

A reading gives x0, y0, x1, y1 as fractions in 0..1 without ordering the corners, or None. `metrics.regions.parse_box`
is our own reading, which also accepts other brackets and orders the corners.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from lionjax.evaluation.metrics.regions import Box, parse_box

DIGIT = r"\d(?:\.\d*)?"
SHIKRA_BOXES = re.compile(rf"\[({DIGIT}(?:,{DIGIT}){{3}}(?:;{DIGIT}(?:,{DIGIT}){{3}})*)\]")
FLOAT = r"\s*(-?\d+(?:\.\d+)?)\s*"
BRACKETED = re.compile(r"\[" + ",".join([FLOAT] * 4) + r"\]")
ANGLED = re.compile(r"\{?" + r"\s*".join([r"<(\d{1,3})>"] * 4) + r"\}?")
LOCATION_BINS, MINIGPT_BINS = 32, 100
MAX_NORMALIZED = 1000  # Qwen's and InternVL's boxes, which VLMEvalKit reads


def read_only_box(text: str) -> Box | None:
    """The only box of an answer, `[0.1,0.2,0.3,0.4]` without blanks; None for several. Source: Shikra."""
    found = SHIKRA_BOXES.findall(text)
    if len(found) != 1 or ";" in found[0]:
        return None
    x0, y0, x1, y1 = map(float, found[0].split(","))
    return x0, y0, x1, y1


def read_first_brackets(text: str) -> Box | None:
    """The first four numbers in square brackets; round brackets are none. Source: lmms-eval's refcoco_bbox_rec."""
    match = BRACKETED.search(text)
    return None if match is None else tuple(map(float, match.groups()))


def read_normalized_brackets(text: str) -> Box | None:
    """As `read_first_brackets`; numbers above 1 are thousandths. Source: VLMEvalKit's RefCOCO."""
    box = read_first_brackets(text)
    return box if box is None or max(box) <= 1 else tuple(edge / MAX_NORMALIZED for edge in box)


def read_hundredths(text: str) -> Box | None:
    """The first `{<x0><y0><x1><y1>}` in hundredths of the image. Source: MiniGPT-v2 (arXiv 2310.09478)."""
    match = ANGLED.search(text)
    return None if match is None else tuple(int(edge) / MINIGPT_BINS for edge in match.groups())


def read_location_tokens(text: str) -> Box | None:
    """The first pair of `<patch_index_NNNN>` on Kosmos-2's grid of 32 x 32, or else the first box in digits.

    The corners are the centers of the two bins, as in Kosmos-2 (arXiv 2306.14824).
    """
    found = re.findall(r"<patch_index_(\d{4})>", text)[:2]
    if len(found) < 2:
        return parse_box(text)
    (y0, x0), (y1, x1) = (divmod(int(index), LOCATION_BINS) for index in found)
    return tuple((edge + 0.5) / LOCATION_BINS for edge in (x0, y0, x1, y1))


BOX_READERS: Mapping[str, Callable[[str], Box | None]] = {
    "strict": read_only_box,
    "first_box": read_first_brackets,
    "normalized_box": read_normalized_brackets,
    "hundredths": read_hundredths,
    "location_tokens": read_location_tokens,
    "lenient": parse_box,
}
