# SPDX-License-Identifier: Apache-2.0
"""Records made by Apache Beam on as many machines as there are: each opens the source and takes groups of pictures."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam


class PrepareRecords(beam.DoFn):
    """Groups of pictures, by the number of the first, into (number, record)."""

    def __init__(self, source, split: str, max_pixels: int, make_tagger, folder, group_size: int):
        self.source, self.split, self.max_pixels = source, split, max_pixels
        self.make_tagger, self.folder, self.group_size = make_tagger, folder, group_size

    def setup(self) -> None:
        """Once on each worker: annotations are read and the tagger is loaded there, not sent."""
        from lionjax.data.prepare.worker import RecordPreparer

        self.worker = RecordPreparer(self.source.open(self.split, self.max_pixels), self.make_tagger, self.folder)

    def process(self, start: int) -> Iterator:
        """Records of the group that begins here; what is left out is counted and listed by the worker."""
        counted = beam.metrics.Metrics.counter("lionjax", "records")
        for record in self.worker.prepare(range(start, start + self.group_size)):
            counted.inc()
            yield record


def records_transform(config, split: str, num_images: int, group_size: int) -> beam.PTransform:
    """All records of a split of `size` pictures; `config` as `built_writer.PicturesConfig` has it."""
    starts = list(range(0, num_images, group_size))
    work = PrepareRecords(
        config.source, split, config.max_pixels, config.make_tagger, config.group_folder / split, group_size
    )
    # Groups go to whoever is free, not all to the worker that listed them.
    return beam.Create(starts) | beam.Reshuffle() | beam.ParDo(work)
