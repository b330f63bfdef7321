# SPDX-License-Identifier: Apache-2.0
"""Training rows of a phrase detector such as Grounding DINO: a caption, boxes, and the tokens that name each box.

A caption is a list of names, in phrases that end with a full stop or in one phrase with commas: `red circle. star.`,
`circle, star, red.`
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.boxes import Box
from lionjax.data.region_phrases import detector_caption
from lionjax.data.tokenizer import Tokenizer


def encode_detection(
    tokenizer: Tokenizer,
    caption: str,
    boxes: Sequence[Box],
    names: Sequence[Sequence[str]],
    max_tokens: int,
    max_boxes: int,
) -> dict[str, np.ndarray]:
    """The arrays "question", "question_mask", "boxes", "boxes_mask" and "box_tokens" (K, L) of one example.

    `names`: for each box the names in the caption that it has. The caption is cut at `max_tokens`, and a name that is
    cut off has no token. Raises UserError for a name that the caption lacks, and for more boxes than `max_boxes`.
    """
    if len(boxes) > max_boxes:
        raise UserError(
            f"the caption {caption!r} names {len(boxes)} boxes, but at most {max_boxes} are allowed; "
            "raise processor.max_boxes"
        )
    caption = detector_caption(caption)
    ids, starts = tokenizer.encode_with_offsets(caption)
    spans = {match[0].strip(): match.span() for match in re.finditer(r"[^.,]+", caption)}
    rows = {name: np.zeros(max_tokens, np.int32) for name in ("question", "question_mask")}
    first = len(tokenizer.bos_ids)
    whole = [*tokenizer.bos_ids, *ids, tokenizer.eos_id][:max_tokens]
    rows["question"][:] = tokenizer.pad_id
    rows["question"][: len(whole)], rows["question_mask"][: len(whole)] = whole, 1
    box_K4, token_KL = np.zeros((max_boxes, 4), np.float32), np.zeros((max_boxes, max_tokens), bool)
    start_L = np.array(starts)
    for k, (box, box_names) in enumerate(zip(boxes, names, strict=True)):
        box_K4[k] = box
        for name in box_names:
            if name not in spans:
                raise UserError(f"the caption {caption!r} has no {name!r}; write the names of all boxes into it")
            low, high = spans[name]
            places = first + np.flatnonzero((start_L >= low) & (start_L < high))
            token_KL[k, places[places < max_tokens]] = True
    valid_K = (np.arange(max_boxes) < len(boxes)).astype(np.int32)
    return rows | {"boxes": box_K4, "boxes_mask": valid_K, "box_tokens": token_KL}
