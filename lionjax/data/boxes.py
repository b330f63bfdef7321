# SPDX-License-Identifier: Apache-2.0
"""How a box stands in a text. People and files write it as digits; a model may read and write it in three ways.

As digits, like everybody (LION, Shikra): '[0.123,0.456,0.789,0.900]'. As two location tokens (Kosmos-2, arXiv
2306.14824): the bin of its upper left corner and that of its lower right. Or as an embedding (NExT-Chat): a trigger
token, and behind it a location token whose embedding the box itself makes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lionjax.core.types import UserError

Box = tuple[float, float, float, float]
BOX_FORMATS = ("digits", "bins", "embeddings")
# What is said to a model that was asked in another way than its own.
BOX_FORMAT_HINTS = {
    "digits": "Write places in digits.",
    "bins": "Write places in location tokens.",
    "embeddings": "Point at places.",
}
NUMBER_PATTERN = r"\s*(\d*\.?\d+)\s*"
BOX_PATTERN = re.compile(r"\[" + ",".join([NUMBER_PATTERN] * 4) + r"\]")
CLOSING_PUNCTUATION = ",.;:?!)"  # no space stands before these


def box_to_text(box: Box) -> str:
    """A box in digits: '[x0,y0,x1,y1]', three decimals in 0..1."""
    return "[" + ",".join(f"{edge:.3f}" for edge in box) + "]"


def split_text_and_boxes(text: str, exact_boxes: Iterable[Box] = ()) -> list[str | Box]:
    """Words and boxes of a text in their order. A box of `known` comes with all its decimals."""
    exact, found, end = {box_to_text(box): tuple(box) for box in exact_boxes}, [], 0
    for match in BOX_PATTERN.finditer(text):
        found.append(text[end : match.start()])
        found.append(exact.get(match[0], tuple(map(float, match.groups()))))
        end = match.end()
    return [piece for piece in (*found, text[end:]) if piece]


def join_text_and_boxes(parts: Iterable[str | Box]) -> str:
    """Words and boxes as one text, the boxes in digits."""
    text = ""
    for part in parts:
        word = part.strip() if isinstance(part, str) else box_to_text(part)
        text += ("" if not text or word[:1] in CLOSING_PUNCTUATION else " ") + word
    return text


def box_to_bins(box: Box, bins_per_side: int) -> tuple[int, int]:
    """The bins, counted row by row of a grid of side x side, in which a box's two corners lie (Kosmos-2's rule)."""
    x0, y0, x1, y1 = box

    def first(edge: float) -> int:
        return min(max(math.floor(edge * bins_per_side), 0), bins_per_side - 1)

    def last(edge: float) -> int:
        return min(max(math.ceil(edge * bins_per_side - 1), 0), bins_per_side - 1)

    return first(y0) * bins_per_side + first(x0), last(y1) * bins_per_side + last(x1)


def box_from_bins(upper_left_bin: int, lower_right_bin: int, bins_per_side: int) -> Box:
    """The box between the middles of two bins; around both where they share a row or a column (Kosmos-2's rule)."""
    (y0, x0), (y1, x1) = divmod(upper_left_bin, bins_per_side), divmod(lower_right_bin, bins_per_side)
    if x0 == x1 or y0 == y1:
        return x0 / bins_per_side, y0 / bins_per_side, (x1 + 1) / bins_per_side, (y1 + 1) / bins_per_side
    return (
        (x0 + 0.5) / bins_per_side,
        (y0 + 0.5) / bins_per_side,
        (x1 + 0.5) / bins_per_side,
        (y1 + 0.5) / bins_per_side,
    )


@dataclass(frozen=True)
class BoxCodec:
    """The ids that stand for boxes: `bins` a side of location tokens from `first_bin` on, and those of embeddings.

    0 bins: there are none, whatever ids a model has beyond its tokenizer's. `trigger` and `location` are None where
    the tokenizer lacks such pieces.
    """

    first_location_token_id: int
    bins_per_side: int
    region_query_token_id: int | None
    box_token_id: int | None

    def encode(self, box: Box, box_format: str) -> list[int]:
        """The ids of a box as "bins" or "embeddings". Raises UserError where there are none."""
        if box_format == "bins":
            if not self.bins_per_side:
                raise UserError(
                    "places are to be location tokens, but processor.location_bins_per_side is 0; say how many a side (Kosmos-2: 32)"
                )
            return [self.first_location_token_id + place for place in box_to_bins(box, self.bins_per_side)]
        if self.region_query_token_id is None or self.box_token_id is None:
            raise UserError(
                "the tokenizer has no pieces for places as embeddings; add them, or choose other processor.box_format"
            )
        return [self.region_query_token_id, self.box_token_id]

    def decode(self, ids: Sequence[int], boxes: Iterable[Box] = ()) -> list[list[int] | Box]:
        """Ids of words and boxes, in their order; `boxes` are those of the embeddings.

        What stands for no box is left out: a lone location token, a trigger at the end, more than `boxes` holds.
        """
        rest, found, low = iter(boxes), [], None
        for number in map(int, ids):
            place = number - self.first_location_token_id
            if 0 <= place < self.bins_per_side**2:
                if low is not None:
                    found.append(box_from_bins(low, place, self.bins_per_side))
                low = place if low is None else None
                continue
            low = None
            if number == self.box_token_id:
                found += [tuple(box) for box in [next(rest, None)] if box is not None]
            elif number != self.region_query_token_id:
                if not (found and isinstance(found[-1], list)):
                    found.append([])
                found[-1].append(number)
        return found
