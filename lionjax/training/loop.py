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
from lionjax.training.init import ParamSpecs
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.optimizer import make_optimizer
from lionjax.training.resume import Position
from lionjax.training.run_folder import (
    check_or_write_config,
    describe_position,
    lock_workdir,
    to_state_dict,
    updates_before,
)
from lionjax.training.run_log import PhaseTimer, RunLogger, StageStats, downtime, write_report
from lionjax.training.validate import check_boxes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What all stages of a run share. `batches` makes the batches of a stage (see `train`); `example` is one."""

    experiment: Experiment
    workdir: Path
    make_batches: Callable
    example: Batch
    specs: ParamSpecs
    checkpoints: checkpoint.AsyncCheckpointManager
    logger: RunLogger
    stop: distributed.PreemptionHandler
    watchdog: distributed.Watchdog
    timer: PhaseTimer
    cache: feature_cache.FeatureCache

    @property
    def mesh(self) -> Mesh:
        return self.specs.mesh


def train(
    experiment: Experiment, workdir: str | Path, make_batches: Callable, start_time: float | None = None
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
    workdir, start_time = Path(workdir), time.time() if start_time is None else start_time
    clock = PhaseTimer(start_time)
    with (
        lock_workdir(workdir),
        checkpoint.explain_disk_full(workdir),
        distributed.PreemptionHandler() as stop,
        distributed.Watchdog(experiment.run.watchdog_seconds) as watch,
    ):
        check_or_write_config(workdir, experiment)
        mesh = sharding.make_mesh(experiment.mesh)
        with contextlib.closing(_open_batches(experiment, experiment.stages[0], make_batches, workdir, mesh)) as stream:
            example = next(stream)
        check_boxes(experiment.model, example)
        layout = init_layout(experiment, example, mesh)
        place = resume.restore_or_init(workdir, experiment, example, layout)
        for part, seconds in downtime(workdir, place.history, start_time).items():
            clock.add(part, seconds)
        update = updates_before(experiment, place.stage) + place.step
        with (
            checkpoint.AsyncCheckpointManager(workdir / "checkpoints", experiment.run.max_to_keep) as steps,
            RunLogger(workdir, experiment, update) as journal,
        ):
            memory = feature_cache.FeatureCache(int(experiment.run.feature_cache_gib * 2**30))
            run = RunContext(
                *(experiment, workdir, make_batches, example, layout, steps), *(journal, stop, watch, clock, memory)
            )
            rest: dict[str, float] = {}
            while place.stage < len(experiment.stages):
                place = run_stage(run, place)
                rest = clock.seconds
        report = write_report(workdir, experiment, place.history, rest)
        return trees.merge(place.frozen_params, place.trainable_params), report


def _open_batches(experiment: Experiment, stage: Stage, make_batches: Callable, workdir: Path, mesh: Mesh):
    data = experiment.data
    if getattr(data, "bad_records_path", None) == "":  # what is replaced is listed in the run's folder
        data = dataclasses.replace(data, bad_records_path=str(workdir / "bad_records.jsonl"))
    return make_batches(data, stage, experiment.seed, stage.batch_size, *sharding.process_shard(mesh))


def run_stage(run: RunContext, position: Position) -> Position:
    """From a place within a stage to the beginning of the next one."""
    stage, clock = run.experiment.stages[position.stage], run.timer
    run.watchdog.beat()
    clock.switch("start")
    entry, work = StageStats(**position.history[-1]) if position.step else StageStats(stage.name, 0), None
    while True:
        clock.rebind(entry.seconds)
        learned = position.trainable_params
        if stage.init_from == "scratch" and not position.step:
            learned = resume.load_first_base(run.workdir, run.experiment, run.specs)
        trainable, idle = trees.split(learned, stage.trainable)
        frozen = trees.merge(position.frozen_params, trees.cast(idle, run.experiment.run.frozen_dtype))
        before, entry.trainable_parameters = (checkpoint.leaf_checksums(frozen), trees.count_params(trainable))
        work = prepare_stage(run, position, trainable, frozen, work)
        try:
            with contextlib.closing(work.stream):
                state = train_steps(run, work, entry)
            break
        except bad_steps.Rewind as bad:
            position, entry = rewind(run, position, entry, bad)
    run.watchdog.beat()
    entry.frozen_unchanged = checkpoint.leaf_checksums(frozen) == before
    if not entry.frozen_unchanged:
        raise RuntimeError(f"stage {stage.name!r} changed frozen parameters")
    learned = trees.merge(state.trainable, idle)
    run.checkpoints.wait_until_finished()
    entry.behind["save"] = entry.behind.get("save", 0.0) + run.checkpoints.pop_save_seconds()
    clock.switch("save")
    entry.clock = time.time()
    history = (*position.history[: position.stage], dataclasses.asdict(entry))
    clock.seconds = {}  # what is still to be written counts with what comes after
    done = Position(position.stage + 1, 0, position.frozen_params, learned, position.frozen_id, history=history)
    resume.save_base(run.workdir, run.experiment, done)
    clock.switch("start")
    write_report(run.workdir, run.experiment, history, clock.seconds)
    return done


def rewind(
    run: RunContext, position: Position, stats: StageStats, bad: bad_steps.Rewind
) -> tuple[Position, StageStats]:
    """Where the last checkpoint stands, but for the data, which goes on behind the bad batch; and its entry.

    Time and rewinds are counted on. What is done anew after a kill comes to the same bad batch, and back to here.
    """
    run.checkpoints.wait_until_finished()
    back = resume.restore_or_init(run.workdir, run.experiment, run.example, run.specs)
    if back.stage != position.stage:
        raise UserError(f"no checkpoint of stage {stats.name!r} can be trusted any more; start the same command again")
    update = updates_before(run.experiment, back.stage) + back.step
    run.logger.truncate_after(update)
    known = StageStats(**back.history[-1]) if back.step else StageStats(stats.name, 0)
    run.timer.switch("start")
    lost = sum(run.timer.seconds.values()) - sum(known.seconds.values())
    known.seconds["lost"] = known.seconds.get("lost", 0.0) + max(0.0, lost)
    known.rewinds, known.compilations = stats.rewinds + 1, stats.compilations
    run.timer.seconds = {}
    return dataclasses.replace(back, data=bad.position), known


@dataclasses.dataclass(frozen=True)
class StageRun:
    """What the updates of a stage are made with. `state` is where they begin, and is used up by the first.

    `traces` grows by one with each compilation of `step`.
    """

    position: Position
    stage: Stage
    state: stages.TrainState
    frozen: Params
    step: Callable
    stream: Any
    traces: list


def prepare_stage(
    run: RunContext, position: Position, trainable: Params, frozen: Params, previous: StageRun | None = None
) -> StageRun:
    """All that a stage needs, where `place` says that it stands; `before`: what it had there, already compiled."""
    experiment, mesh, traces = run.experiment, run.mesh, previous.traces if previous else []
    stage = experiment.stages[position.stage]
    system = stages.model_for_stage(experiment, stage)
    rule = make_optimizer(stage, trainable, run.specs.layer_axes)
    state = stages.init_train_state(rule, trainable, mesh)
    if position.step:
        step = jax.device_put(np.int32(position.step), state.step.sharding)
        state = stages.TrainState(step, trainable, position.opt_state)
    key = jax.random.fold_in(jax.random.key(experiment.seed), position.stage + 1)
    step = previous.step if previous else None
    step = step or stages.make_train_step(system, stage, rule, key, state, mesh, traces)
    stream = _open_batches(experiment, stage, run.make_batches, run.workdir, mesh)
    if position.data_position is not None:
        stream.restore(position.data_position)
    if experiment.run.cache_features or experiment.run.feature_cache_dir:
        stream = with_feature_cache(run, position, system, stream)
    return StageRun(position, stage, state, frozen, step, stream, traces)


def with_feature_cache(run: RunContext, position: Position, model: Any, stream: Any) -> feature_cache.CachedBatches:
    """The stream with features, in memory and, where the config names a folder, in files."""
    if stream.random_augmentation:
        raise UserError("run.cache_features is set, but a record's picture changes; set one of the two off")
    see = feature_cache.make_feature_fn(model, position.frozen_params, position.trainable_params, run.mesh)
    folder = run.experiment.run.feature_cache_dir

    def files_for(batch: Batch) -> feature_store.FeatureStore:
        sight = feature_store.make_feature_spec(model, position.frozen_params, position.trainable_params, batch)
        return feature_store.FeatureStore(Path(folder), sight)

    return feature_cache.CachedBatches(stream, see, run.cache, files_for if folder else None)


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """One update that was sent off, and its metrics, which may still be on their way.

    `number` counts in its stage, `count` from the first stage on; `position` is the place in the data behind it,
    where the run may have to go on there.
    """

    stage_step: int
    global_step: int
    batch: Batch
    data_position: Any
    metrics: dict[str, Any]


def train_steps(run: RunContext, stage_run: StageRun, stats: StageStats) -> stages.TrainState:
    """The updates of a stage that are left, counted in `entry`."""
    every, stage, state, clock = run.experiment.run, stage_run.stage, stage_run.state, run.timer
    earlier = updates_before(run.experiment, stage_run.position.stage)
    run.logger.start_stage(stage.name, stage.steps, stage_run.position.step)
    sent: collections.deque = collections.deque()
    done = saved = stage_run.position.step
    told = StreamCounters()
    while done < stage.steps and not run.stop.should_stop():
        run.watchdog.beat(compiled=bool(stage_run.traces))
        clock.switch("data")
        batch = next(stage_run.stream)
        clock.switch("step")
        most, known = bad_steps.loss_threshold(stats, every, done + 1), len(stage_run.traces)
        state, metrics = stage_run.step(state, stage_run.frozen, sharding.shard_batch(batch, run.mesh), most)
        if len(stage_run.traces) > known:
            clock.switch("step", relabel_as="compile")
        stats.compilations += len(stage_run.traces) - known
        done += 1
        behind = stage_run.stream.position() if every.on_bad_step == "rewind" else None
        sent.append(InFlightStep(done, earlier + done, batch, behind, metrics))
        logs = done in (1, stage.steps) or is_due(done, every.log_every)
        saves = done < stage.steps and is_due(done, every.save_every)
        # One update stays on its way, so that the device never waits for us.
        drain(run, stage_run, sent, stats, 0 if logs or saves else 1)
        run.logger.update_progress(done)
        clock.switch("log")
        told.add_background_seconds(stats, stage_run.stream, run.checkpoints)
        if logs:
            told.add_bad_records(stats, stage_run.stream)
            run.logger.write_metrics(metrics_line(run, stage_run, stats, done, metrics), stage.steps)
            run.checkpoints.check_for_errors()
        if saves:
            clock.switch("save")
            save_checkpoint(run, stage_run, done, state, stats)
            saved = done
    clock.switch("step")
    drain(run, stage_run, sent, stats, 0)
    clock.switch("save")
    if run.stop.received_signal is not None and done < stage.steps:
        if done > saved:
            save_checkpoint(run, stage_run, done, state, stats)
        run.checkpoints.wait_until_finished()
        where = describe_position(run.experiment, stage_run.position.stage, done)
        run.logger.print_message(f"stopped and saved at {where}; the same command goes on from there")
        run.stop.exit_process()
    return state


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class StreamCounters:
    """What a stream and the saving have done by themselves, brought into an entry as it grows."""

    def __init__(self):
        self.batch_seconds = self.bad = 0.0

    def add_background_seconds(
        self, stats: StageStats, stream: Any, checkpoints: checkpoint.AsyncCheckpointManager
    ) -> None:
        made = getattr(stream, "load_seconds", 0.0)
        for part, seconds in (("data", made - self.batch_seconds), ("save", checkpoints.pop_save_seconds())):
            stats.behind[part] = stats.behind.get(part, 0.0) + seconds
        self.batch_seconds = made

    def add_bad_records(self, stats: StageStats, stream: Any) -> None:
        """Records that were replaced, of all processes; each must call this as often as the others."""
        (bad,) = distributed.sum_across_processes(getattr(stream, "num_bad_records", 0))
        stats.bad_records, self.bad = stats.bad_records + int(bad - self.bad), bad


def drain(
    run: RunContext, stage_run: StageRun, in_flight: collections.deque, stats: StageStats, max_in_flight: int
) -> None:
    """Wait for all but the last `leave` updates sent, and count them; see `refused.met` for those not accepted."""
    while len(in_flight) > max_in_flight:
        update = in_flight.popleft()
        metrics = {name: update.metrics[name] for name in ("accepted", "loss", "grad_norm")}
        metrics = jax.device_get(metrics)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not metrics["accepted"]:
            every, name = run.experiment.run, stage_run.stream.name
            bad_steps.handle_bad_step(run.workdir, every, stats, update, name, loss, norm)
            continue
        batch, shares = update.batch, sharding.process_shard(run.mesh)[1]
        tokens = int(np.sum(batch.prompt_mask_BL) + np.sum(batch.target_mask_BM))
        stats.add_update(loss, len(batch.record_B) * shares, tokens * shares)


def metrics_line(run: RunContext, stage_run: StageRun, stats: StageStats, step: int, metrics: dict) -> dict[str, Any]:
    """The line of metrics of an update; rates and seconds are those since the line before.

    An update that was not accepted has none of the system's metrics.
    """
    last = stats.logged or {"seconds": {}, "images": 0, "tokens": 0}
    seconds = {part: value - last["seconds"].get(part, 0.0) for part, value in stats.seconds.items()}
    busy = max(seconds.get("step", 0.0) + seconds.get("data", 0.0), 1e-9)
    values = jax.device_get(metrics)
    accepted = values.pop("accepted")
    counts = {name: getattr(stats, name) for name in ("skipped", "rewinds", "bad_records")}
    images, tokens = stats.images - last["images"], stats.tokens - last["tokens"]
    stats.logged = {"seconds": dict(stats.seconds), "images": stats.images, "tokens": stats.tokens}
    return {
        "stage": stats.name,
        "step": step,
        "update": updates_before(run.experiment, stage_run.position.stage) + step,
        **({name: float(value) for name, value in values.items()} if accepted else {}),
        "learning_rate": float(values["learning_rate"]),
        **{name: count for name, count in counts.items() if count},
        "images_per_second": images / busy,
        "tokens_per_second": tokens / busy,
        "seconds": {part: round(value, 6) for part, value in seconds.items() if value},
    }


def save_checkpoint(
    run: RunContext, stage_run: StageRun, step: int, state: stages.TrainState, stats: StageStats
) -> None:
    """Begin to save where a stage stands; the frozen parameters are only pointed at."""
    place = stage_run.position
    stats.clock = time.time()
    meta = {
        "stage": place.stage,
        "step": step,
        "data": stage_run.stream.position(),
        "seed": run.experiment.seed,
        "frozen": place.frozen_id,
        "history": [*place.history[: place.stage], dataclasses.asdict(stats)],
        "score": [place.stage, stats.recent_mean_loss],
    }
    items = {"trainable": state.trainable, "optimiser": to_state_dict(state.opt_state)}
    run.checkpoints.save(updates_before(run.experiment, place.stage) + step, items, meta)
