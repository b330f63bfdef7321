# SPDX-License-Identifier: Apache-2.0
"""Scores of boxes, masks, tags and rankings, and the interval to print beside any of them.

Everything is a fraction in 0..1. A metric that is a mean over samples gives one value a sample;
take its mean for the score and hand the values to `interval`. An answer that could not be read
is None and counts as wrong, never as absent. Captions are in captions.py, short answers in
answers.py. B samples, K and J boxes, V tags, S candidates, H and W pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Box = tuple[float, float, float, float]
Mask = np.ndarray | Mapping[str, object] | None

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
STRICT_BOX = re.compile(r"\[" + ",".join([r"(\d(?:\.\d+)?)"] * 4) + r"\]")
LENIENT_BOX = re.compile(r"(?<![\w.])" + r"[\s,;]+".join([f"({NUMBER})"] * 4))


# ------------------------------------------------------------------------------------------ boxes


def iou(boxes_B4: np.ndarray, others_B4: np.ndarray) -> np.ndarray:
    """Intersection over union of box i with box i, array (B,) in 0..1.

    Boxes are x0, y0, x1, y1 in any one unit. A box without area (or with its corners swapped)
    overlaps nothing, itself included. ValueError if the shapes differ or are not (B, 4).
    """
    boxes_B4, others_B4 = as_boxes(boxes_B4), as_boxes(others_B4)
    if boxes_B4.shape != others_B4.shape:
        raise ValueError(f"{len(boxes_B4)} boxes against {len(others_B4)}; give one a sample, or use iou_matrix")
    return broadcast_iou(boxes_B4, others_B4)


def iou_matrix(boxes_K4: np.ndarray, others_J4: np.ndarray) -> np.ndarray:
    """Intersection over union of every box with every other, array (K, J); see `iou`."""
    return broadcast_iou(as_boxes(boxes_K4)[:, None], as_boxes(others_J4)[None])


def broadcast_iou(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """IoU over the last axis; the rest broadcasts."""
    low = np.maximum(left[..., :2], right[..., :2])
    high = np.minimum(left[..., 2:], right[..., 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = box_area(left) + box_area(right) - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=shared > 0)


def box_area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None), axis=-1)


def as_boxes(boxes: np.ndarray) -> np.ndarray:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes have shape {array.shape}; give (count, 4) as x0, y0, x1, y1")
    return array


def parse_box(text: str, strict: bool = False) -> Box | None:
    """The first box in an answer as x0, y0, x1, y1 in 0..1, or None if there is none.

    Strict reads only what LION and Shikra were taught to write, `[0.440,0.060,0.650,0.367]`: no
    spaces, one digit before the point, in range, corners in order. Lenient also takes spaces,
    semicolons, other or no brackets and signs; it sorts the corners and clips to the picture.
    Neither guesses a unit: a number beyond 2 means pixels or per cent, and the answer is None.
    """
    found = (STRICT_BOX if strict else LENIENT_BOX).search(text)
    if found is None:
        return None
    x0, y0, x1, y1 = (float(number) for number in found.groups())
    if strict:
        return (x0, y0, x1, y1) if x0 < x1 <= 1 and y0 < y1 <= 1 else None
    if max(map(abs, (x0, y0, x1, y1))) > 2:
        return None
    x0, x1 = np.clip(sorted((x0, x1)), 0, 1).tolist()
    y0, y1 = np.clip(sorted((y0, y1)), 0, 1).tolist()
    return x0, y0, x1, y1


def rec_ious(boxes: Sequence[Box | None], truth_B4: np.ndarray) -> np.ndarray:
    """IoU of each predicted box with the true one, array (B,) in 0..1; None is 0."""
    if len(boxes) != len(truth_B4):
        raise ValueError(f"{len(boxes)} boxes for {len(truth_B4)} expressions; give one each")
    return iou(np.array([box or (0.0,) * 4 for box in boxes]), truth_B4)


def rec_scores(boxes: Sequence[Box | None], truth_B4: np.ndarray) -> dict[str, float]:
    """Acc@0.5, mean IoU and the share of answers without a box, each 0..1.

    A hit is IoU > 0.5, as Shikra and NExT-Chat test it (others write >= 0.5; the two differ only
    where the overlap is exactly a half). LION's evaluation code is not public.
    """
    values = rec_ious(boxes, truth_B4)
    return {
        "accuracy_50": float(np.mean(values > 0.5)),
        "mean_iou": float(np.mean(values)),
        "unparsable": sum(box is None for box in boxes) / len(boxes),
    }


def phrase_hits(boxes: Sequence[Box | None], truth: Sequence[np.ndarray], merged: bool = False) -> np.ndarray:
    """Whether each phrase's first box finds it, bool array (B,); the mean is recall@1.

    A phrase may name several regions, `truth[i]` being (K, 4). A hit is IoU >= 0.5 with any of
    them, or (merged) with the one box around them all: the two protocols of Flickr30k Entities
    told apart by Kamath et al. 2021 (MDETR).
    """
    if len(boxes) != len(truth):
        raise ValueError(f"{len(boxes)} boxes for {len(truth)} phrases; give one each")
    hits = []
    for box, regions in zip(boxes, truth, strict=True):
        regions_K4 = as_boxes(regions)
        if merged and len(regions_K4):
            corners = [*regions_K4[:, :2].min(axis=0), *regions_K4[:, 2:].max(axis=0)]
            regions_K4 = np.array([corners])
        hits.append(box is not None and bool((iou_matrix([box], regions_K4) >= 0.5).any()))
    return np.array(hits, dtype=bool)


# ------------------------------------------------------------------------------------------ masks


def mask_overlaps(masks: Sequence[Mask], truth: Sequence[Mask]) -> np.ndarray:
    """Intersection and union in pixels of each pair of masks, array (B, 2).

    A mask is a bool array (H, W) or COCO's RLE, `{"size": [H, W], "counts": ...}`; None (no mask
    was given) is an empty one. ValueError if a pair differs in size.
    """
    if len(masks) != len(truth):
        raise ValueError(f"{len(masks)} masks for {len(truth)} expressions; give one each")
    counts = []
    for i, (mask, true) in enumerate(zip(masks, truth, strict=True)):
        true_HW = as_mask(true)
        mask_HW = np.zeros_like(true_HW) if mask is None else as_mask(mask)
        if mask_HW.shape != true_HW.shape:
            raise ValueError(
                f"mask {i} is {mask_HW.shape} but its truth is {true_HW.shape}; resize it to the original picture"
            )
        counts.append((np.sum(mask_HW & true_HW), np.sum(mask_HW | true_HW)))
    return np.array(counts, dtype=np.int64).reshape(-1, 2)


def as_mask(mask: Mask) -> np.ndarray:
    """A bool array (H, W) from a bool array or COCO's RLE, compressed or not."""
    if isinstance(mask, Mapping):
        from pycocotools import mask as coco

        rle = dict(mask)
        if isinstance(rle["counts"], list):
            rle = coco.frPyObjects(rle, *rle["size"])
        return coco.decode(rle).astype(bool)
    array = np.asarray(mask)
    if array.dtype != bool or array.ndim != 2:
        raise ValueError(f"mask is {array.dtype} of shape {array.shape}; give a bool array (H, W) or an RLE")
    return array


def ciou(overlaps_B2: np.ndarray) -> float:
    """All intersections over all unions, 0..1: large objects weigh more.

    1 if both sides are empty throughout. Takes what `mask_overlaps` gives, also resampled.
    """
    shared, union = np.asarray(overlaps_B2).sum(axis=0)
    return float(shared / union) if union else 1.0


def res_scores(masks: Sequence[Mask], truth: Sequence[Mask]) -> dict[str, float]:
    """cIoU (see `ciou`) and gIoU, the mean IoU of the masks, each 0..1.

    Where prediction and truth are both empty the IoU is 1, as in LISA (Lai et al. 2024), which
    named the two.
    """
    overlaps_B2 = mask_overlaps(masks, truth)
    shared_B, union_B = overlaps_B2.T
    iou_B = np.where(union_B == 0, 1.0, shared_B / np.maximum(union_B, 1))
    return {"ciou": ciou(overlaps_B2), "giou": float(iou_B.mean())}


# ----------------------------------------------------------------------------- tags and rankings


def tag_scores(tags: Sequence[Iterable[str]], truth: Sequence[Iterable[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all tags (micro), and the mean of each tag's F1 (macro).

    Each 0..1. Macro runs over the tags that occur on either side. Nothing said where nothing was
    to be said counts as 1 when that holds for every sample.
    """
    if len(tags) != len(truth):
        raise ValueError(f"tags for {len(tags)} pictures, truth for {len(truth)}; give one each")
    said = Counter(tag for names in tags for tag in set(names))
    true = Counter(tag for names in truth for tag in set(names))
    pairs = zip(tags, truth, strict=True)
    hits = Counter(tag for mine, theirs in pairs for tag in set(mine) & set(theirs))
    if not said and not true:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0, "macro_f1": 1.0}
    each = [2 * hits[tag] / (said[tag] + true[tag]) for tag in said | true]
    return {
        "precision": hits.total() / said.total() if said else 0.0,
        "recall": hits.total() / true.total() if true else 0.0,
        "f1": 2 * hits.total() / (said.total() + true.total()),
        "macro_f1": sum(each) / len(each),
    }


def average_precision(scores_B: np.ndarray, truth_B: np.ndarray) -> float:
    """Area under precision against recall of one tag over the pictures, 0..1, no interpolation.

    Equal scores enter together, so their order does not matter. NaN if nothing is true.
    """
    scores_B, truth_B = np.asarray(scores_B, dtype=np.float64), np.asarray(truth_B, dtype=bool)
    if not truth_B.any():
        return float("nan")
    order_B = np.argsort(-scores_B, kind="stable")
    hits_B = np.cumsum(truth_B[order_B])
    last = np.append(np.flatnonzero(np.diff(scores_B[order_B])), len(scores_B) - 1)
    gained = np.diff(hits_B[last], prepend=0) / hits_B[-1]
    return float(np.sum(gained * hits_B[last] / (last + 1)))


def mean_average_precision(scores_BV: np.ndarray, truth_BV: np.ndarray) -> float:
    """Mean over tags of `average_precision`, 0..1; tags that are nowhere true are left out."""
    scores_BV, truth_BV = np.asarray(scores_BV), np.asarray(truth_BV, dtype=bool)
    if scores_BV.shape != truth_BV.shape or scores_BV.ndim != 2:
        raise ValueError(f"scores are {scores_BV.shape}, truth {truth_BV.shape}; give both as (pictures, tags)")
    present = np.flatnonzero(truth_BV.any(axis=0))
    if not len(present):
        raise ValueError("no tag is true in any picture; give a set with at least one")
    return float(np.mean([average_precision(scores_BV[:, v], truth_BV[:, v]) for v in present]))


def reciprocal_ranks(scores_BS: np.ndarray, answers_B: np.ndarray) -> np.ndarray:
    """1 / rank of the right candidate, array (B,) in 0..1; the mean is VisDial's MRR.

    `scores_BS` holds one score a candidate, higher is better; `answers_B` the right one's index.
    Equal scores rank before the right one, so that a constant scorer gains nothing.
    Source: Das et al. 2017 (Visual Dialog), section 5, with S = 100 candidates.
    """
    scores_BS = np.asarray(scores_BS, dtype=np.float64)
    right_B1 = np.take_along_axis(scores_BS, np.asarray(answers_B)[:, None], axis=1)
    return 1 / np.sum(~(scores_BS < right_B1), axis=1)  # so that NaN ranks last


# --------------------------------------------------------------------------------------- interval


def bootstrap_interval(
    values: np.ndarray,
    seed: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over samples, as low and high.

    `values` has one row a sample; rows are drawn with replacement `rounds` times. For a ratio of
    sums pass its rows and itself: `interval(mask_overlaps(...), 0, ciou)`. ValueError if empty.
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("no values to draw from; give at least one sample")
    random = np.random.default_rng(seed)
    draws = [statistic(values[random.integers(len(values), size=len(values))]) for _ in range(num_resamples)]
    low, high = np.quantile(draws, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return float(low), float(high)
