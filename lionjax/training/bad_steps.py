# SPDX-License-Identifier: Apache-2.0
"""Bad training steps: the loss-spike threshold, and the policy `run.on_bad_step` (stop, skip or rewind).

A step is bad if its loss or gradient norm is not finite, or if its loss is above the spike threshold. The compiled
train step (`step.make_train_step`) leaves the parameters unchanged in that case; this module decides what follows.
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
from lionjax.core.files import append_jsonl
from lionjax.core.types import Batch, UserError
from lionjax.training import distributed
from lionjax.training.run_folder import safe_file_name
from lionjax.training.run_log import StageStats
from lionjax.training.step import NO_LOSS_THRESHOLD

log = logging.getLogger(__name__)

LOSS_WINDOW = 128  # number of recent losses that the mean and standard deviation are taken over
MIN_LOSSES = 16  # with fewer losses no threshold is set


class Rewind(Exception):
    """Raised to restart from the last checkpoint; `position` is the data position after the bad batch."""

    def __init__(self, position: Any):
        super().__init__("bad training step")
        self.position = position


def loss_threshold(stats: StageStats, run: RunConfig, step: int) -> np.float32:
    """The loss above which step `step` counts as a spike: mean + `run.loss_spike_sigmas` standard deviations.

    Infinity if `run.loss_spike_sigmas` is 0 or fewer than MIN_LOSSES losses are available. Only losses up to step
    `step - 2` are used, because step `step - 1` may still be in flight; a resumed run therefore decides the same.
    """
    if not run.loss_spike_sigmas:
        return NO_LOSS_THRESHOLD
    history = stats.recent[: len(stats.recent) - max(0, stats.updates - (step - 2))]
    losses = [loss for loss in history[-LOSS_WINDOW:] if loss is not None]
    if len(losses) < MIN_LOSSES:
        return NO_LOSS_THRESHOLD
    return np.float32(statistics.fmean(losses) + run.loss_spike_sigmas * statistics.pstdev(losses))


def handle_bad_step(
    workdir: Path, run: RunConfig, stats: StageStats, update, record_name, loss: float, grad_norm: float
) -> None:
    """Record a bad step in `stats` and in refused.jsonl, and apply `run.on_bad_step`.

    `update`: the `loop.InFlightStep` that was not accepted. `record_name(record)`: text that identifies a record in
    messages. Returns for "skip". Raises Rewind for "rewind". Raises UserError, after saving the batch to `workdir`,
    for "stop" or when the stage already had `run.max_bad_steps` bad steps.
    """
    records = [f"{record} ({record_name(record)})" for record in sorted(set(np.ravel(update.batch.record_B).tolist()))]
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    spike = " (a spike)" if finite else ""
    message = (
        f"stage {stats.name!r}, step {update.stage_step}: the loss is {loss:g}{spike} and the gradient norm is "
        f"{grad_norm:g}, on records {', '.join(records)}"
    )
    num_earlier = stats.skipped + stats.rewinds
    if run.on_bad_step == "stop" or num_earlier >= run.max_bad_steps:
        path = save_bad_batch(workdir, stats.name, update.stage_step, update.batch)
        earlier = f", after {num_earlier} earlier bad steps (run.max_bad_steps {run.max_bad_steps})"
        raise UserError(
            f"{message}{earlier if num_earlier else ''}; the batch is saved in {path} and the earlier checkpoints are "
            "valid: check these records, lower the learning rate, or set run.on_bad_step to skip or rewind"
        )
    if distributed.is_main_process():
        line = {"stage": stats.name, "step": update.stage_step, "update": update.global_step}
        numbers = {"loss": loss, "grad_norm": grad_norm} if finite else {"loss": str(loss)}
        append_jsonl(workdir / "refused.jsonl", {**line, **numbers, "records": records})
    action = {"skip": "skipping this step", "rewind": "going back to the last checkpoint"}[run.on_bad_step]
    log.warning("%s; %s", message, action)
    if run.on_bad_step == "rewind":
        raise Rewind(update.data_position)
    stats.add_skipped_update()


def save_bad_batch(workdir: Path, stage: str, step: int, batch: Batch) -> Path:
    """Write this process's rows of a batch to an .npz file in `workdir`; returns the path."""
    process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"not_finite_{safe_file_name(stage)}_{step}{process}.npz"
    pairs = jax.tree_util.tree_flatten_with_path(batch)[0]
    arrays = {jax.tree_util.keystr(leaf_path, simple=True, separator="/"): np.asarray(x) for leaf_path, x in pairs}
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".tmp").replace(path)
    return path
