# SPDX-License-Identifier: Apache-2.0
"""What a run says while it goes on and when it ends: metrics.jsonl, TensorBoard, a progress bar, report.json.

Only process 0 writes. A line that a restarted run makes again replaces the one it made before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
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

REPORTED_LOSSES = 10  # losses behind loss_first and loss_last, so that one odd batch does not decide them
RECENT_LOSSES = 130  # losses remembered to tell a spike by; a few more than `refused.WINDOW`
DOWNTIME_PHASES = ("lost", "away")  # parts of the time in which this run did nothing that lasts


@dataclasses.dataclass
class StageStats:
    """What is remembered of a stage across restarts.

    `seconds`: where time went, by the names of `Clock`. `behind`: seconds of work that was done while the devices
    computed: making batches (summed over threads) and saving. `recent`: the last losses, None for an update that was
    not accepted. `logged`: what stood in the entry at the last line of metrics. `clock`: when this was saved.
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
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: float = 0.0

    def add_update(self, loss: float, images: int, tokens: int) -> None:
        """Count one update."""
        self.updates, self.images, self.tokens = (self.updates + 1, self.images + images, self.tokens + tokens)
        self.first = (self.first + [loss])[:REPORTED_LOSSES]
        self.last = (self.last + [loss])[-REPORTED_LOSSES:]
        self.recent = (self.recent + [loss])[-RECENT_LOSSES:]

    def add_skipped_update(self) -> None:
        """Count one update that was not accepted."""
        self.updates, self.skipped = self.updates + 1, self.skipped + 1
        self.recent = (self.recent + [None])[-RECENT_LOSSES:]

    @property
    def recent_mean_loss(self) -> float:
        return sum(self.last) / len(self.last) if self.last else math.inf

    def report(self) -> dict[str, Any]:
        """The stage's entry in report.json. `seconds` counts the time in which the run was at work on it."""
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
            "loss_first": sum(self.first) / len(self.first) if self.first else None,
            "loss_last": self.recent_mean_loss if self.last else None,
            "trainable_parameters": self.trainable_parameters,
            "compilations": self.compilations,
            "frozen_unchanged": self.frozen_unchanged,
        }


class PhaseTimer:
    """Where time goes, without a gap: from `turn("data")` to the next `turn` all of it is counted under "data".

    Parts: start (until a stage can begin), compile, data (waiting for a batch), step, save, log, evaluate; and, from
    before this process, lost (work done after the checkpoint that it goes on from) and away (nothing ran).
    The sums lie in `seconds`. `began`: the time of day from which on this process counts.
    """

    def __init__(self, start_time: float):
        self.seconds: dict[str, float] = {}
        self.phase, self.phase_start = "start", time.perf_counter() - (time.time() - start_time)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def switch(self, phase: str, relabel_as: str | None = None) -> None:
        """From now on time goes to `part`. What went before turns out to have been `was`."""
        now = time.perf_counter()
        self.add(relabel_as or self.phase, now - self.phase_start)
        self.phase, self.phase_start = phase, now

    def rebind(self, seconds: dict[str, float]) -> None:
        """From now on the sums lie in `seconds`, which takes over those up to here."""
        self.switch(self.phase)
        earlier, self.seconds = self.seconds, seconds
        for part, value in earlier.items():
            self.add(part, value)


def downtime(workdir: Path, history: Sequence[dict], start_time: float) -> dict[str, float]:
    """Seconds {lost, away} between the checkpoint that a run goes on from and the start of this process."""
    saved = history[-1].get("clock", 0.0) if history else 0.0
    first = workdir / "base"
    if not saved and not history and first.is_dir():  # it began, and was ended before the first checkpoint
        saved = min((path.stat().st_mtime for path in first.iterdir()), default=0.0)
    if not 0 < saved < start_time:
        return {}
    lines = workdir / "metrics.jsonl"
    seen = lines.stat().st_mtime if lines.is_file() else saved
    seen = min(max(seen, saved), start_time)
    return {"lost": seen - saved, "away": start_time - seen}


class RunLogger:
    """The lines of a run, to files and to the terminal: `with Journal(workdir, experiment, update) as journal: ...`.

    `update` is where the run goes on, counted from the first stage; later lines of an earlier try are dropped.
    """

    def __init__(self, workdir: Path, experiment: Experiment, update: int):
        self.path, self.experiment, self.is_writer = (workdir / "metrics.jsonl", experiment, jax.process_index() == 0)
        self.tensorboard = self.progress_bar = self.progress_task = None
        if not self.is_writer:
            return
        self.truncate_after(update)
        truncate_jsonl(workdir / "refused.jsonl", update)
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=update + 1)
        if sys.stderr.isatty():
            self.progress_bar = _make_progress_bar()

    def __enter__(self):
        if self.progress_bar:
            self.progress_bar.start()
        return self

    def __exit__(self, *_):
        if self.progress_bar:
            self.progress_bar.stop()
        if self.tensorboard:
            self.tensorboard.close()

    def truncate_after(self, update: int) -> None:
        """Forget the lines of updates after this one: the run will make them again."""
        if self.is_writer:
            truncate_jsonl(self.path, update)

    def start_stage(self, stage: str, steps: int, done: int) -> None:
        """A stage begins or goes on after `done` updates."""
        if self.progress_bar:
            self.progress_task = self.progress_bar.add_task(stage, total=steps, completed=done, said="compiling")
        elif self.is_writer:
            where = f" after {done}" if done else ""
            print(f"stage {stage}: {steps} steps{where}", file=sys.stderr, flush=True)

    def update_progress(self, done: int) -> None:
        """So many updates of the stage are done."""
        if self.progress_bar:
            self.progress_bar.update(self.progress_task, completed=done)

    def write_metrics(self, metrics: dict[str, Any], steps: int) -> None:
        """One line of metrics: `stage`, `step`, `update`, `loss` and others; `steps` is the stage's length."""
        if not self.is_writer:
            return
        append_jsonl(self.path, metrics)
        if self.tensorboard:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name not in ("step", "update"):
                    self.tensorboard.add_scalar(f"{metrics['stage']}/{name}", value, metrics["update"])
        rate = metrics.get("images_per_second")
        loss = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "not accepted"
        said = loss + (f"  {rate:.1f} images/s" if rate else "")
        if self.progress_bar:
            self.progress_bar.update(self.progress_task, completed=metrics["step"], said=said)
            return
        rest = (steps - metrics["step"]) * self.batch_size(metrics["stage"]) / rate if rate else None
        left = "" if rest is None else f"  {rest / 60:.1f} min left"
        text = (
            f"stage {metrics['stage']}  step {metrics['step']}/{steps}  {said}  lr {metrics['learning_rate']:.2e}{left}"
        )
        print(text, file=sys.stderr, flush=True)

    def batch_size(self, stage: str) -> int:
        return next(s.batch_size for s in self.experiment.stages if s.name == stage)

    def print_message(self, text: str) -> None:
        """A sentence for the person at the terminal."""
        if self.progress_bar:
            self.progress_bar.console.print(text)
        elif self.is_writer:
            print(text, file=sys.stderr, flush=True)


def _make_progress_bar():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.fields[said]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said)
    return Progress(*columns, console=Console(stderr=True))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object to a file of lines, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(record) + "\n").encode())
    finally:
        os.close(file)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; a line that a killed run left half-written is passed over."""
    found = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def truncate_jsonl(path: Path, update: int) -> None:
    """Drop the lines of updates after this one from a file, if there is one."""
    if not path.is_file():
        return
    lines = [line for line in read_jsonl(path) if line["update"] <= update]
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


# The report


def write_report(
    workdir: Path, experiment: Experiment, history: Sequence[dict], unattributed_seconds: dict[str, float]
) -> dict[str, Any]:
    """Put the training's part into report.json and return the whole; what others wrote there stays.

    `rest`: seconds by part that no entry of the history has.
    """
    path = workdir / "report.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    entries = [StageStats(**entry) for entry in history]
    report |= {
        "config": json.loads(to_json(experiment)),
        "stages": [entry.report() for entry in entries],
        "speed": report.get("speed", {}) | throughput(entries),
        "seconds": total_seconds(entries, unattributed_seconds, report.get("seconds", {}).get("evaluate", 0.0)),
        "environment": environment(),
    }
    if jax.process_index() == 0:
        write_text_atomic(path, json.dumps(report, indent=1) + "\n")
    return report


def add_evaluation_seconds(workdir: Path, seconds: float) -> None:
    """Count time in which a run's model was asked questions: in report.json, and in the last line of metrics."""
    if jax.process_index():
        return
    path, lines = workdir / "report.json", read_jsonl(workdir / "metrics.jsonl")
    report = json.loads(path.read_text())
    parts = report.setdefault("seconds", {})
    parts["evaluate"] = round(parts.get("evaluate", 0.0) + seconds, 3)
    write_text_atomic(path, json.dumps(report, indent=1) + "\n")
    if lines:
        parts = lines[-1].setdefault("seconds", {})
        parts["evaluate"] = round(parts.get("evaluate", 0.0) + seconds, 6)
        write_text_atomic(workdir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def total_seconds(
    entries: list[StageStats],
    unattributed_seconds: Mapping[str, float] = MappingProxyType({}),
    evaluation_seconds: float = 0.0,
) -> dict[str, float]:
    """Where the time of all stages went, by part; `rest` is not of a stage."""
    sums = {"evaluate": evaluation_seconds} if evaluation_seconds else {}
    for seconds_by_part in (*(entry.seconds for entry in entries), unattributed_seconds):
        for part, seconds in seconds_by_part.items():
            sums[part] = sums.get(part, 0.0) + seconds
    return {part: round(seconds, 3) for part, seconds in sums.items()}


def throughput(entries: list[StageStats]) -> dict[str, float]:
    """Rates over all updates, compilation apart: a step's seconds are those of waiting for data and computing."""
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
    """The most memory that was in use: of a device, or of this process where the device is the CPU."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
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
