# SPDX-License-Identifier: Apache-2.0
"""Training batches with Grain: examples shuffled, mixed by weight, tokenized, stacked and prefetched.

The stream depends only on the seed, the stage and the position: the number of threads, worker processes and hosts, and
restarts, do not change it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.experiment import Mix, parse_entries
from lionjax.core.types import Batch, UserError
from lionjax.data.config import DataConfig
from lionjax.data.mixture import MixtureComponent, MixtureDataset, open_mixture
from lionjax.data.samples import Sample, examples
from lionjax.data.scenes.tasks import MASK_TASKS

__all__ = ["BatchIterator", "DataConfig", "Sample", "batches", "examples"]

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_BAD_RECORDS = 16  # consecutive bad records before an error


class ExampleFactory:
    """Encodes the example at one position of the mixed stream; a bad record is replaced by its component's next one.

    Raises UserError for a bad record if `data.on_bad_record` is "raise", and after 16 consecutive bad records.
    """

    def __init__(self, dataset: MixtureDataset, components: list[MixtureComponent], seed: list[int]):
        self.dataset, self.components, self.seed = dataset, components, seed
        config = dataset.processor.config
        mask_tasks = (*MASK_TASKS, "rec", "grounded") if config.box_format == "masks" else MASK_TASKS
        self.with_masks = config.sam_image_size > 0 and any(p.task in mask_tasks for p in components)

    def __call__(self, position: int, component_and_index: tuple[int, int]) -> dict[str, np.ndarray]:
        component_index, index = component_and_index
        component, bad, start_time = self.components[component_index], [], time.perf_counter()
        for attempt in range(MAX_CONSECUTIVE_BAD_RECORDS):
            rng = np.random.default_rng([*self.seed, position, attempt])
            example_index = (index + attempt) % component.num_examples
            try:
                row = self.dataset.encode_example(component, example_index, rng, self.with_masks)
            except UserError as error:
                if self.dataset.data.on_bad_record == "raise":
                    raise
                bad.append(
                    {
                        "source": component.source_index,
                        "task": component.task,
                        "index": example_index,
                        "reason": str(error),
                    }
                )
            else:
                seconds = np.array(time.perf_counter() - start_time)
                return row | {"bad": np.array(json.dumps(bad) if bad else ""), "seconds": seconds}
        raise UserError(
            f"{MAX_CONSECUTIVE_BAD_RECORDS} records of task {component.task!r} in a row are bad; "
            f"the first one: {bad[0]['reason']}"
        )


class BatchIterator:
    """Endless iterator over the batches of one stage on one process; see `batches`."""

    def __init__(self, factory: ExampleFactory, make_iterator: Callable[[int], Any], is_alone: bool = True):
        self.dataset, self._factory, self._is_alone = factory.dataset, factory, is_alone
        self._max_across_processes: Callable[..., list[int]] | None = None
        self._make_iterator, self._iterator = make_iterator, iter(make_iterator(0))
        self.num_rows = self.num_bad_records = self.num_cut_answers = 0
        self.earlier_rows = self.earlier_bad_records = 0.0  # seen by the run before this iterator was made
        self.load_seconds = 0.0  # seconds spent on the delivered examples, summed over threads and workers

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        rows = next(self._iterator)
        self._count_bad_records(rows.pop("bad"))
        self.load_seconds += float(rows.pop("seconds").sum())
        self._count_cut_answers(rows)
        buckets = self.dataset.data.length_buckets if self._is_alone or self._max_across_processes else ()
        return self.dataset.processor.collate(rows, buckets, self._max_across_processes)

    def choose_lengths_with(self, max_across_processes: Callable[..., list[int]]) -> None:
        """With several processes, choose from `data.length_buckets` by the longest texts of all of them.

        `max_across_processes` gives the largest of each number over the processes; without it, which no other process
        can know the texts of, lengths are the processor's.
        """
        self._max_across_processes = max_across_processes

    def _count_bad_records(self, bad_B: np.ndarray) -> None:
        """Log and count the replaced records of a batch; UserError above `data.max_bad_fraction`."""
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
        num_rows, num_bad = self.num_rows + self.earlier_rows, self.num_bad_records + self.earlier_bad_records
        # Few records say little about their fraction: one bad record and three standard deviations are always allowed.
        expected = data.max_bad_fraction * num_rows
        if notes and num_bad > expected + 3 * math.sqrt(expected) + 1:
            raise UserError(
                f"{num_bad:.0f} of {num_rows:.0f} records are bad, more than the allowed "
                f"data.max_bad_fraction={data.max_bad_fraction:g}; the last one: {notes[-1]['reason']}"
            )

    def count_earlier(self, num_rows: float, num_bad_records: float) -> None:
        """Add this process's share of the records that the run has seen, before a restart too, to those judged."""
        self.earlier_rows, self.earlier_bad_records = num_rows, num_bad_records

    def _count_cut_answers(self, rows: dict[str, np.ndarray]) -> None:
        """Count the answers that exceed `processor.max_target_tokens`; a warning names the first one."""
        cut_B, first_cut = rows["num_cut"], not self.num_cut_answers
        self.num_cut_answers += int((cut_B > 0).sum())
        if first_cut and self.num_cut_answers:
            index, room = int(cut_B.argmax()), self.dataset.data.processor.max_target_tokens
            log.warning(
                "an answer of %s takes %d tokens and is cut to processor.max_target_tokens=%d, without an end token; "
                "cut answers are counted as cut_answers in metrics.jsonl and report.json",
                self.name(int(rows["record"][index])),
                room + int(cut_B[index]),
                room,
            )

    def name(self, record_id: int) -> str:
        """The name of a record by its id in `Batch.record_B`."""
        return self.dataset.record_name(record_id)

    @property
    def random_augmentation(self) -> bool:
        """Whether an image is cropped or flipped differently each time it is read."""
        return self.dataset.random_augmentation

    def position(self) -> dict[str, Any]:
        """The position of the stream as JSON values: equal on all processes, and independent of prefetching."""
        return {"next": self._iterator.get_state()["global_next_index"], "stream": self._stream_checksum()}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position, which may be saved with another number of processes or another batch size.

        Raises UserError for a position in another stream: other components, sizes, weights or seed.
        """
        if position.get("stream") != self._stream_checksum():
            raise UserError(
                "the saved position belongs to other data (sources, mixture or seed differ); "
                "resume with the config that the run was started with"
            )
        self._iterator.close()
        self._iterator = iter(self._make_iterator(int(position["next"])))
        self._iterator.set_state({"global_next_index": int(position["next"])})

    def _stream_checksum(self) -> int:
        mixture = [
            [p.source_index, p.task, p.num_examples, round(p.weight, 9), *([p.box_format] if p.box_format else [])]
            + ([p.template, p.shots] if p.template or p.shots else [])
            + ([{"group": p.group}] if p.group else [])
            for p in self._factory.components
        ]
        return zlib.crc32(json.dumps([mixture, self._factory.seed]).encode())

    def close(self) -> None:
        """Stop prefetching."""
        self._iterator.close()


def batches(
    data: DataConfig, stage: Any, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Training batches of a stage: `stage.mixture` holds its tasks (`Mix`), `stage.name` is part of the seed.

    Entries of several groups take turns: one batch of the first group in the mixture, one of the next, and so on.

    `batch_size` is the global batch size, divided equally over processes. Raises UserError for an unknown task, for
    data that cannot be read, for a mixture without positive weights, and for a `batch_size` that does not divide.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch_size of {batch_size} does not divide over {process_count} processes; "
            f"give a positive multiple of {process_count}"
        )
    dataset, mixture = open_mixture(data, "train"), parse_entries(stage.mixture, Mix)
    if any(mix.weight < 0 for mix in mixture) or not any(mix.weight for mix in mixture):
        raise UserError(
            f"the mixture of stage {stage.name!r} is {tuple(map(tuple, mixture))}; "
            "give weights of 0 or more, one above 0"
        )
    components = [
        dataclasses.replace(component, mixture_index=mixture_index)
        for mixture_index, mix in enumerate(mixture)
        if mix.weight
        for component in dataset.components(mix)
    ]
    stage_seed = [seed, zlib.crc32(stage.name.encode())]
    datasets = [
        grain.MapDataset.range(component.num_examples)
        .seed(int(np.random.SeedSequence([*stage_seed, component_index]).generate_state(1)[0] >> 1))
        .shuffle()
        .repeat()
        .map(TagComponent(component_index))
        for component_index, component in enumerate(components)
    ]
    mixed = [
        grain.MapDataset.mix(
            [dataset for dataset, component in zip(datasets, components) if component.group == group],
            [component.weight for component in components if component.group == group],
        )
        for group in dict.fromkeys(component.group for component in components)
    ]
    factory = ExampleFactory(dataset, components, stage_seed)

    def make_iterator(first: int) -> Any:
        return grain.experimental.ElasticIterator(
            grain.MapDataset.range(min(map(len, mixed))).map(
                ProcessOrder(mixed, factory, batch_size, process_count, first)
            ),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            read_options=grain.ReadOptions(data.num_threads, data.prefetch_buffer_size if data.num_threads else 0),
            multiprocessing_options=_multiprocessing_options(data),
        )

    return BatchIterator(factory, make_iterator, process_count == 1)


@dataclass(frozen=True)
class ProcessOrder:
    """Reorders Grain's round-robin sharding so that each process gets a contiguous slice of every batch.

    `index_datasets`: one of each group of the mixture; the groups take turns by batch.

    With round-robin order, the row of an example in its batch (and thus its dropout, and the rows decoded together)
    would depend on the number of processes. `start`: the position of the first batch.
    """

    index_datasets: Sequence[Any]
    factory: ExampleFactory
    batch_size: int
    process_count: int
    start: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        batch_number, within = divmod(int(index) - self.start, self.batch_size)
        index, process = divmod(within, self.process_count)
        row = process * (self.batch_size // self.process_count) + index
        first = self.start + batch_number * self.batch_size
        # The start is a multiple of another batch size if a run resumes with a new one.
        turn = (-(-self.start // self.batch_size) + batch_number) % len(self.index_datasets)
        first_of_group = max(0, first - turn * self.batch_size) // len(self.index_datasets)
        return self.factory(first + row, self.index_datasets[turn][first_of_group + row])


@dataclass(frozen=True)
class TagComponent:
    """(component index, example index) from an example index."""

    component_index: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.component_index, int(index)


def _multiprocessing_options(data: DataConfig):
    if not data.num_workers:
        return None
    import grain
    from absl import flags

    # Grain's workers read an absl flag, which is only parsed in an absl app.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.multiprocessing.MultiprocessingOptions(data.num_workers, max(1, data.prefetch_buffer_size))
