# SPDX-License-Identifier: Apache-2.0
"""Captions whose phrases have boxes, as GrIT of Kosmos-2 (arXiv 2306.14824), by our detector and tagger.

Grounding DINO finds the phrases of a caption; of an image without captions the tagger's tags are the caption. GrIT
extracts noun chunks by a parser and expands them; here a phrase is what the detector's own text threshold gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from lionjax.data.boxes import Box
from lionjax.data.region_phrases import nms
from lionjax.pipelines.image_contexts import ImageContext
from lionjax.pipelines.instructions.records import Outcome, padded_box_text, to_record

MIN_SCORE, NMS_IOU = 0.5, 0.6
MAX_BOXES_PER_PHRASE = 8
QUESTION = "Describe the image and give the boxes of the things that you name."


class DetectsPhrases(Protocol):
    """`inference.detector.Detector`, as far as it is used here."""

    def detect(self, images: Sequence[object], prompts: Sequence[str] | str) -> list:
        """Detections of the phrases of each prompt."""


class Tags(Protocol):
    """`inference.tagger.Tagger`, as far as it is used here."""

    def tag(self, images: Sequence[object]) -> list:
        """The tags of each image."""


def place_phrases(caption: str, phrases: Sequence[tuple[str, Box]], size: tuple[int, int]) -> str:
    """The caption with boxes behind the phrases that it has, the longer phrase first where two overlap.

    Boxes are fractions of the padded square. A phrase that the caption does not have is left out.
    """
    groups: dict[str, list[Box]] = {}
    for phrase, box in phrases:
        groups.setdefault(phrase.strip().lower(), []).append(box)
    lower, taken, places = caption.lower(), [False] * len(caption), []
    for phrase in sorted(filter(None, groups), key=len, reverse=True):
        start = _find_free(lower, phrase, taken)
        if start is not None:
            end = start + len(phrase)
            taken[start:end] = [True] * len(phrase)
            places.append((end, groups[phrase][:MAX_BOXES_PER_PHRASE]))
    for end, boxes in sorted(places, reverse=True, key=lambda place: place[0]):
        caption = caption[:end] + "".join(padded_box_text(box, size) for box in boxes) + caption[end:]
    return caption


def _find_free(text: str, phrase: str, taken: Sequence[bool]) -> int | None:
    """Where whole words of a phrase stand outside of what is taken."""
    start = text.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        is_whole = not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())
        if is_whole and not any(taken[start:end]):
            return start
        start = text.find(phrase, start + 1)
    return None


def ground_caption(
    context: ImageContext,
    image: Image.Image,
    detector: DetectsPhrases,
    tagger: Tags | None,
    min_score: float = MIN_SCORE,
) -> Outcome:
    """The grounded caption of an image, or why there is none: no caption or tag, or no phrase with a good box."""
    caption = context.captions[0] if context.captions and context.captions[0] else ""
    if not caption and tagger is not None:
        caption = ", ".join(tagger.tag([image])[0].tags)
    if not caption:
        return Outcome(context.id, reason="no caption and no tag")
    (found,) = detector.detect([image], caption)
    good = [k for k, score in enumerate(found.scores) if score >= min_score]
    scores_K = np.array([found.scores[k] for k in good], np.float32)
    kept = [good[k] for k in nms(found.boxes_K4[good], scores_K, NMS_IOU)] if good else []
    phrases = [(found.phrases[k], tuple(map(float, found.boxes_K4[k].clip(0, 1)))) for k in kept]
    phrases = [(phrase, box) for phrase, box in phrases if box[0] < box[2] and box[1] < box[3]]
    text = place_phrases(caption, phrases, image.size)
    if text == caption:
        return Outcome(context.id, reason="no phrase has a box", reply=caption)
    return Outcome(context.id, to_record(context.id, context.image, [(QUESTION, text)]))
