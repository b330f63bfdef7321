# SPDX-License-Identifier: Apache-2.0
"""Figures of the experts alone: SAM's masks in true boxes, and RAM's tags of OpenImages-common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.boxes import box_around
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.segmentations import segmentation_to_mask
from lionjax.evaluation.metrics import regions

BATCH_SIZE = 16  # images that are tagged at once


def box_prompt_scores(segmenter: Any, dataset: AnnotatedImages, limit: int | None = None) -> dict[str, Any]:
    """`miou` and `ciou` in percent of the masks that SAM gives for the tight boxes of true masks.

    Each object is asked once, however many expressions name it. `missing` counts objects without their picture.
    Raises UserError if there is no object with a mask and a picture.
    """
    objects = {row.regions[0]: row for row in dataset.annotations.get("res", ()) if row.regions and not row.problem}
    predicted, truth, missing = [], [], 0
    for region, row in list(objects.items())[:limit]:
        try:
            image, info = dataset.load_record(row.photo)
        except UserError:
            missing += 1
            continue
        true_HW = segmentation_to_mask(dataset.segmentations[region], (image.height, image.width), info.name)
        if not true_HW.any():
            missing += 1
            continue
        predicted.append(segmenter.masks(image, [box_around(true_HW)])[0])
        truth.append(true_HW)
    if not truth:
        raise UserError("no object has a mask and its picture; give the pictures' folder with --images")
    overlaps_B2 = np.array(regions.mask_overlaps(predicted, truth))
    return {
        "miou": 100 * float(np.mean(overlaps_B2[:, 0] / overlaps_B2[:, 1])),
        "ciou": 100 * regions.ciou(overlaps_B2),
        "objects": len(truth),
        "missing": missing,
    }


def find_tag_sets(root: Path) -> list[Path]:
    """The folders under `root` with NAME_ram_taglist.txt and NAME_ram_annots.txt, as RAM's code has them."""
    lists = sorted(root.rglob("*_ram_taglist.txt"))
    return [path.parent for path in lists if _annotation_file(path).is_file()]


def _annotation_file(tag_list: Path) -> Path:
    return tag_list.with_name(tag_list.name.replace("_taglist", "_annots"))


def tagging_scores(tagger: Any, folder: Path, image_dir: str = "", limit: int | None = None) -> dict[str, Any]:
    """`map` in percent of a tagger on a set of RAM's code: the mean over its tags of the average precision.

    A line of annotations is IMAGE,TAG,TAG,... without the suffix .jpg; the images are in `imgs`. Tags that no image has
    are left out. Raises UserError for a tag that the tagger does not know, and if no image is there.
    """
    (tag_list,) = folder.glob("*_ram_taglist.txt")
    names = [line.strip() for line in tag_list.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = {name: index for index, name in enumerate(tagger.vocabulary.names)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{tag_list} has the tag {unknown[0]!r}, which the tagger does not know; use RAM's own list")
    lines = _annotation_file(tag_list).read_text(encoding="utf-8").splitlines()
    rows = [line.strip().split(",") for line in lines if line.strip()][:limit]
    place = Path(image_dir) if image_dir else folder / "imgs"
    files = [place / f"{row[0]}.jpg" for row in rows]
    present = [k for k, file in enumerate(files) if file.is_file()]
    if not present:
        raise UserError(f"none of the {len(files)} images of {tag_list} is in {place}; give their folder with --images")
    columns = [known[name] for name in names]
    parts = []
    for start in range(0, len(present), BATCH_SIZE):
        batch = [images.open_image(files[k]) for k in present[start : start + BATCH_SIZE]]
        parts.append(np.asarray(tagger.probabilities(batch))[:, columns])
    truth_BV = np.array([[name in rows[k][1:] for name in names] for k in present])
    return {
        "map": 100 * mean_average_precision(np.concatenate(parts), truth_BV),
        "images": len(present),
        "missing": len(files) - len(present),
        "tags": int(truth_BV.any(axis=0).sum()),
    }


def mean_average_precision(scores_BV: np.ndarray, truth_BV: np.ndarray) -> float:
    """The mean over classes with a positive of the average precision, 0..1: precision at each positive's rank."""
    values = [
        average_precision(scores_B, truth_B) for scores_B, truth_B in zip(scores_BV.T, truth_BV.T) if truth_B.any()
    ]
    return float(np.mean(values))


def average_precision(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """The mean of the precision at the rank of each positive, of one class."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.asarray(truth, bool)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())
