# SPDX-License-Identifier: Apache-2.0
"""Records made by Apache Beam on as many machines as there are: each opens the source and takes groups of pictures."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam


class Prepare(beam.DoFn):
    """Groups of pictures, by the number of the first, into (number, record)."""

    def __init__(self, source, split: str, max_pixels: int, tag, folder, at_once: int):
        self.source, self.split, self.max_pixels = source, split, max_pixels
        self.tag, self.folder, self.at_once = tag, folder, at_once

    def setup(self) -> None:
        """Once on each worker: annotations are read and the tagger is loaded there, not sent."""
        from lionjax.data.prepare.worker import Worker

        self.worker = Worker(self.source.open(self.split, self.max_pixels), self.tag, self.folder)

    def process(self, start: int) -> Iterator:
        """Records of the group that begins here; what is left out is counted and listed by the worker."""
        counted = beam.metrics.Metrics.counter("lionjax", "records")
        for record in self.worker.records(range(start, start + self.at_once)):
            counted.inc()
            yield record


def records(config, split: str, size: int, at_once: int) -> beam.PTransform:
    """All records of a split of `size` pictures; `config` as `built_writer.PicturesConfig` has it."""
    starts = list(range(0, size, at_once))
    work = Prepare(config.source, split, config.max_pixels, config.tag, config.groups / split, at_once)
    # Groups go to whoever is free, not all to the worker that listed them.
    return beam.Create(starts) | beam.Reshuffle() | beam.ParDo(work)
