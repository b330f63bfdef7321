# SPDX-License-Identifier: Apache-2.0
"""Texts that begin alike, packed into rows so that a causal text tower reads each shared beginning once.

A row holds one or more groups: a beginning, then what follows it in each text of the group. Tokens that follow attend
to the beginning of their group and to earlier tokens of their own text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

ROW_LENGTHS = (64, 128, 192, 256)  # tokens; all rows of a batch are as long


@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """Rows of tokens, int32 (B, L), and where each text ends.

    `segment_BL` numbers beginnings and texts of a row from 1, 0 is padding; `beginning_BL` is the segment of the
    beginning that a token may read, its own for the tokens of a beginning. `row_N`, `column_N`: last token of each text
    in the order given.
    """

    ids_BL: np.ndarray
    position_BL: np.ndarray
    segment_BL: np.ndarray
    beginning_BL: np.ndarray
    row_N: np.ndarray
    column_N: np.ndarray


def pack(rows: Sequence[Sequence[int]], pad_id: int) -> PackedTexts:
    """Pack texts, each a list of at least one id and shorter than the largest of `ROW_LENGTHS`."""
    texts = sorted({tuple(row) for row in rows})
    limit = max(ROW_LENGTHS)
    packed: list[list[tuple[int, int, int, int]]] = [[]]  # (id, position, segment, beginning) of the tokens of each row
    ends: dict[tuple[int, ...], tuple[int, int]] = {}
    for shared, group in _groups(texts):
        beginning = None
        for text in group:
            needed = len(text) - (shared if beginning is not None else 0)
            if len(packed[-1]) + needed > limit:
                packed.append([])
                beginning = None
            row = packed[-1]
            last = row[-1][2] if row else 0
            if beginning is None and shared:
                beginning = last = last + 1
                row += [(token, place, last, last) for place, token in enumerate(text[:shared])]
            row += [
                (token, place, last + 1, beginning or last + 1) for place, token in enumerate(text[shared:], shared)
            ]
            ends[text] = len(packed) - 1, len(row) - 1
    length = min(size for size in ROW_LENGTHS if size >= max(map(len, packed)))
    fields = np.zeros((4, len(packed), length), np.int32)
    fields[0] = pad_id
    for number, row in enumerate(packed):
        fields[:, number, : len(row)] = np.array(row, np.int32).T.reshape(4, -1)
    row_N, column_N = np.array([ends[tuple(row)] for row in rows], np.int32).reshape(-1, 2).T
    return PackedTexts(*fields, row_N, column_N)


def _groups(texts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """(number of shared first tokens, texts) of groups of sorted texts.

    A text joins the group before it if that takes no more tokens than a group of its own.
    """
    group: list[tuple[int, ...]] = []
    shared = 0
    for text in texts:
        common = min(_num_common(text, group[-1]), shared) if group else 0
        if group and (shared - common) * len(group) <= common:
            group.append(text)
            shared = common
            continue
        if group:
            yield shared, group
        group, shared = [text], len(text) - 1
    if group:
        yield shared, group


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """The number of first tokens that two texts share, less than the length of either."""
    longest = min(len(left), len(right)) - 1
    return next((k for k in range(longest) if left[k] != right[k]), longest)
