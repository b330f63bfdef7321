# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures into records, a group at a time: checked, tagged where a tagger is given, and never twice."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.array_record import RecordTruth, Tagger, record_truths

log = logging.getLogger(__name__)


class RecordPreparer:
    """Makes records of groups of pictures. What a group's tags were, and what it left out, stands in a file.

    So a preparation that is started again does not ask the tagger again.
    """

    def __init__(self, dataset: AnnotatedImages, make_tagger: Callable[[], Tagger] | None, folder: Path):
        self.dataset, self.make_tagger, self.tagger, self.folder = dataset, make_tagger, None, folder
        self.truths = record_truths(dataset)

    def prepare(self, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, record) of the usable ones among these pictures."""
        indices = range(indices.start, min(indices.stop, len(self.truths)))
        file = self.folder / f"{indices.start}-{indices.stop}.json"
        before = json.loads(file.read_text()) if file.is_file() else None
        tag = None if self.make_tagger is None else functools.partial(self._cached_tags, before)
        found, left_out = select_valid(self.dataset, self.truths, indices, tag)
        tags = [known.image_info.tags for _, known in found.values()]
        if before is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps({"tags": tags, "left_out": left_out}))
            part.replace(file)
        for number, (image, known) in found.items():
            yield number, {"id": known.image_info.name, "image": image, "truth": known.to_json()}

    def _cached_tags(self, cached: dict | None, images: Sequence) -> Sequence[Sequence[str]]:
        if cached is not None and len(cached["tags"]) == len(images):
            return cached["tags"]
        self.tagger = self.tagger or self.make_tagger()
        return self.tagger(images)


def select_valid(
    dataset: AnnotatedImages, truths: list[RecordTruth], indices: Iterable[int], tagger: Tagger | None = None
) -> tuple[dict[int, tuple[bytes, RecordTruth]], list[str]]:
    """({number: (picture file, truth)} of some pictures that training will accept, what was left out and why).

    `known`: the truth of every picture, as `known_of` gives it. `tag` looks at the pictures and replaces the tags.
    """
    found, seen, left_out = {}, [], []
    for number in indices:
        one = truths[number]
        try:
            picture, _ = dataset.load_record(number)
            rows = {
                task: [row for row in rows if _is_valid(task, row, one.image_info, left_out)]
                for task, rows in one.annotations.items()
            }
            found[number] = (
                dataset.image_path(number).read_bytes(),
                RecordTruth(one.image_info, rows, one.segmentations),
            )
            seen += [picture] if tagger else []
        except UserError as error:
            left_out.append(str(error))
    for number, tags in zip(list(found), tagger(seen) if seen else ()):
        image, one = found[number]
        photo = replace(one.photo, tags=tuple(tags))
        found[number] = image, replace(one, photo=photo)
    for reason in left_out:
        log.warning("left out: %s", reason)
    return found, left_out


def _is_valid(task: str, annotation: Annotation, image_info: ImageInfo, skip_reasons: list[str]) -> bool:
    try:
        annotated_images.make_example(task, annotation, image_info, np.random.default_rng(0))
    except UserError as error:
        skip_reasons.append(str(error))
        return False
    return True
