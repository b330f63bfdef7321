# SPDX-License-Identifier: Apache-2.0
"""Box formats: boxes in text as digits, location tokens or embeddings, and the conversion between them.

"digits" (LION, arXiv 2311.11860; Shikra, arXiv 2306.15195): '[0.123,0.456,0.789,0.900]'; users and files always use
this format. "bins" (Kosmos-2, arXiv 2306.14824): two location tokens, the bins of the upper left and the lower right
corner. "embeddings" (NExT-Chat, arXiv 2311.04498): a region query token, then a box token whose embedding is computed
from the box. "masks" (LISA, arXiv 2308.00692): in an answer one mask token, at which the model has a mask and no box.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lionjax.core.experiment import MIX_BOXES
from lionjax.core.types import UserError

Box = tuple[float, float, float, float]  # x0 y0 x1 y1 in 0..1
BOX_FORMATS = MIX_BOXES
# Appended to a question whose box format differs from the model's own.
BOX_FORMAT_HINTS = {
    "digits": "Write places in digits.",
    "bins": "Write places in location tokens.",
    "embeddings": "Point at places.",
    "masks": "Mark places by masks.",
}
MASK_TEXT = "[SEG]"  # a mask token in a text for people, where its mask is not known or empty
NUMBER_PATTERN = r"\s*(\d*\.?\d+)\s*"
BOX_PATTERN = re.compile(r"\[" + ",".join([NUMBER_PATTERN] * 4) + r"\]")
CLOSING_PUNCTUATION = ",.;:?!)"  # no space precedes these


def box_to_text(box: Box) -> str:
    """The box in digits: '[x0,y0,x1,y1]', fractions in 0..1 with three decimals."""
    return "[" + ",".join(f"{edge:.3f}" for edge in box) + "]"


def split_text_and_boxes(text: str, exact_boxes: Iterable[Box] = ()) -> list[str | Box]:
    """The text pieces and boxes of a text in order. A box that rounds to one of `exact_boxes` is replaced by it."""
    exact_by_text, pieces, end = {box_to_text(box): tuple(box) for box in exact_boxes}, [], 0
    for match in BOX_PATTERN.finditer(text):
        pieces.append(text[end : match.start()])
        pieces.append(exact_by_text.get(match[0], tuple(map(float, match.groups()))))
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece]


def replace_boxes(text: str, change: Callable[[Box], Box]) -> str:
    """The text with `change` applied to each of its boxes; numbers in brackets outside of 0..1 are no box."""

    def replaced(match: re.Match) -> str:
        x0, y0, x1, y1 = map(float, match.groups())
        return box_to_text(change((x0, y0, x1, y1))) if max(x0, y0, x1, y1) <= 1 else match[0]

    return BOX_PATTERN.sub(replaced, text)


def join_text_and_boxes(parts: Iterable[str | Box]) -> str:
    """One text from text pieces and boxes, the boxes in digits."""
    text = ""
    for part in parts:
        piece = part.strip() if isinstance(part, str) else box_to_text(part)
        text += ("" if not text or piece[:1] in CLOSING_PUNCTUATION else " ") + piece
    return text


def box_to_bins(box: Box, bins_per_side: int) -> tuple[int, int]:
    """(upper left bin, lower right bin) of a box, in a row-major grid of bins_per_side x bins_per_side (Kosmos-2)."""
    x0, y0, x1, y1 = box

    def first(edge: float) -> int:
        return min(max(math.floor(edge * bins_per_side), 0), bins_per_side - 1)

    def last(edge: float) -> int:
        return min(max(math.ceil(edge * bins_per_side - 1), 0), bins_per_side - 1)

    return first(y0) * bins_per_side + first(x0), last(y1) * bins_per_side + last(x1)


def box_from_bins(upper_left_bin: int, lower_right_bin: int, bins_per_side: int) -> Box:
    """The box between the centers of two bins; if they share a row or a column, the box around both (Kosmos-2)."""
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
    """Boxes to token ids and back. Location tokens: `bins_per_side`**2 ids from `first_location_token_id` on.

    `bins_per_side` 0: the model has no location tokens. `region_query_token_id`, `box_token_id` and `mask_token_id`
    are None if the tokenizer has no such tokens.
    """

    first_location_token_id: int
    bins_per_side: int
    region_query_token_id: int | None
    box_token_id: int | None
    mask_token_id: int | None = None

    def encode(self, box: Box, box_format: str) -> list[int]:
        """The ids of a box in format "bins", "embeddings" or "masks". Raises UserError if it has no such ids."""
        if box_format == "masks":
            if self.mask_token_id is None:
                raise UserError(
                    "box format 'masks' needs the token processor.mask_token, which the tokenizer lacks; add it "
                    "(`lionjax convert --add-tokens '[SEG]'`) or choose another processor.box_format"
                )
            return [self.mask_token_id]
        if box_format == "bins":
            if not self.bins_per_side:
                raise UserError(
                    "box format 'bins' needs location tokens, but processor.location_bins_per_side is 0; "
                    "set it to at least 1 (Kosmos-2: 32)"
                )
            return [
                self.first_location_token_id + location_bin for location_bin in box_to_bins(box, self.bins_per_side)
            ]
        if self.region_query_token_id is None or self.box_token_id is None:
            raise UserError(
                "box format 'embeddings' needs the tokens <at> and <boxes>, which the tokenizer lacks; "
                "add them or choose another processor.box_format"
            )
        return [self.region_query_token_id, self.box_token_id]

    def decode(self, ids: Sequence[int], boxes: Iterable[Box | None] = ()) -> list[list[int] | Box | str]:
        """Text ids and boxes in order, from generated ids; `boxes` are those of the box tokens or mask tokens.

        Tokens without a box are dropped: a single location token, a region query token at the end, and box tokens
        beyond the number of `boxes`. A mask token without a box is `MASK_TEXT`.
        """
        remaining_boxes, parts, upper_left_bin = iter(boxes), [], None
        for token_id in map(int, ids):
            location_bin = token_id - self.first_location_token_id
            if 0 <= location_bin < self.bins_per_side**2:
                if upper_left_bin is not None:
                    parts.append(box_from_bins(upper_left_bin, location_bin, self.bins_per_side))
                upper_left_bin = location_bin if upper_left_bin is None else None
                continue
            upper_left_bin = None
            if token_id == self.box_token_id:
                parts += [tuple(box) for box in [next(remaining_boxes, None)] if box is not None]
            elif token_id == self.mask_token_id:
                box = next(remaining_boxes, None)
                parts.append(MASK_TEXT if box is None else tuple(box))
            elif token_id != self.region_query_token_id:
                if not (parts and isinstance(parts[-1], list)):
                    parts.append([])
                parts[-1].append(token_id)
        return parts


def sort_corners(box: Sequence[float]) -> Box:
    """A predicted box clipped to 0..1, with its corners in ascending order."""
    x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def box_around(mask_HW: np.ndarray) -> Box | None:
    """The tight box of a mask (as torchvision's masks_to_boxes), in fractions of the image; None for an empty mask."""
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    (height, width), edges = mask_HW.shape, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return tuple(float(edge / side) for edge, side in zip(edges, (width, height) * 2))
