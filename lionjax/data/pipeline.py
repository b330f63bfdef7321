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
from lionjax.data.mixture import Part, Records, Sample, examples, open_records

__all__ = ["Batches", "DataConfig", "Sample", "batches", "examples"]

log = logging.getLogger(__name__)

TRIES = 16  # bad records in a row before giving up


class Maker:
    """Makes the row at one place of the mixed stream; a bad record gives way to the next of its part."""

    def __init__(self, records: Records, parts: list[Part], seed: list[int]):
        self.records, self.parts, self.seed = records, parts, seed
        self.masks = records.processor.config.sam_size > 0 and any(p.task == "res" for p in parts)

    def __call__(self, place: int, chosen: tuple[int, int]) -> dict[str, np.ndarray]:
        number, index = chosen
        part, bad, began = self.parts[number], [], time.perf_counter()
        for step in range(TRIES):
            rng = np.random.default_rng([*self.seed, place, step])
            at = (index + step) % part.size
            try:
                row = self.records.row(part, at, rng, self.masks)
            except UserError as error:
                if self.records.data.on_bad_record == "raise":
                    raise
                bad.append({"source": part.source, "task": part.task, "index": at, "reason": str(error)})
            else:
                seconds = np.array(time.perf_counter() - began)
                return row | {"bad": np.array(json.dumps(bad) if bad else ""), "seconds": seconds}
        raise UserError(f"{TRIES} records of {part.task!r} in a row are bad; the first: {bad[0]['reason']}")


class Batches:
    """The batches of one stage on one process, without end; see `batches`."""

    def __init__(self, maker: Maker, rows: Callable[[int], Any], buckets: tuple[int, ...]):
        self.records, self._maker, self._buckets = maker.records, maker, buckets
        self._rows_from, self._rows = rows, iter(rows(0))
        self.delivered = self.bad = 0
        self.made_seconds = 0.0  # spent on the rows delivered, summed over threads and workers

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        rows = next(self._rows)
        self._count(rows.pop("bad"))
        self.made_seconds += float(rows.pop("seconds").sum())
        return self.records.processor.assemble(rows, self._buckets)

    def _count(self, bad_B: np.ndarray) -> None:
        """Note what was replaced in this batch; raise when it is too much."""
        data = self.records.data
        notes = [note for text in bad_B.tolist() if text for note in json.loads(text)]
        self.delivered, self.bad = self.delivered + len(bad_B), self.bad + len(notes)
        for note in notes:
            note["source"] = data.sources[note["source"]].name
            log.warning("bad record replaced: %s", note["reason"])
        if notes and data.quarantine:
            path = Path(data.quarantine)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(note) + "\n" for note in notes)
        # One is always allowed: with few records seen, one is already a large share.
        if self.bad > max(1, data.bad_share * self.delivered):
            raise UserError(
                f"{self.bad} of {self.delivered} records are bad, more than data.bad_share={data.bad_share:g} "
                f"allows; the last: {notes[-1]['reason']}"
            )

    def name(self, record: int) -> str:
        """What a number in `record_B` stands for."""
        return self.records.name(record)

    @property
    def changing(self) -> bool:
        """Whether the picture of a record differs from one time to the next."""
        return self.records.changing

    def position(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON: the same on every process, whatever was read ahead."""
        return {"next": self._rows.get_state()["global_next_index"], "stream": self._stream()}

    def restore(self, position: dict[str, Any]) -> None:
        """Go on from a position, also one of another number of processes or another batch size.

        Raises UserError for a position in another stream: other parts, sizes, weights or seed.
        """
        if position.get("stream") != self._stream():
            raise UserError(
                "the saved position is one in other data (sources, mixture or seed differ); "
                "go on with the config that the run began with"
            )
        self._rows.close()
        self._rows = iter(self._rows_from(int(position["next"])))
        self._rows.set_state({"global_next_index": int(position["next"])})

    def _stream(self) -> int:
        said = [
            [p.source, p.task, p.size, round(p.weight, 9), *([p.places] if p.places else [])]
            + ([p.form, p.shots] if p.form or p.shots else [])
            for p in self._maker.parts
        ]
        return zlib.crc32(json.dumps([said, self._maker.seed]).encode())

    def close(self) -> None:
        """Stop reading ahead."""
        self._rows.close()


def batches(
    data: DataConfig, stage: Any, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Training batches of a stage: `stage.mixture` holds (task, weight) pairs, `stage.name` sets streams apart.

    `batch_size` counts the rows of all processes; each gets its equal share. Raises UserError for an unknown task,
    for data that cannot be read, and for a batch that does not divide.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} does not divide over {process_count} processes; change batch_size")
    records = open_records(data, "train")
    if any(weight < 0 for _, weight in stage.mixture) or not any(weight for _, weight in stage.mixture):
        raise UserError(f"the mixture of stage {stage.name!r} is {stage.mixture}; give weights above 0")
    parts = [
        dataclasses.replace(part, entry=entry)
        for entry, (name, weight) in enumerate(stage.mixture)
        if weight
        for part in records.parts(name, weight)
    ]
    words = [seed, zlib.crc32(stage.name.encode())]
    indices = [
        grain.MapDataset.range(part.size)
        .seed(int(np.random.SeedSequence([*words, number]).generate_state(1)[0] >> 1))
        .shuffle()
        .repeat()
        .map(Numbered(number))
        for number, part in enumerate(parts)
    ]
    mixed = grain.MapDataset.mix(indices, [part.weight for part in parts])
    maker = Maker(records, parts, words)

    def rows(first: int) -> Any:
        return grain.experimental.ElasticIterator(
            grain.MapDataset.range(len(mixed)).map(Share(mixed, maker, batch_size, process_count, first)),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            read_options=grain.ReadOptions(data.threads, data.buffer if data.threads else 0),
            multiprocessing_options=_workers(data),
        )

    # Every process must choose the same length, which none can know of the others.
    return Batches(maker, rows, data.buckets if process_count == 1 else ())


@dataclass(frozen=True)
class Share:
    """The row that Grain asks for by its turn, such that each process has neighbours of a batch.

    Grain deals the rows out like cards. Were they put side by side as they come, where a row stands in its batch
    (and with it dropout, and which rows are read together) would depend on the number of processes. `first`: the
    place at which batches begin.
    """

    mixed: Any
    maker: Maker
    batch: int
    processes: int
    first: int

    def __call__(self, turn: int) -> dict[str, np.ndarray]:
        number, within = divmod(int(turn) - self.first, self.batch)
        turn, process = divmod(within, self.processes)
        place = self.first + number * self.batch + process * (self.batch // self.processes) + turn
        return self.maker(place, self.mixed[place])


@dataclass(frozen=True)
class Numbered:
    """Puts a part's number before the index of its example."""

    part: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.part, int(index)


def _workers(data: DataConfig):
    if not data.workers:
        return None
    import grain
    from absl import flags

    # Grain's workers read a flag that nobody parses outside of an absl app.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.multiprocessing.MultiprocessingOptions(data.workers, max(1, data.buffer))
