# SPDX-License-Identifier: Apache-2.0
"""Annotated images to records in groups: validated, optionally tagged, and cached so that a restart resumes."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation
from lionjax.data.datasets.array_record import RecordTruth, Tagger, record_truths

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
        with dataset.image_path(number).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, UserError):
        return b"cannot be read"


class RecordPreparer:
    """Makes records from groups of images. The tags and skip reasons of each group are cached in a JSON file.

    An interrupted preparation that is restarted therefore does not run the tagger again. A cache file holds a digest of
    what its group was made of (`records_digest`; `digest`: of the tagger) and is only used for the same.
    """

    def __init__(
        self, dataset: AnnotatedImages, make_tagger: Callable[[], Tagger] | None, folder: Path, digest: str = ""
    ):
        self.dataset, self.make_tagger, self.tagger, self.folder = dataset, make_tagger, None, folder
        self.truths, self.digest = record_truths(dataset), digest
        self.shown_by_others = frozenset(number for truth in self.truths for number in truth.more_names)

    def prepare(self, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (index, record) of the valid images among `indices`."""
        indices = range(indices.start, min(indices.stop, len(self.truths)))
        file = self.folder / group_file_name(indices)
        digest = records_digest(self.dataset, self.truths, indices, self.digest)
        cached = read_group_file(file)
        cached = cached if cached.get("digest") == digest else None
        tagger = None if self.make_tagger is None else functools.partial(self._cached_tags, cached)
        records, skip_reasons = select_valid(self.dataset, self.truths, indices, tagger, self.shown_by_others)
        tags = [truth.image_info.tags for _, truth in records.values() if truth.image_info.name]
        if cached is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial_file = file.with_suffix(f".{os.getpid()}")
            partial_file.write_text(json.dumps({"digest": digest, "tags": tags, "left_out": skip_reasons}))
            partial_file.replace(file)
        for number, (image, truth) in records.items():
            yield number, {"id": truth.image_info.name, "image": image, "truth": truth.to_json()}

    def _cached_tags(self, cached: dict | None, images: Sequence) -> Sequence[Sequence[str]]:
        if cached is not None and len(cached["tags"]) == len(images):
            return cached["tags"]
        self.tagger = self.tagger or self.make_tagger()
        return self.tagger(images)


def group_file_name(indices: range) -> str:
    """The name of a group's cache file."""
    return f"{indices.start}-{indices.stop}.json"


def read_group_file(file: Path) -> dict[str, Any]:
    """The content of a group's cache file; {} if it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def select_valid(
    dataset: AnnotatedImages,
    truths: list[RecordTruth],
    indices: Iterable[int],
    tagger: Tagger | None = None,
    shown_by_others: frozenset[int] = frozenset(),
) -> tuple[dict[int, tuple[bytes, RecordTruth]], list[str]]:
    """({index: (image file, truth)} of the images that training accepts, reasons for the skipped ones).

    `truths`: the ground truth of every image, from `record_truths`. `tagger`: maps images to tags, which replace the
    annotated ones; text-only records are not tagged. `shown_by_others`: images that rows of other images show, too.
    They are kept even if none of their own rows is valid.
    """
    records, tagger_images, skip_reasons, blank_file = {}, [], [], blank_image_file()
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
                blank_file if is_text else dataset.image_path(number).read_bytes(),
                replace(truth, annotations=rows),
            )
            tagger_images += [opened_image] if tagger and not is_text else []
        except UserError as error:
            skip_reasons.append(str(error))
    with_image = [number for number, (_, truth) in records.items() if truth.image_info.name]
    for number, tags in zip(with_image, tagger(tagger_images) if tagger_images else ()):
        image, truth = records[number]
        image_info = replace(truth.image_info, tags=tuple(tags))
        records[number] = image, replace(truth, image_info=image_info)
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
