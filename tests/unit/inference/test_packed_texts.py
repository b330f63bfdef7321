# SPDX-License-Identifier: Apache-2.0
"""Packing of texts that begin alike: each token attends to what it would attend to alone, and little is read twice."""

import numpy as np

from lionjax.inference.packed_texts import ROW_LENGTHS, pack


def read_back(packed, row: int, column: int) -> list[int]:
    """The ids that the token at a place attends to, in the order of their positions."""
    segment, beginning = packed.segment_BL[row], packed.beginning_BL[row]
    seen = (segment == segment[column]) | (segment == beginning[column])
    seen &= packed.position_BL[row] <= packed.position_BL[row, column]
    assert sorted(packed.position_BL[row, seen]) == list(range(seen.sum()))
    return packed.ids_BL[row, seen][np.argsort(packed.position_BL[row, seen])].tolist()


def random_texts(rng, count: int) -> list[list[int]]:
    beginnings = [rng.integers(1, 5, rng.integers(1, 12)).tolist() for _ in range(3)]
    return [beginnings[rng.integers(3)] + rng.integers(1, 9, rng.integers(1, 4)).tolist() for _ in range(count)]


def test_every_text_reads_its_own_tokens_and_no_others():
    rng = np.random.default_rng(0)
    for count in (1, 2, 45, 300):
        texts = random_texts(rng, count)
        packed = pack(texts, 0)
        assert packed.ids_BL.shape[1] in ROW_LENGTHS
        for text, row, column in zip(texts, packed.row_N.tolist(), packed.column_N.tolist()):
            assert read_back(packed, row, column) == text


def test_shared_beginnings_are_read_once():
    texts = [[1, 2, 3, 4, 5, 6, 7, 8, token, 9] for token in range(10, 55)]
    packed = pack(texts, 0)
    assert packed.ids_BL.shape == (1, 128)
    assert (packed.segment_BL > 0).sum() == 8 + 45 * 2
    unlike = pack([[token, 1, 2] for token in range(10)], 0)
    assert (unlike.segment_BL > 0).sum() == 30
