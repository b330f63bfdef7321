# SPDX-License-Identifier: Apache-2.0
"""Batches of token ids that are given as lists."""

from collections.abc import Sequence

import numpy as np

from lionjax.core.types import Batch

Text = tuple[np.ndarray, np.ndarray]  # int32 ids (B, L), padded on the right, and their mask


def padded(texts: Sequence[Sequence[int]], length: int = 1) -> Text:
    """Lists of ids as arrays of the longest one's length, at least `length`."""
    ids_BL = np.zeros((len(texts), max(length, *map(len, texts))), np.int32)
    mask_BL = np.zeros_like(ids_BL)
    for row, text in enumerate(texts):
        ids_BL[row, : len(text)], mask_BL[row, : len(text)] = text, 1
    return ids_BL, mask_BL


def batch_of(image_BHWC: np.ndarray, prompt: Text, target: Text, question=(None, None), **fields) -> Batch:
    """Rows of the first task, of whose answers every token counts; `fields`: other fields of the batch."""
    row_B = np.arange(len(prompt[0]), dtype=np.int32)
    return Batch(image_BHWC, *prompt, *question, *target, target[1], np.zeros_like(row_B), row_B, **fields)
