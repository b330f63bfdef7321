# SPDX-License-Identifier: Apache-2.0
"""Scorers of boxes, masks and grounded phrases, and of answers that a judge or people rated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.segmentations import segmentation_to_mask
from lionjax.data.letterbox import Letterbox
from lionjax.data.rle import decode_rle
from lionjax.evaluation.metrics import judged, regions
from lionjax.evaluation.metrics.box_reading import BOX_READERS
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published.open_answers import Rows, caption_figures, percent
from lionjax.evaluation.published.predictions import AnsweredQuestion

ENTITY_KS = (1, 5, 10, -1)  # -1: all boxes of a phrase
MORE_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
MASK_KEYS = ("mask", "segmentation", "rle", "masks")


def score_rec(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """REC accuracy in percent under one protocol, with the IoU of each answer and the number without a box.

    Boxes are fractions of the image, or with `protocol.padded` of the image padded to a square, in which the IoU is
    then taken and equals that in pixels. A box without area and one with reversed corners has an IoU of 0.
    """
    read, boxes, truth = BOX_READERS[protocol.reader], [], []
    for row in rows:
        width, height = row.image.width, row.image.height
        true_box = tuple(np.array(row.annotation.boxes[0]) / (width, height, width, height))
        truth.append(Letterbox(int(width), int(height)).to_padded(true_box) if protocol.padded else true_box)
        boxes.append(read(row.text))
    iou_B = regions.rec_ious(boxes, np.array(truth))
    name = f"{protocol.name}_{protocol.reader}_{'gt' if protocol.threshold.startswith('> ') else 'ge'}_0.5"
    figures = {"accuracy": percent(_hits(iou_B, protocol)), "ious": iou_B.tolist(), "unreadable": boxes.count(None)}
    figures |= {f"accuracy_{t}": percent(iou_B >= t) for t in MORE_THRESHOLDS}
    return {name: figures | {"center": percent(map(_center_inside, boxes, truth))}}


def _hits(iou_B: np.ndarray, protocol: Protocol) -> np.ndarray:
    sign, value = protocol.threshold.split()
    return iou_B > float(value) if sign == ">" else iou_B >= float(value)


def _center_inside(box: regions.Box | None, true_box: np.ndarray) -> bool:
    if box is None:
        return False
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return bool(true_box[0] <= x <= true_box[2] and true_box[1] <= y <= true_box[3])


def read_mask(row: AnsweredQuestion, size: tuple[int, int]) -> np.ndarray:
    """bool (height, width): the mask of an answer, empty without one; `size` is (height, width).

    A mask is COCO's run lengths, polygons, or the path of an image whose pixels above 0 belong to it. Of several masks
    none counts, as in NExT-Chat. Raises UserError for another size or form.
    """
    given, name = row.prediction, row.image.name
    if isinstance(given, dict):
        key = next((key for key in MASK_KEYS if key in given), None)
        given = given if key is None else given[key]
        if key == "masks":
            given = given[0] if isinstance(given, list) and len(given) == 1 else None
    if given is None:
        return np.zeros(size, bool)
    if isinstance(given, str):
        try:
            with Image.open(Path(given)) as image:
                mask_HW = np.asarray(image.convert("L")) > 0
        except (OSError, ValueError) as error:
            raise UserError(f"the mask {given} of {name} cannot be read ({error}); give a PNG") from error
        if mask_HW.shape != size:
            raise UserError(
                f"the mask {given} is {mask_HW.shape[1]} x {mask_HW.shape[0]}, not of {name}'s size; resize it"
            )
        return mask_HW
    return segmentation_to_mask(given, size, name, allow_empty=True)


def score_masks(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """cIoU and gIoU in percent, and pixels: of targets, ignored ones (left out on both sides), intersections, unions.

    `iou` is the sum of intersections over the sum of unions, 0..1.
    """
    counts, ignored, per_question = [], 0, {}
    for row in rows:
        size = int(row.image.height), int(row.image.width)
        true_HW, mask_HW = segmentation_to_mask(row.segmentation, size, row.image.name), read_mask(row, size)
        ignore = row.annotation.facts.get("ignore")
        counted_HW = ~decode_rle(ignore) if ignore else np.ones(size, bool)
        (pair,) = regions.mask_overlaps([mask_HW & counted_HW], [true_HW & counted_HW]).tolist()
        counts.append([*pair, int((true_HW & counted_HW).sum())])
        ignored += int((~counted_HW).sum())
        iou = pair[0] / pair[1] if pair[1] else 1.0
        per_question[row.annotation.question_id or str(len(counts))] = iou
    overlaps_B2 = np.array(counts)[:, :2]
    intersection, union, target = np.array(counts).sum(axis=0).tolist()
    figures = {"target_pixels": target, "ignored_pixels": ignored, "intersection": intersection, "union": union}
    figures |= {"iou": regions.ciou(overlaps_B2), "ciou": 100 * regions.ciou(overlaps_B2)}
    figures |= {"giou": percent(per_question.values()), "perQuestion": per_question}
    for kind in ("long", "short"):
        if chosen := [k for k, row in enumerate(rows) if row.annotation.kind == kind]:
            values = list(per_question.values())
            figures[kind] = {
                "giou": percent(values[k] for k in chosen),
                "ciou": 100 * regions.ciou(overlaps_B2[chosen]),
            }
    is_sentence = all(row.annotation.kind == "long" for row in rows)
    return figures | {"sentence": [row.annotation.words for row in rows], "is_sentence": is_sentence}


def score_entities(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """Recall (0..1) of the phrases of Flickr30k Entities at 1, 5, 10 and all boxes: any-box and merged, by type.

    An answer has `boxes`: for each phrase with boxes, in order, a list of boxes in pixels, the best first. Raises
    UserError for another number of phrases.
    """
    hits: dict[str, dict[str, dict[str, list[bool]]]] = {"any": {}, "merged": {}}
    for row in rows:
        phrases, groups = row.annotation.facts["phrases"], _phrase_boxes(row)
        for phrase, boxes in zip(phrases, groups):
            true_K4 = np.array(phrase["boxes"], float)
            merged_14 = np.array([[*true_K4[:, :2].min(axis=0), *true_K4[:, 2:].max(axis=0)]])
            for name, truth in (("any", true_K4), ("merged", merged_14)):
                found = (regions.iou_matrix(boxes, truth) >= 0.5).any(axis=1) if len(boxes) else np.zeros(0, bool)
                for k in ENTITY_KS:
                    is_hit = bool(found.any() if k < 0 else found[:k].any())
                    for kind in ("all", *phrase["types"]):
                        hits[name].setdefault(str(k), {}).setdefault(kind, []).append(is_hit)
    return {
        name: {k: {kind: float(np.mean(values)) for kind, values in kinds.items()} for k, kinds in by_k.items()}
        for name, by_k in hits.items()
    }


def _phrase_boxes(row: AnsweredQuestion) -> list[list]:
    given = row.prediction.get("boxes") if isinstance(row.prediction, dict) else row.prediction
    wanted, number = len(row.annotation.facts["phrases"]), row.annotation.question_id
    if not isinstance(given, list) or len(given) != wanted:
        found = len(given) if isinstance(given, list) else "no"
        raise UserError(f"sentence {number} has {found} lists of boxes for {wanted} phrases; give one for each")
    return [list(typed_rows.boxes({"boxes": group}, "boxes", f"sentence {number}")) for group in given]


def score_reg(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """Captions of regions against all expressions of each one, or against the first ("one reference", NExT-Chat)."""
    if protocol.aggregation == "one reference":
        annotations = (row.annotation for row in rows)
        rows = [
            row._replace(annotation=replace(annotation, answers=annotation.answers[:1]))
            for row, annotation in zip(rows, annotations)
        ]
    return caption_figures(rows)


def score_llava_bench(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """LLaVA-Bench from a judge's replies, one a question: score pairs, LLaVA's table lines, and unreadable replies.

    The protocol "readable" leaves unreadable replies out of the means, where LLaVA counts them as -1. `judge`: the name
    that the replies have; raises UserError for replies of several judges, whose scores do not compare.
    """
    given = [row.prediction for row in rows]
    judges = sorted({str(item.get("judge", "")) if isinstance(item, dict) else "" for item in given})
    if len(judges) > 1:
        raise UserError(f"the replies are of {len(judges)} judges, {', '.join(judges)}; score those of one at a time")
    stated = [item.get("tuple") if isinstance(item, dict) else None for item in given]
    pairs = [pair or judged.parse_judge_scores(row.text) for pair, row in zip(stated, rows)]
    unreadable = [list(pair) == judged.UNREADABLE for pair in pairs]
    kept = [k for k, is_bad in enumerate(unreadable) if not (is_bad and protocol.aggregation == "readable replies")]
    if not kept:
        raise UserError("no reply of the judge has two scores in its first line; ask the judge again")
    categories = [f"llava_bench_{row.annotation.kind}" for row in rows]
    table = judged.judge_table([pairs[k] for k in kept], [categories[k] for k in kept])
    return {
        "tuples": pairs,
        "printed": judged.judge_lines(table),
        "table": table,
        "unreadable": sum(unreadable),
        "judge": judges[0] or "not named",
    }


def score_owl_eval(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """OwlEval: how many answers people rated A or B, of all and by ability; an answer has `rating`, A to D."""
    ratings = []
    for row in rows:
        rating = row.prediction.get("rating") if isinstance(row.prediction, dict) else row.prediction
        if rating not in ("A", "B", "C", "D"):
            raise UserError(f"question {row.annotation.question_id} has the rating {rating!r}; give A, B, C or D")
        ratings.append(rating)
    return judged.rating_counts(ratings, [row.annotation.facts["abilities"] for row in rows])
