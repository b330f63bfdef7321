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
CODECS = ("digits", "bins", "embeddings")
# What is said to a model that was asked in another way than its own.
HINTS = {
    "digits": "Write places in digits.",
    "bins": "Write places in location tokens.",
    "embeddings": "Point at places.",
}
NUMBER = r"\s*(\d*\.?\d+)\s*"
BOX = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]")
CLOSING = ",.;:?!)"  # no space stands before these


def box_text(box: Box) -> str:
    """A box in digits: '[x0,y0,x1,y1]', three decimals in 0..1."""
    return "[" + ",".join(f"{edge:.3f}" for edge in box) + "]"


def pieces(text: str, known: Iterable[Box] = ()) -> list[str | Box]:
    """Words and boxes of a text in their order. A box of `known` comes with all its decimals."""
    exact, found, end = {box_text(box): tuple(box) for box in known}, [], 0
    for match in BOX.finditer(text):
        found.append(text[end : match.start()])
        found.append(exact.get(match[0], tuple(map(float, match.groups()))))
        end = match.end()
    return [piece for piece in (*found, text[end:]) if piece]


def joined(parts: Iterable[str | Box]) -> str:
    """Words and boxes as one text, the boxes in digits."""
    text = ""
    for part in parts:
        word = part.strip() if isinstance(part, str) else box_text(part)
        text += ("" if not text or word[:1] in CLOSING else " ") + word
    return text


def bins_of(box: Box, side: int) -> tuple[int, int]:
    """The bins, counted row by row of a grid of side x side, in which a box's two corners lie (Kosmos-2's rule)."""
    x0, y0, x1, y1 = box

    def first(edge: float) -> int:
        return min(max(math.floor(edge * side), 0), side - 1)

    def last(edge: float) -> int:
        return min(max(math.ceil(edge * side - 1), 0), side - 1)

    return first(y0) * side + first(x0), last(y1) * side + last(x1)


def box_of_bins(low: int, high: int, side: int) -> Box:
    """The box between the middles of two bins; around both where they share a row or a column (Kosmos-2's rule)."""
    (y0, x0), (y1, x1) = divmod(low, side), divmod(high, side)
    if x0 == x1 or y0 == y1:
        return x0 / side, y0 / side, (x1 + 1) / side, (y1 + 1) / side
    return (x0 + 0.5) / side, (y0 + 0.5) / side, (x1 + 0.5) / side, (y1 + 0.5) / side


@dataclass(frozen=True)
class Codec:
    """The ids that stand for boxes: `bins` a side of location tokens from `first_bin` on, and those of embeddings.

    0 bins: there are none, whatever ids a model has beyond its tokenizer's. `trigger` and `location` are None where
    the tokenizer lacks such pieces.
    """

    first_bin: int
    bins: int
    trigger: int | None
    location: int | None

    def ids(self, box: Box, how: str) -> list[int]:
        """The ids of a box as "bins" or "embeddings". Raises UserError where there are none."""
        if how == "bins":
            if not self.bins:
                raise UserError(
                    "places are to be location tokens, but processor.bins is 0; say how many a side (Kosmos-2: 32)"
                )
            return [self.first_bin + place for place in bins_of(box, self.bins)]
        if self.trigger is None or self.location is None:
            raise UserError(
                "the tokenizer has no pieces for places as embeddings; add them, or choose other processor.places"
            )
        return [self.trigger, self.location]

    def read(self, ids: Sequence[int], boxes: Iterable[Box] = ()) -> list[list[int] | Box]:
        """Ids of words and boxes, in their order; `boxes` are those of the embeddings.

        What stands for no box is left out: a lone location token, a trigger at the end, more than `boxes` holds.
        """
        rest, found, low = iter(boxes), [], None
        for number in map(int, ids):
            place = number - self.first_bin
            if 0 <= place < self.bins**2:
                if low is not None:
                    found.append(box_of_bins(low, place, self.bins))
                low = place if low is None else None
                continue
            low = None
            if number == self.location:
                found += [tuple(box) for box in [next(rest, None)] if box is not None]
            elif number != self.trigger:
                if not (found and isinstance(found[-1], list)):
                    found.append([])
                found[-1].append(number)
        return found
