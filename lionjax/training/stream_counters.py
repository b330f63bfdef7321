# SPDX-License-Identifier: Apache-2.0
"""What happened beside the updates of a stage, for its statistics: loading, saving, bad records and cut answers."""

from __future__ import annotations

from typing import Any

from lionjax.training import checkpoint, distributed
from lionjax.training.run_log import StageStats


class StreamCounters:
    """Adds background data loading, checkpoint time, bad records and cut answers to the statistics of a stage."""

    def __init__(self):
        self.batch_seconds = self.bad = self.cut = 0.0

    def add_background_seconds(
        self, stats: StageStats, stream: Any, checkpoints: checkpoint.AsyncCheckpointManager
    ) -> None:
        """Add the seconds spent in the background since the last call: loading batches and saving checkpoints."""
        load_seconds = getattr(stream, "load_seconds", 0.0)
        for part, seconds in (("data", load_seconds - self.batch_seconds), ("save", checkpoints.pop_save_seconds())):
            stats.behind[part] = stats.behind.get(part, 0.0) + seconds
        self.batch_seconds = load_seconds

    def add_row_counts(self, stats: StageStats, stream: Any) -> None:
        """Add the records replaced and the answers cut since the last call, summed over processes.

        All processes must call it.
        """
        counts = (getattr(stream, name, 0) for name in ("num_bad_records", "num_cut_answers"))
        bad, cut = distributed.sum_across_processes(*counts)
        stats.bad_records, self.bad = stats.bad_records + int(bad - self.bad), bad
        stats.cut_answers, self.cut = stats.cut_answers + int(cut - self.cut), cut
