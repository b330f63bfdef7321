# SPDX-License-Identifier: Apache-2.0
"""Evaluation of phrase detectors: the boxes found for a caption, written as text, and how they are scored.

A box counts for a name of the caption if its phrase has all words of the name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lionjax.data import images
from lionjax.data.boxes import Box, box_to_text, split_text_and_boxes
from lionjax.data.scenes.world import HELD_OUT_PAIRS
from lionjax.evaluation.metrics import regions
from lionjax.inference.detector import BOX_THRESHOLD, Detections, Detector
from lionjax.inference.engine import Answer

HELD_OUT_NAMES = frozenset(" ".join(pair) for pair in HELD_OUT_PAIRS)


def detect_answers(
    detector: Detector,
    sources: Sequence[Any],
    captions: Sequence[str],
    blind: bool = False,
    box_threshold: float = BOX_THRESHOLD,
) -> list[Answer]:
    """What is found for each image and caption, as text such as `red star [0.1,...], ring [0.4,...]`.

    Thresholds are those of Grounding DINO's demo; a phrase keeps to one name of the caption. `blind`: with gray images.
    """
    pictures = [images.to_pil_image(source) for source in sources]
    if blind:
        gray = tuple(round(255 * mean) for mean in detector.images.mean)
        pictures = [Image.new("RGB", picture.size, gray) for picture in pictures]
    detections = detector.detect(pictures, captions, box_threshold, remove_combined=True)
    return [_to_answer(found) for found in detections]


def _to_answer(found: Detections) -> Answer:
    box_K4 = np.clip(found.boxes_K4, 0, 1)
    parts = [f"{phrase} {box_to_text(box)}" for phrase, box in zip(found.phrases, box_K4.tolist())]
    return Answer(", ".join(parts) or "nothing", box_K4)


def parse_detections(text: str) -> list[tuple[frozenset[str], Box]]:
    """(words, box) of each box in such a text."""
    found, words = [], frozenset()
    for part in split_text_and_boxes(text):
        if isinstance(part, str):
            words = frozenset(re.findall(r"\w+", part.lower()))
        else:
            found.append((words, part))
    return found


def score_names(example: Any, text: str) -> list[tuple[str, int, int, int]]:
    """(name, true boxes, true boxes found, boxes predicted) for each name of an example's caption.

    A true box is found if a box predicted for its name has an IoU above 0.5 with it.
    """
    predicted, rows = parse_detections(text), []
    for name in dict.fromkeys(part.strip() for part in re.split("[.,]", example.question) if part.strip()):
        true = [box for box, names in zip(example.boxes, example.box_names) if name in names]
        boxes = [box for words, box in predicted if words >= set(name.split())]
        num_found = 0
        if true and boxes:
            num_found = int((regions.iou_matrix(np.array(boxes), np.array(true)) > 0.5).any(axis=0).sum())
        rows.append((name, len(true), num_found, len(boxes)))
    return rows


def detection_rates(rows: Sequence[tuple[str, int, int, int]]) -> dict[str, float]:
    """`found`: share of the true boxes that are found; `silent`: share of the absent names without a box.

    `found_held_out`: of the names that training scenes never hold, if there are any.
    """

    def share(hits: float, total: int) -> float:
        return hits / total if total else 1.0

    absent = [num_boxes for _, num_true, _, num_boxes in rows if not num_true]
    rates = {
        "found": share(sum(row[2] for row in rows), sum(row[1] for row in rows)),
        "silent": share(sum(not num_boxes for num_boxes in absent), len(absent)),
    }
    held_out = [row for row in rows if row[0] in HELD_OUT_NAMES and row[1]]
    if held_out:
        rates["found_held_out"] = share(sum(row[2] for row in held_out), sum(row[1] for row in held_out))
    return rates
