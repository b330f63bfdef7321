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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.types import Batch, Params, UserError
from lionjax.training import bad_steps, checkpoint, distributed, feature_cache, feature_store, resume
from lionjax.training import step as stages
from lionjax.training.init import Layout
from lionjax.training.init import layout as init_layout
from lionjax.training.optimizer import optimizer
from lionjax.training.resume import Place
from lionjax.training.run_folder import alone, as_dict, claim, updates_before, words
from lionjax.training.run_log import Clock, Entry, Journal, missed, write_report
from lionjax.training.validate import check_boxes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share. `batches` makes the batches of a stage (see `train`); `example` is one."""

    experiment: Experiment
    workdir: Path
    batches: Callable
    example: Batch
    layout: Layout
    steps: checkpoint.Steps
    journal: Journal
    stop: distributed.Stop
    watch: distributed.Watch
    clock: Clock
    memory: feature_cache.Memory

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh


def train(
    experiment: Experiment, workdir: str | Path, batches: Callable, began: float | None = None
) -> tuple[Params, dict]:
    """Run all stages in a folder, or what is left of them: (parameters, report).

    `batches(data, stage, seed, batch_size, process_index, process_count)` gives an iterator of numpy batches with
    `position() -> JSON-able`, `restore(position)`, `name(record)` and `close()`, such as `data.pipeline.batches`.
    `began`: when the command was given (as of `time.time`), for the account of where time went.
    SIGTERM saves and ends the process with code 0, Ctrl-C saves and raises KeyboardInterrupt. As one of several
    processes (see `distributed.together`) it does so with the others.
    Raises UserError for what a person can mend: a config that does not fit the folder or the system, a loss that is
    not finite, a full disk.
    """
    workdir, began = Path(workdir), time.time() if began is None else began
    clock = Clock(began)
    with (
        alone(workdir),
        checkpoint.disk_errors(workdir),
        distributed.Stop() as stop,
        distributed.Watch(experiment.run.stuck_seconds) as watch,
    ):
        claim(workdir, experiment)
        mesh = sharding.make_mesh(experiment.mesh)
        with contextlib.closing(_batches(experiment, experiment.stages[0], batches, workdir, mesh)) as stream:
            example = next(stream)
        check_boxes(experiment.system, example)
        layout = init_layout(experiment, example, mesh)
        place = resume.find(workdir, experiment, example, layout)
        for part, seconds in missed(workdir, place.history, began).items():
            clock.add(part, seconds)
        update = updates_before(experiment, place.stage) + place.step
        with (
            checkpoint.Steps(workdir / "checkpoints", experiment.run.keep) as steps,
            Journal(workdir, experiment, update) as journal,
        ):
            memory = feature_cache.Memory(int(experiment.run.cache_gib * 2**30))
            run = Run(*(experiment, workdir, batches, example, layout, steps), *(journal, stop, watch, clock, memory))
            rest: dict[str, float] = {}
            while place.stage < len(experiment.stages):
                place = run_stage(run, place)
                rest = clock.seconds
        report = write_report(workdir, experiment, place.history, rest)
        return trees.merge(place.never, place.learned), report


def _batches(experiment: Experiment, stage: Stage, batches: Callable, workdir: Path, mesh: Mesh):
    data = experiment.data
    if getattr(data, "quarantine", None) == "":  # what is replaced is listed in the run's folder
        data = dataclasses.replace(data, quarantine=str(workdir / "bad_records.jsonl"))
    return batches(data, stage, experiment.seed, stage.batch_size, *sharding.share(mesh))


def run_stage(run: Run, place: Place) -> Place:
    """From a place within a stage to the beginning of the next one."""
    stage, clock = run.experiment.stages[place.stage], run.clock
    run.watch.alive()
    clock.turn("start")
    entry, work = Entry(**place.history[-1]) if place.step else Entry(stage.name, 0), None
    while True:
        clock.into(entry.seconds)
        learned = place.learned
        if stage.start == "scratch" and not place.step:
            learned = resume.first_base(run.workdir, run.experiment, run.layout)
        trainable, idle = trees.split(learned, stage.trainable)
        frozen = trees.merge(place.never, trees.cast(idle, run.experiment.run.frozen_dtype))
        before, entry.trainable_parameters = (checkpoint.fingerprints(frozen), trees.count(trainable))
        work = prepare(run, place, trainable, frozen, work)
        try:
            with contextlib.closing(work.stream):
                state = updates(run, work, entry)
            break
        except bad_steps.Rewind as bad:
            place, entry = rewound(run, place, entry, bad)
    run.watch.alive()
    entry.frozen_unchanged = checkpoint.fingerprints(frozen) == before
    if not entry.frozen_unchanged:
        raise RuntimeError(f"stage {stage.name!r} changed frozen parameters")
    learned = trees.merge(state.trainable, idle)
    run.steps.wait()
    entry.behind["save"] = entry.behind.get("save", 0.0) + run.steps.finished()
    clock.turn("save")
    entry.clock = time.time()
    history = (*place.history[: place.stage], dataclasses.asdict(entry))
    clock.seconds = {}  # what is still to be written counts with what comes after
    done = Place(place.stage + 1, 0, place.never, learned, place.frozen, history=history)
    resume.write_base(run.workdir, run.experiment, done)
    clock.turn("start")
    write_report(run.workdir, run.experiment, history, clock.seconds)
    return done


def rewound(run: Run, place: Place, entry: Entry, bad: bad_steps.Rewind) -> tuple[Place, Entry]:
    """Where the last checkpoint stands, but for the data, which goes on behind the bad batch; and its entry.

    Time and rewinds are counted on. What is done anew after a kill comes to the same bad batch, and back to here.
    """
    run.steps.wait()
    back = resume.find(run.workdir, run.experiment, run.example, run.layout)
    if back.stage != place.stage:
        raise UserError(f"no checkpoint of stage {entry.name!r} can be trusted any more; start the same command again")
    update = updates_before(run.experiment, back.stage) + back.step
    run.journal.drop_after(update)
    known = Entry(**back.history[-1]) if back.step else Entry(entry.name, 0)
    run.clock.turn("start")
    lost = sum(run.clock.seconds.values()) - sum(known.seconds.values())
    known.seconds["lost"] = known.seconds.get("lost", 0.0) + max(0.0, lost)
    known.rewinds, known.compilations = entry.rewinds + 1, entry.compilations
    run.clock.seconds = {}
    return dataclasses.replace(back, data=bad.position), known


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


def prepare(run: Run, place: Place, trainable: Params, frozen: Params, before: Work | None = None) -> Work:
    """All that a stage needs, where `place` says that it stands; `before`: what it had there, already compiled."""
    experiment, mesh, traces = run.experiment, run.mesh, before.traces if before else []
    stage = experiment.stages[place.stage]
    system = stages.system_of(experiment, stage)
    rule = optimizer(stage, trainable, run.layout.layer_axes)
    state = stages.start(rule, trainable, mesh)
    if place.step:
        step = jax.device_put(np.int32(place.step), state.step.sharding)
        state = stages.State(step, trainable, place.optimiser)
    key = jax.random.fold_in(jax.random.key(experiment.seed), place.stage + 1)
    step = before.step if before else None
    step = step or stages.make_step(system, stage, rule, key, state, mesh, traces)
    stream = _batches(experiment, stage, run.batches, run.workdir, mesh)
    if place.data is not None:
        stream.restore(place.data)
    if experiment.run.cache_features or experiment.run.features_dir:
        stream = remembered(run, place, system, stream)
    return Work(place, stage, state, frozen, step, stream, traces)


def remembered(run: Run, place: Place, system: Any, stream: Any) -> feature_cache.Remembered:
    """The stream with features, in memory and, where the config names a folder, in files."""
    if stream.changing:
        raise UserError("run.cache_features is set, but a record's picture changes; set one of the two off")
    see = feature_cache.seer(system, place.never, place.learned, run.mesh)
    folder = run.experiment.run.features_dir

    def files_for(batch: Batch) -> feature_store.Files:
        sight = feature_store.sight(system, place.never, place.learned, batch)
        return feature_store.Files(Path(folder), sight)

    return feature_cache.Remembered(stream, see, run.memory, files_for if folder else None)


@dataclasses.dataclass(frozen=True)
class Update:
    """One update that was sent off, and its metrics, which may still be on their way.

    `number` counts in its stage, `count` from the first stage on; `position` is the place in the data behind it,
    where the run may have to go on there.
    """

    number: int
    count: int
    batch: Batch
    position: Any
    metrics: dict[str, Any]


def updates(run: Run, work: Work, entry: Entry) -> stages.State:
    """The updates of a stage that are left, counted in `entry`."""
    every, stage, state, clock = run.experiment.run, work.stage, work.state, run.clock
    earlier = updates_before(run.experiment, work.place.stage)
    run.journal.begin(stage.name, stage.steps, work.place.step)
    sent: collections.deque = collections.deque()
    done = saved = work.place.step
    told = Told()
    while done < stage.steps and not run.stop.asked():
        run.watch.alive(compiled=bool(work.traces))
        clock.turn("data")
        batch = next(work.stream)
        clock.turn("step")
        most, known = bad_steps.most(entry, every, done + 1), len(work.traces)
        state, metrics = work.step(state, work.frozen, sharding.put_batch(batch, run.mesh), most)
        if len(work.traces) > known:
            clock.turn("step", was="compile")
        entry.compilations += len(work.traces) - known
        done += 1
        behind = work.stream.position() if every.on_bad_update == "rewind" else None
        sent.append(Update(done, earlier + done, batch, behind, metrics))
        logs = done in (1, stage.steps) or is_due(done, every.log_every)
        saves = done < stage.steps and is_due(done, every.save_every)
        # One update stays on its way, so that the device never waits for us.
        settle(run, work, sent, entry, 0 if logs or saves else 1)
        run.journal.advance(done)
        clock.turn("log")
        told.count(entry, work.stream, run.steps)
        if logs:
            told.records(entry, work.stream)
            run.journal.line(line(run, work, entry, done, metrics), stage.steps)
            run.steps.check()
        if saves:
            clock.turn("save")
            save(run, work, done, state, entry)
            saved = done
    clock.turn("step")
    settle(run, work, sent, entry, 0)
    clock.turn("save")
    if run.stop.heard is not None and done < stage.steps:
        if done > saved:
            save(run, work, done, state, entry)
        run.steps.wait()
        where = words(run.experiment, work.place.stage, done)
        run.journal.say(f"stopped and saved at {where}; the same command goes on from there")
        run.stop.leave()
    return state


def is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class Told:
    """What a stream and the saving have done by themselves, brought into an entry as it grows."""

    def __init__(self):
        self.made = self.bad = 0.0

    def count(self, entry: Entry, stream: Any, steps: checkpoint.Steps) -> None:
        made = getattr(stream, "made_seconds", 0.0)
        for part, seconds in (("data", made - self.made), ("save", steps.finished())):
            entry.behind[part] = entry.behind.get(part, 0.0) + seconds
        self.made = made

    def records(self, entry: Entry, stream: Any) -> None:
        """Records that were replaced, of all processes; each must call this as often as the others."""
        (bad,) = distributed.sum_of(getattr(stream, "bad", 0))
        entry.bad_records, self.bad = entry.bad_records + int(bad - self.bad), bad


def settle(run: Run, work: Work, sent: collections.deque, entry: Entry, leave: int) -> None:
    """Wait for all but the last `leave` updates sent, and count them; see `refused.met` for those not accepted."""
    while len(sent) > leave:
        update = sent.popleft()
        metrics = {name: update.metrics[name] for name in ("accepted", "loss", "grad_norm")}
        metrics = jax.device_get(metrics)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not metrics["accepted"]:
            every, name = run.experiment.run, work.stream.name
            bad_steps.met(run.workdir, every, entry, update, name, loss, norm)
            continue
        batch, shares = update.batch, sharding.share(run.mesh)[1]
        tokens = int(np.sum(batch.prompt_mask_BL) + np.sum(batch.target_mask_BM))
        entry.add(loss, len(batch.record_B) * shares, tokens * shares)


def line(run: Run, work: Work, entry: Entry, done: int, metrics: dict) -> dict[str, Any]:
    """The line of metrics of an update; rates and seconds are those since the line before.

    An update that was not accepted has none of the system's metrics.
    """
    last = entry.logged or {"seconds": {}, "images": 0, "tokens": 0}
    seconds = {part: value - last["seconds"].get(part, 0.0) for part, value in entry.seconds.items()}
    busy = max(seconds.get("step", 0.0) + seconds.get("data", 0.0), 1e-9)
    values = jax.device_get(metrics)
    accepted = values.pop("accepted")
    counts = {name: getattr(entry, name) for name in ("skipped", "rewinds", "bad_records")}
    images, tokens = entry.images - last["images"], entry.tokens - last["tokens"]
    entry.logged = {"seconds": dict(entry.seconds), "images": entry.images, "tokens": entry.tokens}
    return {
        "stage": entry.name,
        "step": done,
        "update": updates_before(run.experiment, work.place.stage) + done,
        **({name: float(value) for name, value in values.items()} if accepted else {}),
        "learning_rate": float(values["learning_rate"]),
        **{name: count for name, count in counts.items() if count},
        "images_per_second": images / busy,
        "tokens_per_second": tokens / busy,
        "seconds": {part: round(value, 6) for part, value in seconds.items() if value},
    }


def save(run: Run, work: Work, done: int, state: stages.State, entry: Entry) -> None:
    """Begin to save where a stage stands; the frozen parameters are only pointed at."""
    place = work.place
    entry.clock = time.time()
    meta = {
        "stage": place.stage,
        "step": done,
        "data": work.stream.position(),
        "seed": run.experiment.seed,
        "frozen": place.frozen,
        "history": [*place.history[: place.stage], dataclasses.asdict(entry)],
        "score": [place.stage, entry.loss],
    }
    items = {"trainable": state.trainable, "optimiser": as_dict(state.optimiser)}
    run.steps.save(updates_before(run.experiment, place.stage) + done, items, meta)
