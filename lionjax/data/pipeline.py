# SPDX-License-Identifier: Apache-2.0
"""Records into batches: examples shuffled and mixed by weight, worded, tokenized and stacked.

Everything is decided by the seed, the stage and the place in the stream: threads, worker processes, the number
of hosts and restarts change nothing. Grain does the shuffling, mixing and reading ahead.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import Batch, UserError
from lionjax.data.config import DataConfig
from lionjax.data.mixture import MixtureComponent, MixtureDataset, Sample, examples, open_mixture

__all__ = ["BatchIterator", "DataConfig", "Sample", "batches", "examples"]

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_BAD_RECORDS = 16  # bad records in a row before giving up


class ExampleFactory:
    """Makes the row at one place of the mixed stream; a bad record gives way to the next of its part."""

    def __init__(self, dataset: MixtureDataset, components: list[MixtureComponent], seed: list[int]):
        self.dataset, self.components, self.seed = dataset, components, seed
        self.with_masks = dataset.processor.config.sam_image_size > 0 and any(p.task == "res" for p in components)

    def __call__(self, position: int, component_and_index: tuple[int, int]) -> dict[str, np.ndarray]:
        number, index = component_and_index
        part, bad, began = self.components[number], [], time.perf_counter()
        for step in range(MAX_CONSECUTIVE_BAD_RECORDS):
            rng = np.random.default_rng([*self.seed, position, step])
            at = (index + step) % part.num_examples
            try:
                row = self.dataset.encode_example(part, at, rng, self.with_masks)
            except UserError as error:
                if self.dataset.data.on_bad_record == "raise":
                    raise
                bad.append({"source": part.source_index, "task": part.task, "index": at, "reason": str(error)})
            else:
                seconds = np.array(time.perf_counter() - began)
                return row | {"bad": np.array(json.dumps(bad) if bad else ""), "seconds": seconds}
        raise UserError(
            f"{MAX_CONSECUTIVE_BAD_RECORDS} records of {part.task!r} in a row are bad; the first: {bad[0]['reason']}"
        )


class BatchIterator:
    """The batches of one stage on one process, without end; see `batches`."""

    def __init__(self, factory: ExampleFactory, make_iterator: Callable[[int], Any], length_buckets: tuple[int, ...]):
        self.dataset, self._factory, self._length_buckets = factory.dataset, factory, length_buckets
        self._make_iterator, self._iterator = make_iterator, iter(make_iterator(0))
        self.num_rows = self.num_bad_records = 0
        self.load_seconds = 0.0  # spent on the rows delivered, summed over threads and workers

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        rows = next(self._iterator)
        self._count_bad_records(rows.pop("bad"))
        self.load_seconds += float(rows.pop("seconds").sum())
        return self.dataset.processor.collate(rows, self._length_buckets)

    def _count_bad_records(self, bad_B: np.ndarray) -> None:
        """Note what was replaced in this batch; raise when it is too much."""
        data = self.dataset.data
        notes = [note for text in bad_B.tolist() if text for note in json.loads(text)]
        self.num_rows, self.num_bad_records = self.num_rows + len(bad_B), self.num_bad_records + len(notes)
        for note in notes:
            note["source"] = data.sources[note["source"]].name
            log.warning("bad record replaced: %s", note["reason"])
        if notes and data.bad_records_path:
            path = Path(data.bad_records_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(note) + "\n" for note in notes)
        # One is always allowed: with few records seen, one is already a large share.
        if self.num_bad_records > max(1, data.max_bad_fraction * self.num_rows):
            raise UserError(
                f"{self.num_bad_records} of {self.num_rows} records are bad, more than data.max_bad_fraction={data.max_bad_fraction:g} "
                f"allows; the last: {notes[-1]['reason']}"
            )

    def name(self, record_id: int) -> str:
        """What a number in `record_B` stands for."""
        return self.dataset.record_name(record_id)

    @property
    def random_augmentation(self) -> bool:
        """Whether the picture of a record differs from one time to the next."""
        return self.dataset.random_augmentation

    def position(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON: the same on every process, whatever was read ahead."""
        return {"next": self._iterator.get_state()["global_next_index"], "stream": self._stream_checksum()}

    def restore(self, position: dict[str, Any]) -> None:
        """Go on from a position, also one of another number of processes or another batch size.

        Raises UserError for a position in another stream: other parts, sizes, weights or seed.
        """
        if position.get("stream") != self._stream_checksum():
            raise UserError(
                "the saved position is one in other data (sources, mixture or seed differ); "
                "go on with the config that the run began with"
            )
        self._iterator.close()
        self._iterator = iter(self._make_iterator(int(position["next"])))
        self._iterator.set_state({"global_next_index": int(position["next"])})

    def _stream_checksum(self) -> int:
        said = [
            [p.source_index, p.task, p.num_examples, round(p.weight, 9), *([p.box_format] if p.box_format else [])]
            + ([p.template, p.shots] if p.template or p.shots else [])
            for p in self._factory.components
        ]
        return zlib.crc32(json.dumps([said, self._factory.seed]).encode())

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def batches(
    data: DataConfig, stage: Any, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Training batches of a stage: `stage.mixture` holds (task, weight) pairs, `stage.name` sets streams apart.

    `batch_size` counts the rows of all processes; each gets its equal share. Raises UserError for an unknown task,
    for data that cannot be read, and for a batch that does not divide.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} does not divide over {process_count} processes; change batch_size")
    records = open_mixture(data, "train")
    if any(weight < 0 for _, weight in stage.mixture) or not any(weight for _, weight in stage.mixture):
        raise UserError(f"the mixture of stage {stage.name!r} is {stage.mixture}; give weights above 0")
    parts = [
        dataclasses.replace(part, mixture_index=entry)
        for entry, (name, weight) in enumerate(stage.mixture)
        if weight
        for part in records.components(name, weight)
    ]
    words = [seed, zlib.crc32(stage.name.encode())]
    indices = [
        grain.MapDataset.range(part.num_examples)
        .seed(int(np.random.SeedSequence([*words, number]).generate_state(1)[0] >> 1))
        .shuffle()
        .repeat()
        .map(TagComponent(number))
        for number, part in enumerate(parts)
    ]
    mixed = grain.MapDataset.mix(indices, [part.weight for part in parts])
    maker = ExampleFactory(records, parts, words)

    def rows(first: int) -> Any:
        return grain.experimental.ElasticIterator(
            grain.MapDataset.range(len(mixed)).map(ProcessOrder(mixed, maker, batch_size, process_count, first)),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            read_options=grain.ReadOptions(data.num_threads, data.prefetch_buffer_size if data.num_threads else 0),
            multiprocessing_options=_multiprocessing_options(data),
        )

    # Every process must choose the same length, which none can know of the others.
    return BatchIterator(maker, rows, data.length_buckets if process_count == 1 else ())


@dataclass(frozen=True)
class ProcessOrder:
    """The row that Grain asks for by its turn, such that each process has neighbours of a batch.

    Grain deals the rows out like cards. Were they put side by side as they come, where a row stands in its batch
    (and with it dropout, and which rows are read together) would depend on the number of processes. `first`: the
    place at which batches begin.
    """

    index_dataset: Any
    factory: ExampleFactory
    batch_size: int
    process_count: int
    start: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        number, within = divmod(int(index) - self.start, self.batch_size)
        index, process = divmod(within, self.process_count)
        place = self.start + number * self.batch_size + process * (self.batch_size // self.process_count) + index
        return self.factory(place, self.index_dataset[place])


@dataclass(frozen=True)
class TagComponent:
    """Puts a part's number before the index of its example."""

    component_index: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.component_index, int(index)


def _multiprocessing_options(data: DataConfig):
    if not data.num_workers:
        return None
    import grain
    from absl import flags

    # Grain's workers read a flag that nobody parses outside of an absl app.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.multiprocessing.MultiprocessingOptions(data.num_workers, max(1, data.prefetch_buffer_size))
