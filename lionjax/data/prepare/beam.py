# SPDX-License-Identifier: Apache-2.0
"""Record preparation on Apache Beam: each worker opens the source and processes groups of images."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam


class PrepareRecords(beam.DoFn):
    """Maps the first index of a group of images to (index, record) pairs."""

    def __init__(self, source, split: str, max_pixels: int, group_size: int, made_by: tuple):
        self.source, self.split, self.max_pixels = source, split, max_pixels
        self.group_size, self.made_by = group_size, made_by  # the latter: of RecordPreparer

    def setup(self) -> None:
        """Runs once per worker: reads the annotations and loads the models there instead of pickling them."""
        from lionjax.data.prepare.worker import RecordPreparer

        dataset = self.source.open(self.split, self.max_pixels)
        self.worker = RecordPreparer(dataset, *self.made_by)

    def process(self, start: int) -> Iterator:
        """Yields the records of the group that begins at `start`."""
        counter = beam.metrics.Metrics.counter("lionjax", "records")
        for record in self.worker.prepare(range(start, start + self.group_size)):
            counter.inc()
            yield record


def records_transform(config, split: str, num_records: int, group_size: int) -> beam.PTransform:
    """A Beam transform that yields all records of a split; `config` is an `ArrayRecordBuilderConfig`."""
    starts = list(range(0, num_records, group_size))
    made_by = (config.make_annotator, config.group_folder / split, config.annotator_digest, config.keeps_regions)
    prepare = PrepareRecords(config.source, split, config.max_pixels, group_size, made_by)
    # Reshuffle distributes the groups; without it one worker would process all of them.
    return beam.Create(starts) | beam.Reshuffle() | beam.ParDo(prepare)
