# SPDX-License-Identifier: Apache-2.0
"""The shapes of batches whose rows hold several examples, for a plan."""

from __future__ import annotations

import dataclasses

import numpy as np

from lionjax.core.experiment import Stage
from lionjax.core.types import Batch, RowLayout
from lionjax.data.example_rows import count_row_tokens, pack_batch


def packed_row(batch: Batch, layout: RowLayout, stage: Stage, length_buckets: tuple[int, ...]) -> Batch:
    """One row of zeros with `stage.examples_per_row` examples, as many as `batch` of zeros has.

    It is as long as the longest of `length_buckets` or, without them, as that many examples of full length. Its targets
    have half of it, or all that `batch` can hold if that is less.
    """
    longest = max(length_buckets, default=count_row_tokens(batch, layout)[1])
    lengths = longest, min(batch.target_BM.size, -(-longest // 2))
    first_token = np.zeros_like(batch.prompt_mask_BL)
    first_token[:, 0] = 1
    batch = dataclasses.replace(batch, prompt_mask_BL=first_token)
    return pack_batch(batch, layout, stage.examples_per_row, lambda *_: lengths)
