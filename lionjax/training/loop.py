# SPDX-License-Identifier: Apache-2.0
"""The run: stage after stage, each a plain loop of updates with a log, a save and a stop in it.

Started again on the same folder it goes on where that stands, with the same batches, the same dropout and so the same
numbers, bit for bit on the same mesh.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import params as trees
from lionjax import sharding
from lionjax.config import Experiment, Stage
from lionjax.interfaces import Batch, Params, UserError
from lionjax.training import checkpoints, features, stages, start
from lionjax.training.journal import Clock, Entry, Journal, write_report
from lionjax.training.start import Layout, Place

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share. `batches` makes the batches of a stage (see `train`)."""

    experiment: Experiment
    workdir: Path
    batches: Callable
    layout: Layout
    steps: checkpoints.Steps
    journal: Journal
    stop: Stop
    memory: features.Memory

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh


def train(experiment: Experiment, workdir: str | Path, batches: Callable) -> tuple[Params, dict]:
    """Run all stages in a folder, or what is left of them: (parameters, report).

    `batches(data, stage, seed, batch_size, process_index, process_count)` gives an iterator of numpy batches with
    `position() -> JSON-able`, `restore(position)`, `name(record)` and `close()`, such as `data.pipeline.batches`.
    SIGTERM saves and ends the process with code 0, Ctrl-C saves and raises KeyboardInterrupt.
    Raises UserError for what a person can mend: a config that does not fit the folder or the system, a loss that is
    not finite, a full disk.
    """
    workdir = Path(workdir)
    with start.alone(workdir), checkpoints.disk_errors(workdir), Stop() as stop:
        start.claim(workdir, experiment)
        checkpoints.clean(workdir)
        mesh = sharding.make_mesh(experiment.mesh)
        with contextlib.closing(_batches(experiment, experiment.stages[0], batches)) as stream:
            example = next(stream)
        layout = start.layout(experiment, example, mesh)
        place = start.find(workdir, experiment, example, layout)
        update = start.updates_before(experiment, place.stage) + place.step
        with (
            checkpoints.Steps(workdir / "checkpoints", experiment.run.keep) as steps,
            Journal(workdir, experiment, update) as journal,
        ):
            memory = features.Memory(int(experiment.run.cache_gib * 2**30))
            run = Run(experiment, workdir, batches, layout, steps, journal, stop, memory)
            while place.stage < len(experiment.stages):
                place = run_stage(run, place)
        return trees.merge(place.never, place.learned), write_report(
            workdir, experiment, place.history
        )


def _batches(experiment: Experiment, stage: Stage, batches: Callable):
    where = jax.process_index(), jax.process_count()
    return batches(experiment.data, stage, experiment.seed, stage.batch_size, *where)


def run_stage(run: Run, place: Place) -> Place:
    """From a place within a stage to the beginning of the next one."""
    experiment, stage, learned = run.experiment, run.experiment.stages[place.stage], place.learned
    if stage.start == "scratch" and not place.step:
        learned = start.first_base(run.workdir, experiment, run.layout)
    trainable, idle = trees.split(learned, stage.trainable)
    frozen = trees.merge(place.never, trees.cast(idle, experiment.run.frozen_dtype))
    before = checkpoints.fingerprints(frozen)
    entry = Entry(**place.history[-1]) if place.step else Entry(stage.name, trees.count(trainable))
    earlier = place.history[: place.stage]

    work = prepare(run, dataclasses.replace(place, history=earlier), trainable, frozen)
    with contextlib.closing(work.stream):
        state = updates(run, work, entry)

    entry.frozen_unchanged = checkpoints.fingerprints(frozen) == before
    if not entry.frozen_unchanged:
        raise RuntimeError(f"stage {stage.name!r} changed frozen parameters")
    history = (*earlier, dataclasses.asdict(entry))
    learned = trees.merge(state.trainable, idle)
    done = Place(place.stage + 1, 0, place.never, learned, place.frozen, history=history)
    run.steps.wait()
    start.write_base(run.workdir, experiment, done)
    write_report(run.workdir, experiment, history)
    return done


@dataclasses.dataclass(frozen=True)
class Work:
    """What the updates of a stage are made with. `state` is where they begin, and is used up by the first.

    `traces` grows by one with each compilation of `step`.
    """

    place: Place
    stage: Stage
    state: stages.State
    frozen: Params
    step: Callable
    stream: Any
    traces: list


def prepare(run: Run, place: Place, trainable: Params, frozen: Params) -> Work:
    """All that a stage needs, where `place` says that it stands."""
    experiment, mesh, traces = run.experiment, run.mesh, []
    stage = experiment.stages[place.stage]
    system = stages.system_of(experiment, stage)
    rule = stages.optimizer(stage, trainable, run.layout.layer_axes)
    state = stages.start(rule, trainable, mesh)
    if place.step:
        step = jax.device_put(np.int32(place.step), state.step.sharding)
        state = stages.State(step, trainable, place.optimiser)
    key = jax.random.fold_in(jax.random.key(experiment.seed), place.stage + 1)
    step = stages.make_step(system, stage, rule, key, state, mesh, traces)
    stream = _batches(experiment, stage, run.batches)
    if place.data is not None:
        stream.restore(place.data)
    if experiment.run.cache_features:
        if stream.changing:
            raise UserError(
                "run.cache_features is set, but a record's picture changes; set one of the two off"
            )
        see = features.seer(system, place.never, place.learned, mesh)
        stream = features.Remembered(stream, see, run.memory)
    return Work(place, stage, state, frozen, step, stream, traces)


@dataclasses.dataclass(frozen=True)
class Update:
    """One update that was sent off: its number, its batch, and its metrics, which may still be on their way."""

    number: int
    batch: Batch
    metrics: dict[str, Any]


def updates(run: Run, work: Work, entry: Entry) -> stages.State:
    """The updates of a stage that are left, counted in `entry`."""
    every, stage, state, traces = run.experiment.run, work.stage, work.state, work.traces
    run.journal.begin(stage.name, stage.steps, work.place.step)
    clock, last, sent = Clock(entry.seconds), dataclasses.asdict(entry), collections.deque()
    done = saved = work.place.step
    while done < stage.steps and not run.stop.heard:
        with clock("data"):
            batch = next(work.stream)
        began, known = time.perf_counter(), len(traces)
        state, metrics = work.step(state, work.frozen, sharding.put_batch(batch, run.mesh))
        clock.add("step" if len(traces) == known else "compile", time.perf_counter() - began)
        entry.compilations += len(traces) - known
        done += 1
        sent.append(Update(done, batch, metrics))
        logs = done in (1, stage.steps) or is_due(done, every.log_every)
        saves = done < stage.steps and is_due(done, every.save_every)
        with clock("step"):  # one update stays on its way, so that the device never waits for us
            settle(run, work, sent, entry, 0 if logs or saves or run.stop.heard else 1)
        run.journal.advance(done)
        if logs:
            run.journal.line(line(run, work, entry, last, done, metrics), stage.steps)
            last = dataclasses.asdict(entry)
            run.steps.check()
        if saves:
            with clock("save"):
                save(run, work, done, state, entry)
            saved = done
    settle(run, work, sent, entry, 0)
    if run.stop.heard and done < stage.steps:
        if done > saved:
            save(run, work, done, state, entry)
        run.steps.wait()
        run.stop.leave(run.journal, start.words(run.experiment, work.place.stage, done))
    return state


def is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def settle(run: Run, work: Work, sent: collections.deque, entry: Entry, leave: int) -> None:
    """Wait for all but the last `leave` updates sent, and count them. Raises UserError at one that is not finite."""
    while len(sent) > leave:
        update = sent.popleft()
        metrics = {name: update.metrics[name] for name in ("finite", "loss", "grad_norm")}
        metrics = jax.device_get(metrics)
        if not metrics["finite"]:
            refuse(run, work, update, float(metrics["loss"]), float(metrics["grad_norm"]))
        batch, processes = update.batch, jax.process_count()
        tokens = int(np.sum(batch.prompt_mask_BL) + np.sum(batch.target_mask_BM))
        entry.add(float(metrics["loss"]), len(batch.record_B) * processes, tokens * processes)


def refuse(run: Run, work: Work, update: Update, loss: float, norm: float) -> None:
    """Keep the batch of an update that came out infinite or NaN, and raise UserError about it."""
    path = run.workdir / f"not_finite_{start.file_name(work.stage.name)}_{update.number}.npz"
    pairs = jax.tree_util.tree_flatten_with_path(update.batch)[0]
    arrays = {
        jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(x) for at, x in pairs
    }
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".tmp").replace(path)
    records = [
        f"{record} ({work.stream.name(record)})"
        for record in sorted(set(update.batch.record_B.tolist()))
    ]
    raise UserError(
        f"stage {work.stage.name!r}, step {update.number}: the loss is {loss:g} and the norm of its gradient {norm:g}, "
        f"on records {', '.join(records)}; the batch is kept in {path}, the checkpoints before it are good: look at "
        "these records or lower the learning rate"
    )


def line(
    run: Run, work: Work, entry: Entry, last: dict, done: int, metrics: dict
) -> dict[str, Any]:
    """The line of metrics of an update; rates and seconds are those since `last`, the entry at the last line."""
    seconds = {
        part: value - last["seconds"].get(part, 0.0) for part, value in entry.seconds.items()
    }
    busy = max(seconds.get("step", 0.0) + seconds.get("data", 0.0), 1e-9)
    values = {
        name: float(value) for name, value in jax.device_get(metrics).items() if name != "finite"
    }
    return {
        "stage": entry.name,
        "step": done,
        "update": start.updates_before(run.experiment, work.place.stage) + done,
        **values,
        "images_per_second": (entry.images - last["images"]) / busy,
        "tokens_per_second": (entry.tokens - last["tokens"]) / busy,
        "seconds": {part: round(value, 6) for part, value in seconds.items()},
    }


def save(run: Run, work: Work, done: int, state: stages.State, entry: Entry) -> None:
    """Begin to save where a stage stands; the frozen parameters are only pointed at."""
    place = work.place
    meta = {
        "stage": place.stage,
        "step": done,
        "data": work.stream.position(),
        "seed": run.experiment.seed,
        "frozen": place.frozen,
        "history": [*place.history, dataclasses.asdict(entry)],
        "score": [place.stage, entry.loss],
    }
    items = {"trainable": state.trainable, "optimiser": start.as_dict(state.optimiser)}
    run.steps.save(start.updates_before(run.experiment, place.stage) + done, items, meta)


class Stop:
    """SIGTERM and Ctrl-C as a note that the loop reads: `with Stop() as stop: ... if stop.heard: ...`.

    A second one acts at once, as it would without us.
    """

    def __init__(self):
        self.heard: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self.note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        self.heard = number
        signal.signal(number, self.before[number])

    def leave(self, journal: Journal, where: str) -> None:
        """End the run, whose state is on disk: code 0 after SIGTERM, KeyboardInterrupt after Ctrl-C."""
        journal.say(f"stopped and saved at {where}; the same command goes on from there")
        if self.heard == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)
