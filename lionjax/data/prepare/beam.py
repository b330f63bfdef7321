# SPDX-License-Identifier: Apache-2.0
"""Record preparation on Apache Beam: each worker opens the source and processes groups of images."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam


class PrepareRecords(beam.DoFn):
    """Maps the first index of a group of images to (index, record) pairs."""

    def __init__(self, source, split: str, max_pixels: int, make_tagger, folder, digest, group_size: int):
        self.source, self.split, self.max_pixels = source, split, max_pixels
        self.make_tagger, self.folder, self.digest, self.group_size = make_tagger, folder, digest, group_size

    def setup(self) -> None:
        """Runs once per worker: reads the annotations and loads the tagger there instead of pickling them."""
        from lionjax.data.prepare.worker import RecordPreparer

        dataset = self.source.open(self.split, self.max_pixels)
        self.worker = RecordPreparer(dataset, self.make_tagger, self.folder, self.digest)

    def process(self, start: int) -> Iterator:
        """Yields the records of the group that begins at `start`."""
        counter = beam.metrics.Metrics.counter("lionjax", "records")
        for record in self.worker.prepare(range(start, start + self.group_size)):
            counter.inc()
            yield record


def records_transform(config, split: str, num_records: int, group_size: int) -> beam.PTransform:
    """A Beam transform that yields all records of a split; `config` is an `ArrayRecordBuilderConfig`."""
    starts = list(range(0, num_records, group_size))
    prepare = PrepareRecords(
        *(config.source, split, config.max_pixels, config.make_tagger),
        *(config.group_folder / split, config.tagger_digest, group_size),
    )
    # Reshuffle distributes the groups; without it one worker would process all of them.
    return beam.Create(starts) | beam.Reshuffle() | beam.ParDo(prepare)
