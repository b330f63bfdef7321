# SPDX-License-Identifier: Apache-2.0
"""Metrics of boxes, masks, tags and rankings, and bootstrap confidence intervals.

All metrics are fractions in 0..1. A metric that is a mean over samples returns one value per sample: its mean is the
score, and `bootstrap_interval` takes the values. An answer that cannot be parsed is None and counts as wrong. Caption
metrics are in captions.py, those of short answers in vqa.py. Shape letters: B samples, K and J boxes, V tags,
S candidates, H and W pixels.
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
RESAMPLED_TOGETHER = 2**20  # values of bootstrap samples that are in memory at once


def iou(boxes_B4: np.ndarray, others_B4: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of boxes, array (B,) in 0..1.

    Boxes are x0, y0, x1, y1, all in one unit. A box without area (or with swapped corners) has IoU 0 with every box.
    Raises ValueError if the shapes differ or are not (B, 4).
    """
    boxes_B4, others_B4 = as_boxes(boxes_B4), as_boxes(others_B4)
    if boxes_B4.shape != others_B4.shape:
        raise ValueError(f"{len(boxes_B4)} boxes against {len(others_B4)}; give one per sample, or use iou_matrix")
    return broadcast_iou(boxes_B4, others_B4)


def iou_matrix(boxes_K4: np.ndarray, others_J4: np.ndarray) -> np.ndarray:
    """Intersection over union of every box with every other box, array (K, J) in 0..1; see `iou`."""
    return broadcast_iou(as_boxes(boxes_K4)[:, None], as_boxes(others_J4)[None])


def broadcast_iou(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """IoU of boxes on the last axis (4); the other axes broadcast."""
    low = np.maximum(left[..., :2], right[..., :2])
    high = np.minimum(left[..., 2:], right[..., 2:])
    intersection = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = box_area(left) + box_area(right) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Areas of boxes (..., 4), shape (...); 0 for swapped corners."""
    return np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None), axis=-1)


def as_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes as a float64 array (count, 4), possibly empty. Raises ValueError for another shape."""
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes have shape {array.shape}; give (count, 4) as x0, y0, x1, y1")
    return array


def parse_box(text: str, strict: bool = False) -> Box | None:
    """The first box in an answer as x0, y0, x1, y1 in 0..1, or None if there is no box.

    Strict mode accepts only the format that LION and Shikra are trained on, `[0.440,0.060,0.650,0.367]`: no spaces, one
    digit before the point, in range, corners in order, and no second box, as Shikra refuses both. Lenient mode also
    accepts spaces, semicolons, other or no brackets, and signs; it sorts the corners and clips them to the image.
    Neither guesses a unit: a number above 2 means pixels or percent, and the result is None.
    """
    match = (STRICT_BOX if strict else LENIENT_BOX).search(text)
    if match is None or (strict and STRICT_BOX.search(text, match.end())):
        return None
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    if strict:
        return (x0, y0, x1, y1) if x0 < x1 <= 1 and y0 < y1 <= 1 else None
    if max(map(abs, (x0, y0, x1, y1))) > 2:
        return None
    x0, x1 = np.clip(sorted((x0, x1)), 0, 1).tolist()
    y0, y1 = np.clip(sorted((y0, y1)), 0, 1).tolist()
    return x0, y0, x1, y1


def rec_ious(boxes: Sequence[Box | None], truth_B4: np.ndarray) -> np.ndarray:
    """IoU of each predicted box with the true one, array (B,) in 0..1; 0 for a prediction of None."""
    if len(boxes) != len(truth_B4):
        raise ValueError(f"{len(boxes)} boxes for {len(truth_B4)} expressions; give one each")
    return iou(np.array([box or (0.0,) * 4 for box in boxes]), truth_B4)


def rec_scores(boxes: Sequence[Box | None], truth_B4: np.ndarray) -> dict[str, float]:
    """Acc@0.5, mean IoU and the fraction of answers without a box, each 0..1.

    A hit is IoU > 0.5, as in the code of Shikra and NExT-Chat (others use >= 0.5; the two differ only for an IoU of
    exactly 0.5). LION's evaluation code is not public.
    """
    values = rec_ious(boxes, truth_B4)
    return {
        "accuracy_50": float(np.mean(values > 0.5)),
        "mean_iou": float(np.mean(values)),
        "unparsable": sum(box is None for box in boxes) / len(boxes),
    }


def phrase_hits(boxes: Sequence[Box | None], truth: Sequence[np.ndarray], merged: bool = False) -> np.ndarray:
    """Whether each phrase's first box is a hit, bool array (B,); the mean is recall@1.

    A phrase may have several true regions: `truth[i]` is (K, 4). A hit is IoU >= 0.5 with any of them, or with
    `merged` with the box around all of them: the any-box and merged-boxes protocols of Flickr30k Entities in MDETR
    (Kamath et al. 2021, arXiv 2104.12763).
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


def mask_overlaps(masks: Sequence[Mask], truth: Sequence[Mask]) -> np.ndarray:
    """Intersection and union in pixels of each pair of masks, int64 array (B, 2).

    A mask is a bool array (H, W) or COCO's RLE, `{"size": [H, W], "counts": ...}`; a prediction of None is an empty
    mask. Raises ValueError if the sizes of a pair differ.
    """
    if len(masks) != len(truth):
        raise ValueError(f"{len(masks)} masks for {len(truth)} expressions; give one each")
    counts = []
    for i, (mask, true) in enumerate(zip(masks, truth, strict=True)):
        true_HW = as_mask(true)
        mask_HW = np.zeros_like(true_HW) if mask is None else as_mask(mask)
        if mask_HW.shape != true_HW.shape:
            raise ValueError(
                f"mask {i} is {mask_HW.shape} but its truth is {true_HW.shape}; resize it to the original image's size"
            )
        counts.append((np.sum(mask_HW & true_HW), np.sum(mask_HW | true_HW)))
    return np.array(counts, dtype=np.int64).reshape(-1, 2)


def as_mask(mask: Mask) -> np.ndarray:
    """A bool array (H, W) from a bool array or COCO's RLE, compressed or not. Raises ValueError for anything else."""
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
    """Cumulative IoU: sum of intersections over sum of unions, 0..1, so that large objects weigh more.

    1 if all masks are empty on both sides. Takes the rows of `mask_overlaps`, also resampled ones.
    """
    intersection, union = np.asarray(overlaps_B2).sum(axis=0)
    return float(intersection / union) if union else 1.0


def res_scores(masks: Sequence[Mask], truth: Sequence[Mask]) -> dict[str, float]:
    """cIoU (see `ciou`) and gIoU, the mean IoU of the masks, each 0..1; both metrics as in LISA (arXiv 2308.00692).

    The IoU is 1 if prediction and truth are both empty.
    """
    overlaps_B2 = mask_overlaps(masks, truth)
    intersection_B, union_B = overlaps_B2.T
    iou_B = np.where(union_B == 0, 1.0, intersection_B / np.maximum(union_B, 1))
    return {"ciou": ciou(overlaps_B2), "giou": float(iou_B.mean())}


def tag_scores(tags: Sequence[Iterable[str]], truth: Sequence[Iterable[str]]) -> dict[str, float]:
    """Micro precision, recall and F1 over all tags, and macro F1 (mean of each tag's F1), each 0..1.

    Macro F1 averages over the tags that occur in predictions or truth. All are 1 if there are no predicted and no true
    tags at all.
    """
    if len(tags) != len(truth):
        raise ValueError(f"there are tags for {len(tags)} images, truth for {len(truth)}; give one each")
    predicted_counts = Counter(tag for names in tags for tag in set(names))
    true_counts = Counter(tag for names in truth for tag in set(names))
    pairs = zip(tags, truth, strict=True)
    hits = Counter(tag for predicted, true in pairs for tag in set(predicted) & set(true))
    if not predicted_counts and not true_counts:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0, "macro_f1": 1.0}
    f1_per_tag = [2 * hits[tag] / (predicted_counts[tag] + true_counts[tag]) for tag in predicted_counts | true_counts]
    return {
        "precision": hits.total() / predicted_counts.total() if predicted_counts else 0.0,
        "recall": hits.total() / true_counts.total() if true_counts else 0.0,
        "f1": 2 * hits.total() / (predicted_counts.total() + true_counts.total()),
        "macro_f1": sum(f1_per_tag) / len(f1_per_tag),
    }


def average_precision(scores_B: np.ndarray, truth_B: np.ndarray) -> float:
    """Average precision of one tag over the images, 0..1: area under the precision-recall curve, no interpolation.

    Equal scores enter together, so their order does not matter. NaN if no image has the tag.
    """
    scores_B, truth_B = np.asarray(scores_B, dtype=np.float64), np.asarray(truth_B, dtype=bool)
    if not truth_B.any():
        return float("nan")
    order_B = np.argsort(-scores_B, kind="stable")
    hits_B = np.cumsum(truth_B[order_B])
    last = np.append(np.flatnonzero(np.diff(scores_B[order_B])), len(scores_B) - 1)
    recall_gain = np.diff(hits_B[last], prepend=0) / hits_B[-1]
    return float(np.sum(recall_gain * hits_B[last] / (last + 1)))


def mean_average_precision(scores_BV: np.ndarray, truth_BV: np.ndarray) -> float:
    """Mean of `average_precision` over the tags that at least one image has, 0..1.

    Raises ValueError if the shapes differ or no image has a true tag.
    """
    scores_BV, truth_BV = np.asarray(scores_BV), np.asarray(truth_BV, dtype=bool)
    if scores_BV.shape != truth_BV.shape or scores_BV.ndim != 2:
        raise ValueError(f"scores are {scores_BV.shape}, truth {truth_BV.shape}; give both as (images, tags)")
    present = np.flatnonzero(truth_BV.any(axis=0))
    if not len(present):
        raise ValueError("no image has a true tag; give at least one")
    return float(np.mean([average_precision(scores_BV[:, v], truth_BV[:, v]) for v in present]))


def reciprocal_ranks(scores_BS: np.ndarray, answers_B: np.ndarray) -> np.ndarray:
    """1 / rank of the correct candidate, array (B,) in 0..1; the mean is VisDial's MRR.

    `scores_BS` has one score per candidate, higher is better; `answers_B` is the correct candidate's index. Candidates
    with equal scores rank before the correct one, so that a constant scorer gains nothing.
    Source: Visual Dialog (Das et al. 2017, arXiv 1611.08669), section 5, with S = 100 candidates.
    """
    scores_BS = np.asarray(scores_BS, dtype=np.float64)
    correct_B1 = np.take_along_axis(scores_BS, np.asarray(answers_B)[:, None], axis=1)
    return 1 / np.sum(~(scores_BS < correct_B1), axis=1)  # negated < so that NaN ranks last


def bootstrap_interval(
    values: np.ndarray,
    seed: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
) -> tuple[float, float]:
    """(low, high) of the percentile bootstrap interval of a statistic over samples.

    `values` has one row per sample; the rows are resampled with replacement `num_resamples` times. For a ratio of sums,
    pass its rows and the ratio: `bootstrap_interval(mask_overlaps(...), 0, ciou)`. Raises ValueError if `values` is
    empty.
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("values is empty; give at least one sample")
    rng, statistics = np.random.default_rng(seed), []
    num_together = max(1, RESAMPLED_TOGETHER // len(values))
    for start in range(0, num_resamples, num_together):
        index_RB = rng.integers(len(values), size=(min(num_together, num_resamples - start), len(values)))
        if statistic is np.mean and values.ndim == 1:
            statistics += values[index_RB].mean(axis=1).tolist()
        else:
            statistics += [statistic(values[index_B]) for index_B in index_RB]
    low, high = np.quantile(statistics, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return float(low), float(high)
