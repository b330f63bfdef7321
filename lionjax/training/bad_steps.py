# SPDX-License-Identifier: Apache-2.0
"""Updates that are not accepted: which they are, what is kept of them, and what the run does then.

An update whose loss or gradient is not finite, or whose loss stands far above the ones before it, changes no
parameter: the compiled step sees to that. Which policy follows (`run.on_bad_update`) is decided here.
"""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lionjax.core.experiment import RunConfig
from lionjax.core.types import Batch, UserError
from lionjax.training import distributed
from lionjax.training.run_folder import file_name
from lionjax.training.run_log import Entry, append_line
from lionjax.training.step import ANY_LOSS

log = logging.getLogger(__name__)

WINDOW = 128  # losses that say what is usual
FEWEST = 16  # before so many are known, no loss is a spike


class Rewind(Exception):
    """Go back to the last checkpoint, and on from `position`, the place in the data behind the bad batch."""

    def __init__(self, position: Any):
        super().__init__("a bad update")
        self.position = position


def most(entry: Entry, run: RunConfig, number: int) -> np.float32:
    """The loss above which an update is a spike.

    It follows from the losses up to two updates before, as the one before may still be on its way: so a run that was
    stopped and goes on decides the same.
    """
    if not run.spike:
        return ANY_LOSS
    known = entry.recent[: len(entry.recent) - max(0, entry.updates - (number - 2))]
    usual = [loss for loss in known[-WINDOW:] if loss is not None]
    if len(usual) < FEWEST:
        return ANY_LOSS
    return np.float32(statistics.fmean(usual) + run.spike * statistics.pstdev(usual))


def met(workdir: Path, run: RunConfig, entry: Entry, update, name, loss: float, norm: float) -> None:
    """Note an update that was not accepted, in `entry` and in refused.jsonl, and do as `run.on_bad_update` says.

    `update`: its `number` in the stage, `count` from the first stage on, `batch` and `position` behind it; `name`
    says what a record is called. Returns for "skip", raises Rewind for "rewind", and UserError, with the batch kept
    in the folder, for "stop" and where there were `run.bad_updates` before.
    """
    records = [f"{record} ({name(record)})" for record in sorted(set(update.batch.record_B.tolist()))]
    finite = math.isfinite(loss) and math.isfinite(norm)
    above = ", far above the usual" if finite else ""
    said = f"the loss is {loss:g}{above} and the norm of its gradient {norm:g}"
    where = f"stage {entry.name!r}, step {update.number}: {said}, on records {', '.join(records)}"
    earlier = entry.skipped + entry.rewinds
    if run.on_bad_update == "stop" or earlier >= run.bad_updates:
        path = keep_batch(workdir, entry.name, update.number, update.batch)
        many = f"; {earlier} bad updates came before it" if earlier else ""
        raise UserError(
            f"{where}; the batch is kept in {path}, the checkpoints before it are good{many}: look at these records, "
            "lower the learning rate, or set run.on_bad_update to skip or rewind"
        )
    if distributed.first():
        line = {"stage": entry.name, "step": update.number, "update": update.count}
        numbers = {"loss": loss, "grad_norm": norm} if finite else {"loss": str(loss)}
        append_line(workdir / "refused.jsonl", {**line, **numbers, "records": records})
    log.warning("%s; %s", where, {"skip": "skipped", "rewind": "going back"}[run.on_bad_update])
    if run.on_bad_update == "rewind":
        raise Rewind(update.position)
    entry.skip()


def keep_batch(workdir: Path, stage: str, number: int, batch: Batch) -> Path:
    """Write the arrays of a batch (of this process's rows) into the folder of a run; returns the file."""
    whose = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"not_finite_{file_name(stage)}_{number}{whose}.npz"
    pairs = jax.tree_util.tree_flatten_with_path(batch)[0]
    arrays = {jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(x) for at, x in pairs}
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".tmp").replace(path)
    return path
