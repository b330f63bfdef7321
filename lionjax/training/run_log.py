# SPDX-License-Identifier: Apache-2.0
"""Run logs: stage statistics, time accounting, metrics.jsonl, trackers, the progress bar and report.json.

Only process 0 writes. When a resumed run repeats updates, their earlier records are dropped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from lionjax.core.config import to_json
from lionjax.core.experiment import Experiment
from lionjax.core.files import (
    append_jsonl,
    read_record,
    read_whole_lines,
    set_aside,
    take_record,
    write_json,
    write_jsonl,
)
from lionjax.training import trackers
from lionjax.training.trackers import Picture, Trackers

REPORTED_LOSSES = 10  # loss_first and loss_last are means over so many losses
RECENT_LOSSES = 130  # losses kept for the spike threshold; a few more than `bad_steps.LOSS_WINDOW`
DOWNTIME_PHASES = ("lost", "away")  # seconds of work that was lost and repeated, and seconds without a process


@dataclasses.dataclass
class StageStats:
    """Statistics of a stage, saved with each checkpoint.

    `seconds`: by phase of `PhaseTimer`. `behind`: seconds of background work: loading batches ("data", summed over
    threads) and saving checkpoints ("save"). `first`, `last`: the first and last REPORTED_LOSSES losses; `recent`: the
    last RECENT_LOSSES, None for a bad step. `logged`: counters at the last metrics record. `clock`: time.time() when
    saved. `row_tokens`, `row_positions`: tokens of the language model's rows, and those with padding.
    """

    name: str
    trainable_parameters: int
    updates: int = 0
    images: int = 0
    tokens: int = 0
    first: list[float] = dataclasses.field(default_factory=list)
    last: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compilations: int = 0
    frozen_unchanged: bool | None = None
    behind: dict[str, float] = dataclasses.field(default_factory=dict)
    recent: list[float | None] = dataclasses.field(default_factory=list)
    skipped: int = 0
    rewinds: int = 0
    bad_records: int = 0
    cut_answers: int = 0
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: float = 0.0
    row_tokens: int = 0
    row_positions: int = 0

    def add_update(self, loss: float, images: int, tokens: int) -> None:
        """Count one accepted update."""
        self.updates, self.images, self.tokens = (self.updates + 1, self.images + images, self.tokens + tokens)
        self.first = (self.first + [loss])[:REPORTED_LOSSES]
        self.last = (self.last + [loss])[-REPORTED_LOSSES:]
        self.recent = (self.recent + [loss])[-RECENT_LOSSES:]

    def add_row_tokens(self, tokens: int, positions: int) -> None:
        """Count the tokens of the rows of an accepted update, and the positions of these rows."""
        self.row_tokens, self.row_positions = self.row_tokens + tokens, self.row_positions + positions

    def add_skipped_update(self) -> None:
        """Count one bad step that was skipped."""
        self.updates, self.skipped = self.updates + 1, self.skipped + 1
        self.recent = (self.recent + [None])[-RECENT_LOSSES:]

    @property
    def recent_mean_loss(self) -> float:
        """Mean of the last REPORTED_LOSSES losses; infinity before the first."""
        return sum(self.last) / len(self.last) if self.last else math.inf

    def report(self) -> dict[str, Any]:
        """The stage's entry in report.json; its `seconds` do not include downtime."""
        worked = sum(value for part, value in self.seconds.items() if part not in DOWNTIME_PHASES)
        return {
            "name": self.name,
            "steps": self.updates,
            "seconds": round(worked, 3),
            "seconds_by_part": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_behind": {name: round(value, 3) for name, value in self.behind.items()},
            "skipped": self.skipped,
            "rewinds": self.rewinds,
            "bad_records": self.bad_records,
            "cut_answers": self.cut_answers,
            "padding": round(1 - self.row_tokens / self.row_positions, 4) if self.row_positions else None,
            "loss_first": sum(self.first) / len(self.first) if self.first else None,
            "loss_last": self.recent_mean_loss if self.last else None,
            "trainable_parameters": self.trainable_parameters,
            "compilations": self.compilations,
            "frozen_unchanged": self.frozen_unchanged,
        }


class PhaseTimer:
    """Sums wall-clock seconds by phase in `seconds`; each second from `start_time` (time.time()) on has one phase.

    Phases: start (until a stage can train), compile, data (waiting for a batch), step, save, log, evaluate; and from
    before this process: lost (work after the checkpoint that the run resumes from) and away (no process was running).
    """

    def __init__(self, start_time: float):
        self.seconds: dict[str, float] = {}
        self.phase, self.phase_start = "start", time.perf_counter() - (time.time() - start_time)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def switch(self, phase: str, relabel_as: str | None = None) -> None:
        """Start `phase`; the time since the last switch is counted under its own phase, or under `relabel_as`."""
        now = time.perf_counter()
        self.add(relabel_as or self.phase, now - self.phase_start)
        self.phase, self.phase_start = phase, now

    def rebind(self, seconds: dict[str, float]) -> None:
        """Count in the dict `seconds` from now on, and add the sums so far to it."""
        self.switch(self.phase)
        sums, self.seconds = self.seconds, seconds
        for phase, value in sums.items():
            self.add(phase, value)


def downtime(workdir: Path, history: Sequence[dict], start_time: float) -> dict[str, float]:
    """Seconds between the checkpoint that a run resumes from and the start of this process: {"lost": .., "away": ..}.

    The last write to metrics.jsonl separates the two. {} for a new run.
    """
    saved = history[-1].get("clock", 0.0) if history else 0.0
    base = workdir / "base"
    if not saved and not history and base.is_dir():  # the run ended before its first checkpoint
        saved = min((path.stat().st_mtime for path in base.iterdir()), default=0.0)
    if not 0 < saved < start_time:
        return {}
    metrics = workdir / "metrics.jsonl"
    last_write = metrics.stat().st_mtime if metrics.is_file() else saved
    last_write = min(max(last_write, saved), start_time)
    return {"lost": last_write - saved, "away": start_time - last_write}


class RunLogger:
    """Writes metrics to files and the terminal: `with RunLogger(workdir, experiment, update) as logger: ...`.

    `update`: the update that the run resumes from, counted from the first stage on; records of later ones are dropped.
    """

    def __init__(self, workdir: Path, experiment: Experiment, update: int):
        self.path, self.experiment, self.is_writer = (workdir / "metrics.jsonl", experiment, jax.process_index() == 0)
        self.trackers = self.progress_bar = self.progress_task = None
        trackers.require_packages(experiment.run.trackers)  # on all processes, so that none waits for the first
        if not self.is_writer:
            return
        self.truncate_after(update)
        truncate_jsonl(workdir / "refused.jsonl", update)
        self.trackers = Trackers(workdir, experiment, update)
        if sys.stderr.isatty():
            self.progress_bar = _make_progress_bar()

    def __enter__(self):
        if self.progress_bar:
            self.progress_bar.start()
        return self

    def __exit__(self, kind, *_):
        if self.progress_bar:
            self.progress_bar.stop()
        if self.trackers:
            self.trackers.close(failed=kind is not None and issubclass(kind, Exception))

    def truncate_after(self, update: int) -> None:
        """Drop the metrics records of updates after `update`, which the run will repeat."""
        if self.is_writer:
            truncate_jsonl(self.path, update)

    def start_stage(self, stage: str, steps: int, done: int) -> None:
        """Show the start of a stage, or its resumption after `done` of its updates."""
        if self.progress_bar:
            self.progress_task = self.progress_bar.add_task(stage, total=steps, completed=done, status="compiling")
        elif self.is_writer:
            resumed = f", resuming after step {done}" if done else ""
            print(f"stage {stage}: {steps} steps{resumed}", file=sys.stderr, flush=True)

    def update_progress(self, done: int) -> None:
        """Move the progress bar to `done` updates of the stage."""
        if self.progress_bar:
            self.progress_bar.update(self.progress_task, completed=done)

    def write_metrics(self, metrics: dict[str, Any], steps: int) -> None:
        """Write a metrics record (`stage`, `step`, `update`, `loss`, ...); `steps`: number of updates in the stage."""
        if not self.is_writer:
            return
        append_jsonl(self.path, metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        scalars = {f"{metrics['stage']}/{k}": value for k, value in numbers.items() if k not in ("step", "update")}
        self.trackers.write_scalars(scalars, metrics["update"])
        rate = metrics.get("images_per_second")
        loss = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "not accepted"
        status = loss + (f"  {rate:.1f} images/s" if rate else "")
        if self.progress_bar:
            self.progress_bar.update(self.progress_task, completed=metrics["step"], status=status)
            return
        seconds_left = (steps - metrics["step"]) * self.batch_size(metrics["stage"]) / rate if rate else None
        time_left = "" if seconds_left is None else f"  {seconds_left / 60:.1f} min left"
        step, learning_rate = f"step {metrics['step']}/{steps}", f"lr {metrics['learning_rate']:.2e}"
        text = f"stage {metrics['stage']}  {step}  {status}  {learning_rate}{time_left}"
        print(text, file=sys.stderr, flush=True)

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None:
        """Give pictures of answers to the trackers."""
        if self.trackers:
            self.trackers.write_pictures(pictures, update)

    def batch_size(self, stage: str) -> int:
        return next(s.batch_size for s in self.experiment.stages if s.name == stage)

    def print_message(self, text: str) -> None:
        """Print a sentence to the terminal."""
        if self.progress_bar:
            self.progress_bar.console.print(text)
        elif self.is_writer:
            print(text, file=sys.stderr, flush=True)


def _make_progress_bar():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    status = TextColumn("{task.fields[status]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), status)
    return Progress(*columns, console=Console(stderr=True))


def truncate_jsonl(path: Path, update: int) -> None:
    """Drop the records of updates after `update` from a JSON Lines file, if it exists.

    A file with damaged lines is set aside, and its other lines are kept in a new one; a cut last line is dropped.
    """
    if not path.is_file():
        return
    rows, num_damaged = read_whole_lines(path)
    lines = [line for line in rows if isinstance(line.get("update"), int)]
    num_damaged += len(rows) - len(lines)
    last_is_cut = num_damaged == 1 and not path.read_bytes().endswith(b"\n")
    if (num_damaged and not last_is_cut) or (not path.stat().st_size and update):
        set_aside(path, f"{num_damaged} lines cannot be read" if num_damaged else "it is empty")
    write_jsonl(path, [line for line in lines if line["update"] <= update])


def write_report(
    workdir: Path, experiment: Experiment, history: Sequence[dict], unattributed_seconds: dict[str, float]
) -> dict[str, Any]:
    """Update the training entries of report.json and return the whole report; other entries are not changed.

    `history`: fields of the StageStats of each stage. `unattributed_seconds`: seconds by phase outside the stages.
    """
    path = workdir / "report.json"
    report = take_record(path) if jax.process_index() == 0 else read_record(path)
    stages = [StageStats(**fields) for fields in history]
    report |= {
        "config": json.loads(to_json(experiment)),
        "stages": [stage.report() for stage in stages],
        "speed": report.get("speed", {}) | throughput(stages),
        "seconds": total_seconds(stages, unattributed_seconds, seconds_after_stages(report)),
        "environment": environment(),
    }
    if jax.process_index() == 0:
        write_json(path, report)
    return report


def seconds_after_stages(report: Mapping[str, Any]) -> float:
    """Seconds of evaluation after the last stage in a report, whose total also has those within the stages."""
    within = sum(stage.get("seconds_by_part", {}).get("evaluate", 0.0) for stage in report.get("stages") or ())
    return max(0.0, report.get("seconds", {}).get("evaluate", 0.0) - within)


def add_evaluation_seconds(workdir: Path, seconds: float) -> None:
    """Add the duration of an evaluation to report.json and to the last record of metrics.jsonl."""
    if jax.process_index():
        return
    path, (lines, num_damaged) = workdir / "report.json", read_whole_lines(workdir / "metrics.jsonl")
    report = take_record(path)
    parts = report.setdefault("seconds", {})
    parts["evaluate"] = round(parts.get("evaluate", 0.0) + seconds, 3)
    write_json(path, report)
    if lines and not num_damaged:
        parts = lines[-1].setdefault("seconds", {})
        parts["evaluate"] = round(parts.get("evaluate", 0.0) + seconds, 6)
        write_jsonl(workdir / "metrics.jsonl", lines)


def total_seconds(
    entries: list[StageStats],
    unattributed_seconds: Mapping[str, float] = MappingProxyType({}),
    evaluation_seconds: float = 0.0,
) -> dict[str, float]:
    """Seconds by phase, summed over the stages; `unattributed_seconds` are those outside the stages."""
    sums = {"evaluate": evaluation_seconds} if evaluation_seconds else {}
    for seconds_by_part in (*(entry.seconds for entry in entries), unattributed_seconds):
        for part, seconds in seconds_by_part.items():
            sums[part] = sums.get(part, 0.0) + seconds
    return {part: round(seconds, 3) for part, seconds in sums.items()}


def throughput(entries: list[StageStats]) -> dict[str, float]:
    """Rates over all updates and peak memory in bytes; steps include waiting for data, but not compilation."""
    sums = total_seconds(entries)
    busy = max(sums.get("step", 0.0) + sums.get("data", 0.0), 1e-9)
    return {
        "images_per_second": sum(entry.images for entry in entries) / busy,
        "tokens_per_second": sum(entry.tokens for entry in entries) / busy,
        "step_seconds": busy / max(sum(entry.updates for entry in entries), 1),
        "compile_seconds": sums.get("compile", 0.0),
        "peak_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Peak memory in bytes: of the device that used most, or of this process if the devices report none (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment() -> dict[str, Any]:
    """The hardware and software versions that the figures were measured with."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")},
    }
