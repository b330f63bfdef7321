# SPDX-License-Identifier: Apache-2.0
"""Which questions of an evaluation are about records that the model was trained on."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.source import has_splits
from lionjax.data.mixture import MixtureDataset, open_mixture
from lionjax.data.samples import Sample

log = logging.getLogger(__name__)

COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")  # the same image in any folder
OTHER_FIELDS = ("name",)  # of a source, which do not say what it reads


class TrainedRecords:
    """The records of a model's training data, to compare the questions of an evaluation with.

    `data` and `split`: of the evaluation; `train_data`: of the training. A source of the training data whose splits do
    not differ, or whose split is "train", was trained on. An image also counts if another source of the training data
    has it in its training split, by its path or COCO's name, and a text-only row if its texts are equal.
    """

    def __init__(self, data: DataConfig, split: str, train_data: DataConfig):
        self.source_names = [source.name for source in data.sources]
        pairs = list(zip(data.sources, open_mixture(data, split).datasets))
        self.has_splits = [has_splits(source, dataset) for source, dataset in pairs]
        trained_sources = [_files(source) for source in train_data.sources]
        self.is_trained = [
            (split == "train" or not splits) and _files(source) in trained_sources
            for (source, _), splits in zip(pairs, self.has_splits)
        ]
        self.identities: set[object] = set()
        try:
            training = open_mixture(dataclasses.replace(train_data, on_bad_record="replace"), "train")
        except UserError as error:
            log.warning("the evaluation is not compared with the training data: %s", error)
        else:
            self.identities = set(_identities(training))

        self.counts = [0, 0, 0]  # samples; those about training records; those whose source's splits do not differ

    def add(self, sample: Sample) -> None:
        """Count a question of the evaluation."""
        of_sample = (1, sample in self, not self.splits_differ(sample))
        self.counts = [count + int(one) for count, one in zip(self.counts, of_sample)]

    def summary(self, label: str) -> dict[str, Any]:
        """The counts for report.json, with a warning that names the benchmark `label` if any was trained on.

        "trained_on": number of questions about training records. "has_splits": whether the splits are other records.
        """
        num_samples, num_trained, num_same = self.counts
        if num_trained:
            counts = num_trained, num_samples
            log.warning("%s: %d of %d questions are about records that the model was trained on", label, *counts)
        return {"trained_on": num_trained, "has_splits": not num_same}

    def _source_index(self, sample: Sample) -> int:
        matches = [k for k, name in enumerate(self.source_names) if sample.name.startswith(f"{name}/")]
        return max(matches, key=lambda k: len(self.source_names[k]))

    def splits_differ(self, sample: Sample) -> bool:
        """Whether the splits of the sample's source are different records."""
        return self.has_splits[self._source_index(sample)]

    def __contains__(self, sample: Sample) -> bool:
        if self.is_trained[self._source_index(sample)]:
            return True
        if not isinstance(sample.dataset, AnnotatedImages):
            return False
        dataset, record, example = sample.dataset, sample.record_index, sample.example
        has_image = bool(dataset.image_infos[record].name)
        identity = _image_identity(dataset, record) if has_image else (example.question, example.answers)
        return identity in self.identities


def _files(source: Any) -> dict[str, Any]:
    """The class of a source and its fields that say what it reads."""
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name not in OTHER_FIELDS}
    return {"class": type(source), **fields}


def _image_identity(dataset: AnnotatedImages, record: int) -> object:
    match = COCO_NAME.fullmatch(Path(dataset.image_infos[record].name).stem)
    return match[1] if match else dataset.image_place(record)


def _identities(training: MixtureDataset) -> Iterator[object]:
    for dataset in training.datasets:
        if isinstance(dataset, AnnotatedImages):
            for record, image_info in enumerate(dataset.image_infos):
                if image_info.name:
                    yield _image_identity(dataset, record)
            for row in (row for rows in dataset.annotations.values() for row in rows):
                if not dataset.image_infos[row.photo].name:
                    yield row.question, row.answers
