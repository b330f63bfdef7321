# SPDX-License-Identifier: Apache-2.0
"""Annotated images to records in groups: validated, optionally tagged or refined, cached so that a restart resumes."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation
from lionjax.data.datasets.array_record import RecordTruth, record_truths
from lionjax.data.prepare.group_cache import Annotator, GroupCache
from lionjax.data.regions import ImageRegions

log = logging.getLogger(__name__)


def blank_image_file() -> bytes:
    """The image file of a text-only record: PNG, one black pixel, as `AnnotatedImages.load_record` gives it."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def records_digest(dataset: AnnotatedImages, truths: Sequence[RecordTruth], indices: Iterable[int], digest: str) -> str:
    """SHA-256 of what the records at `indices` are made of: ground truths, image files, and the given `digest`."""
    total = hashlib.sha256(f"{digest} {dataset.max_pixels} ".encode())
    for number in indices:
        total.update(truths[number].to_json().encode())
        own = [number] if truths[number].image_info.name else []
        for shown in (*own, *truths[number].more_names):
            total.update(_file_digest(dataset, shown))
    return total.hexdigest()


def _file_digest(dataset: AnnotatedImages, number: int) -> bytes:
    try:
        return hashlib.sha256(dataset.image_file(number)).digest()
    except (OSError, UserError):
        return b"cannot be read"


class RecordPreparer:
    """Makes records from groups of images, and caches what was found in each group (see `GroupCache`).

    An interrupted preparation that is restarted therefore does not run the models again. `make_annotator`: returns the
    tagger or refiner; None: the source's tags stay. `digest`: of its folder. `keeps_regions`: records also hold boxes
    and region features.
    """

    def __init__(
        self,
        dataset: AnnotatedImages,
        make_annotator: Callable[[], Annotator] | None,
        folder: Path,
        digest: str = "",
        keeps_regions: bool = False,
    ):
        self.dataset, self.make_annotator, self.annotator, self.folder = dataset, make_annotator, None, folder
        self.truths, self.digest, self.keeps_regions = record_truths(dataset), digest, keeps_regions
        self.shown_by_others = frozenset(number for truth in self.truths for number in truth.more_names)

    def prepare(self, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (index, record) of the valid images among `indices`."""
        indices = range(indices.start, min(indices.stop, len(self.truths)))
        digest = records_digest(self.dataset, self.truths, indices, self.digest)
        cache = GroupCache(self.folder, indices, digest)
        annotated: list[ImageRegions | UserError] = []

        def annotate(images: Sequence) -> Sequence[ImageRegions | UserError]:
            annotated.extend(self._cached_regions(cache, images))
            return annotated

        annotator = None if self.make_annotator is None else annotate
        records, skip_reasons = select_valid(self.dataset, self.truths, indices, annotator, self.shown_by_others)
        if not cache.is_complete:
            cache.save(annotated, skip_reasons)
        for number, (image, truth, found) in records.items():
            record = {"id": truth.image_info.name, "image": image, "truth": truth.to_json()}
            yield number, record | ((found or ImageRegions()).to_record() if self.keeps_regions else {})

    def _cached_regions(self, cache: GroupCache, images: Sequence) -> Sequence[ImageRegions | UserError]:
        if (cached := cache.load(len(images))) is not None:
            return cached
        self.annotator = self.annotator or self.make_annotator()
        return self.annotator(images)


def select_valid(
    dataset: AnnotatedImages,
    truths: list[RecordTruth],
    indices: Iterable[int],
    annotate: Annotator | None = None,
    shown_by_others: frozenset[int] = frozenset(),
) -> tuple[dict[int, tuple[bytes, RecordTruth, ImageRegions | None]], list[str]]:
    """({index: (image file, truth, what was found)} of images that training accepts, reasons for the skipped ones).

    `truths`: the ground truth of every image, from `record_truths`. `annotate`: maps images to what is in them, whose
    tags replace the annotated ones, or to the reason to skip them; text-only records are left out. `shown_by_others`:
    images that rows of other images show, too. They are kept even if none of their own rows is valid.
    """
    records, opened_images, skip_reasons, blank_file = {}, [], [], blank_image_file()
    for number in indices:
        truth = truths[number]
        is_text = not truth.image_info.name
        try:
            opened_image, image_info = (None, truth.image_info) if is_text else dataset.load_record(number)
            truth = replace(truth, image_info=image_info)  # with the size of the file, if its boxes need it
            rows = {
                task: [row for row in rows if _is_valid(task, row, truth, dataset, skip_reasons)]
                for task, rows in truth.annotations.items()
            }
            if truth.annotations and not any(rows.values()) and number not in shown_by_others:
                continue
            records[number] = (
                blank_file if is_text else dataset.image_file(number),
                replace(truth, annotations=rows),
                None,
            )
            opened_images += [opened_image] if annotate and not is_text else []
        except UserError as error:
            skip_reasons.append(str(error))
    with_image = [number for number, (_, truth, _) in records.items() if truth.image_info.name]
    for number, found in zip(with_image, annotate(opened_images) if opened_images else ()):
        if isinstance(found, UserError):
            skip_reasons.append(f"{truths[number].image_info.name}: {found}")
            if number not in shown_by_others:
                del records[number]
            continue
        image, truth, _ = records[number]
        image_info = replace(truth.image_info, tags=found.tags)
        records[number] = image, replace(truth, image_info=image_info), found
    for reason in skip_reasons:
        log.warning("skipped: %s", reason)
    return records, skip_reasons


def _is_valid(
    task: str, annotation: Annotation, truth: RecordTruth, dataset: AnnotatedImages, skip_reasons: list[str]
) -> bool:
    """Whether an example, its masks and its other images can be made; appends the reason to `skip_reasons` if not."""
    image_info = truth.image_info
    try:
        annotated_images.make_example(task, annotation, image_info, np.random.default_rng(0))
        if task == "res" and annotation.regions:
            truth.masks(annotation.regions)
        for number in annotation.more_images:
            dataset.load_record(number)
    except UserError as error:
        skip_reasons.append(str(error))
        return False
    return True
