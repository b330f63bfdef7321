# SPDX-License-Identifier: Apache-2.0
"""The training loop: runs the stages in order, with metrics, checkpoints, preemption and bad-step handling.

A run restarted in the same folder resumes with the same batches and dropout masks; on the same mesh the results are
bitwise equal.
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
from lionjax.core.errors import RetryError
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.types import Batch, Params, RowLayout
from lionjax.data import example_rows
from lionjax.data.config import DataConfig
from lionjax.data.regions_digest import with_regions_digest
from lionjax.training import (
    bad_steps,
    bucket_folder,
    checkpoint,
    compiled_programs,
    distributed,
    feature_cache,
    resume,
    streams,
)
from lionjax.training import step as stages
from lionjax.training.companions import save_companions
from lionjax.training.init import ParamSpecs, make_param_specs
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
from lionjax.training.trackers import Picture
from lionjax.training.validate import check_boxes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What all stages of a run share. `make_batches`: see `train`; `example`: a batch of numpy arrays."""

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
    evaluator: Callable | None = None

    @property
    def mesh(self) -> Mesh:
        return self.specs.mesh


def train(
    experiment: Experiment,
    workdir: str | Path,
    make_batches: Callable,
    start_time: float | None = None,
    evaluator: Callable | None = None,
) -> tuple[Params, dict]:
    """Run all stages in `workdir`, or resume there; returns (parameters, report). It may be gs://BUCKET/PATH.

    `make_batches(data, stage, seed, batch_size, process_index, process_count)` returns an iterator of numpy batches
    with `position()` (JSON-serializable), `restore(position)`, `name(record)` and `close()`, such as
    `data.pipeline.batches`. `start_time`: time.time() at the start of the command, for the time accounting.
    `evaluator(experiment, params, stage, is_end)` is asked every `run.evaluate_every` updates and at the end of each
    stage, such as `evaluation.progress.make_evaluator`: it returns pictures for the trackers (name, image, caption).
    SIGTERM saves a checkpoint and exits with code 0; Ctrl-C saves and raises KeyboardInterrupt. With several processes
    (see `distributed.distributed_session`) all stop after the same update.
    Raises UserError for a config that does not match the folder or the model, for bad steps according to
    `run.on_bad_step`, and for a full disk.
    """
    start_time, run_config = time.time() if start_time is None else start_time, experiment.run
    timer = PhaseTimer(start_time)
    if isinstance(experiment.data, DataConfig):
        experiment = dataclasses.replace(experiment, data=with_regions_digest(experiment.data))
    with (
        bucket_folder.opened(workdir) as workdir,
        lock_workdir(workdir),
        checkpoint.explain_disk_full(workdir),
        distributed.PreemptionHandler() as stop,
        distributed.Watchdog(run_config.watchdog_seconds) as watchdog,
        compiled_programs.cached_in(workdir),
    ):
        check_or_write_config(workdir, experiment)
        arrays = bucket_folder.arrays_folder(workdir)
        mesh = sharding.make_mesh(experiment.mesh)
        example = streams.open_all_stages(experiment, make_batches, workdir, mesh)
        check_boxes(experiment.model, example)
        specs = make_param_specs(experiment, example, mesh)
        if distributed.is_main_process():
            save_companions(workdir, experiment)
        position = resume.restore_or_init(workdir, experiment, example, specs)
        for phase, seconds in downtime(workdir, position.history, start_time).items():
            timer.add(phase, seconds)
        update, steps_folder = updates_before(experiment, position.stage) + position.step, arrays / "checkpoints"
        with (
            checkpoint.AsyncCheckpointManager(steps_folder, run_config.max_to_keep) as checkpoints,
            RunLogger(workdir, experiment, update) as logger,
        ):
            cache = feature_cache.FeatureCache(int(experiment.run.feature_cache_gib * 2**30))
            run = RunContext(
                *(experiment, workdir, make_batches, example, specs, checkpoints),
                *(logger, stop, watchdog, timer, cache, evaluator),
            )
            unattributed: dict[str, float] = {}
            while position.stage < len(experiment.stages):
                position = run_stage(run, position)
                unattributed = timer.seconds
        report = write_report(workdir, experiment, position.history, unattributed)
        return trees.merge(position.frozen_params, position.trainable_params), report


def run_stage(run: RunContext, position: Position) -> Position:
    """Run a stage from `position` to its end; returns the position at the start of the next stage."""
    stage, timer = run.experiment.stages[position.stage], run.timer
    run.watchdog.beat()
    timer.switch("start")
    stats = StageStats(**position.history[-1]) if position.step else StageStats(stage.name, 0)
    stage_run = None
    while True:
        timer.rebind(stats.seconds)
        learned = position.trainable_params
        if stage.init_from == "scratch" and not position.step:
            learned = resume.load_first_base(run.workdir, run.experiment, run.specs)
        trainable, idle = trees.split(learned, stage.trainable)
        frozen = trees.merge(position.frozen_params, trees.cast(idle, run.experiment.run.frozen_dtype))
        before, stats.trainable_parameters = (checkpoint.leaf_checksums(frozen), trees.count_params(trainable))
        stage_run = prepare_stage(run, position, trainable, frozen, stage_run)
        try:
            with contextlib.closing(stage_run.stream):
                state = train_steps(run, stage_run, stats)
            evaluate_progress(run, stage_run, state, stage.steps)
            break
        except bad_steps.Rewind as bad_step:
            position, stats = rewind(run, position, stats, bad_step)
    run.watchdog.beat()
    stats.frozen_unchanged = checkpoint.leaf_checksums(frozen) == before
    if not stats.frozen_unchanged:
        raise RuntimeError(f"stage {stage.name!r} changed frozen parameters")
    learned = trees.merge(state.trainable, idle)
    run.checkpoints.wait_until_finished()
    stats.behind["save"] = stats.behind.get("save", 0.0) + run.checkpoints.pop_save_seconds()
    timer.switch("save")
    stats.clock = time.time()
    history = (*position.history[: position.stage], dataclasses.asdict(stats))
    timer.seconds = {}  # the history is final: writing it counts towards the next stage
    end = Position(position.stage + 1, 0, position.frozen_params, learned, position.frozen_id, history=history)
    resume.save_base(run.workdir, run.experiment, end)
    timer.switch("start")
    write_report(run.workdir, run.experiment, history, timer.seconds)
    return end


def rewind(
    run: RunContext, position: Position, stats: StageStats, bad: bad_steps.Rewind
) -> tuple[Position, StageStats]:
    """The position of the last checkpoint with the data position after the bad batch, and its statistics.

    Lost time, rewinds and compilations are carried over from `stats`. If the process is killed before the next
    checkpoint, the resumed run meets the same bad batch and rewinds again.
    """
    run.checkpoints.wait_until_finished()
    restored = resume.restore_or_init(run.workdir, run.experiment, run.example, run.specs)
    if restored.stage != position.stage:
        raise RetryError(f"stage {stats.name!r} has no valid checkpoint any more; run the same command again")
    update = updates_before(run.experiment, restored.stage) + restored.step
    run.logger.truncate_after(update)
    restored_stats = StageStats(**restored.history[-1]) if restored.step else StageStats(stats.name, 0)
    run.timer.switch("start")
    lost = sum(run.timer.seconds.values()) - sum(restored_stats.seconds.values())
    restored_stats.seconds["lost"] = restored_stats.seconds.get("lost", 0.0) + max(0.0, lost)
    restored_stats.rewinds, restored_stats.compilations = stats.rewinds + 1, stats.compilations
    run.timer.seconds = {}
    return dataclasses.replace(restored, data_position=bad.position), restored_stats


@dataclasses.dataclass(frozen=True)
class StageRun:
    """Everything needed to train a stage. The first step donates (invalidates) `state`.

    `traces` grows by one item with each compilation of `step`. `row_layout`: of the stage's model.
    """

    position: Position
    stage: Stage
    state: stages.TrainState
    frozen: Params
    step: Callable
    stream: Any
    traces: list
    row_layout: RowLayout | None = None


def prepare_stage(
    run: RunContext, position: Position, trainable: Params, frozen: Params, previous: StageRun | None = None
) -> StageRun:
    """The StageRun from `position` on; after a rewind, `previous` provides the compiled step."""
    experiment, mesh, traces = run.experiment, run.mesh, previous.traces if previous else []
    stage = experiment.stages[position.stage]
    model = stages.model_for_stage(experiment, stage)
    tx = make_optimizer(stage, trainable, run.specs.layer_axes)
    state = stages.init_train_state(tx, trainable, mesh)
    if position.step:
        step = jax.device_put(np.int32(position.step), state.step.sharding)
        state = stages.TrainState(step, trainable, position.opt_state)
    key = jax.random.fold_in(jax.random.key(experiment.seed), position.stage + 1)
    step = previous.step if previous else None
    step = step or stages.make_train_step(model, stage, tx, key, state, mesh, traces)
    stream = streams.open_batches(experiment, stage, run.make_batches, run.workdir, mesh)
    if position.data_position is not None:
        stream.restore(position.data_position)
    if count_earlier := getattr(stream, "count_earlier", None):
        num_shards = sharding.process_shard(mesh)[1]
        count_earlier(
            *(sum(part[name] for part in position.history) / num_shards for name in ("images", "bad_records"))
        )
    if experiment.run.cache_features or experiment.run.feature_cache_dir:
        stream = streams.with_feature_cache(run, position, model, stream)
    stream = streams.with_example_rows(experiment, stage, model, stream)
    return StageRun(position, stage, state, frozen, step, stream, traces, model.info.row_layout)


@dataclasses.dataclass(frozen=True)
class InFlightStep:
    """A dispatched update; its metrics may still be computed on the device.

    `stage_step` counts the updates of the stage, `global_step` those from the first stage on. `data_position` is the
    stream's position after `batch`, or None unless `run.on_bad_step` is "rewind".
    """

    stage_step: int
    global_step: int
    batch: Batch
    data_position: Any
    metrics: dict[str, Any]


def train_steps(run: RunContext, stage_run: StageRun, stats: StageStats) -> stages.TrainState:
    """Run the remaining updates of a stage and count them in `stats`; returns the state after the last one."""
    config, stage, state, timer = run.experiment.run, stage_run.stage, stage_run.state, run.timer
    earlier = updates_before(run.experiment, stage_run.position.stage)
    run.logger.start_stage(stage.name, stage.steps, stage_run.position.step)
    in_flight: collections.deque = collections.deque()
    done = saved = stage_run.position.step
    is_last_stage = stage is run.experiment.stages[-1]
    counters = streams.StreamCounters()
    while done < stage.steps and not run.stop.should_stop():
        run.watchdog.beat(compiled=bool(stage_run.traces))
        timer.switch("data")
        batch = next(stage_run.stream)
        timer.switch("step")
        loss_threshold, num_traces = bad_steps.loss_threshold(stats, config, done + 1), len(stage_run.traces)
        state, metrics = stage_run.step(state, stage_run.frozen, sharding.shard_batch(batch, run.mesh), loss_threshold)
        if len(stage_run.traces) > num_traces:
            timer.switch("step", relabel_as="compile")
        stats.compilations += len(stage_run.traces) - num_traces
        done += 1
        data_position = stage_run.stream.position() if config.on_bad_step == "rewind" else None
        in_flight.append(InFlightStep(done, earlier + done, batch, data_position, metrics))
        logs = done in (1, stage.steps) or is_due(done, config.log_every)
        # The last stage also saves its end, from which it can be given more steps.
        saves = is_due(done, config.save_every) if done < stage.steps else is_last_stage
        # One update stays in flight, so that the device does not wait for the host.
        drain(run, stage_run, in_flight, stats, 0 if logs or saves else 1)
        run.logger.update_progress(done)
        timer.switch("log")
        counters.add_background_seconds(stats, stage_run.stream, run.checkpoints)
        if logs:
            counters.add_row_counts(stats, stage_run.stream)
            run.logger.write_metrics(metrics_line(run, stage_run, stats, done, metrics), stage.steps)
            run.checkpoints.check_for_errors()
        if saves:
            timer.switch("save")
            save_checkpoint(run, stage_run, done, state, stats)
            saved = done
        if is_due(done, config.evaluate_every) and done < stage.steps:
            evaluate_progress(run, stage_run, state, done)
    timer.switch("step")
    drain(run, stage_run, in_flight, stats, 0)
    timer.switch("save")
    if run.stop.received_signal is not None and done < stage.steps:
        if done > saved:
            save_checkpoint(run, stage_run, done, state, stats)
        run.checkpoints.wait_until_finished()
        position = describe_position(run.experiment, stage_run.position.stage, done)
        run.logger.print_message(f"stopped and saved at {position}; run the same command to resume")
        run.stop.exit_process()
    return state


def evaluate_progress(run: RunContext, stage_run: StageRun, state: stages.TrainState, step: int) -> None:
    """Ask the evaluator about the parameters after `step` updates of a stage; its pictures go to the trackers."""
    if run.evaluator is None:
        return
    run.watchdog.beat()  # answering compiles programs of its own
    run.timer.switch("evaluate")
    stage, params = stage_run.stage, trees.merge(stage_run.frozen, state.trainable)
    experiment = dataclasses.replace(run.experiment, model=stages.model_for_stage(run.experiment, stage))
    pictures = run.evaluator(experiment, params, stage.name, step == stage.steps)
    update = updates_before(run.experiment, stage_run.position.stage) + step
    run.logger.write_pictures([Picture(*picture) for picture in pictures], update)
    run.timer.switch("log")
    run.watchdog.beat()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def drain(
    run: RunContext, stage_run: StageRun, in_flight: collections.deque, stats: StageStats, max_in_flight: int
) -> None:
    """Wait for and count all but the last `max_in_flight` updates; see `bad_steps.handle_bad_step` for bad ones."""
    while len(in_flight) > max_in_flight:
        update = in_flight.popleft()
        metrics = {name: update.metrics[name] for name in ("accepted", "loss", "grad_norm")}
        metrics = jax.device_get(metrics)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not metrics["accepted"]:
            config, record_name = run.experiment.run, stage_run.stream.name
            bad_steps.handle_bad_step(run.workdir, config, stats, update, record_name, loss, norm)
            continue
        batch, num_shards = update.batch, sharding.process_shard(run.mesh)[1]
        tokens = streams.count_text_tokens(batch, stage_run.row_layout)
        stats.add_update(loss, np.size(batch.record_B) * num_shards, tokens * num_shards)
        used, positions = example_rows.count_row_tokens(batch, stage_run.row_layout)
        stats.add_row_tokens(used * num_shards, positions * num_shards)


def metrics_line(run: RunContext, stage_run: StageRun, stats: StageStats, step: int, metrics: dict) -> dict[str, Any]:
    """The metrics.jsonl record of an update; rates and seconds cover the time since the previous record.

    A bad step's record has no loss, gradient norm or model metrics.
    """
    last = {"images": 0, "tokens": 0, "row_tokens": 0, "row_positions": 0, "seconds": {}} | stats.logged
    seconds = {part: value - last["seconds"].get(part, 0.0) for part, value in stats.seconds.items()}
    busy = max(seconds.get("step", 0.0) + seconds.get("data", 0.0), 1e-9)
    values = jax.device_get(metrics)
    accepted = values.pop("accepted")
    counts = {name: getattr(stats, name) for name in ("skipped", "rewinds", "bad_records", "cut_answers")}
    images, tokens = stats.images - last["images"], stats.tokens - last["tokens"]
    used, positions = stats.row_tokens - last["row_tokens"], stats.row_positions - last["row_positions"]
    logged = ("images", "tokens", "row_tokens", "row_positions")
    stats.logged = {"seconds": dict(stats.seconds)} | {name: getattr(stats, name) for name in logged}
    return {
        "stage": stats.name,
        "step": step,
        "update": updates_before(run.experiment, stage_run.position.stage) + step,
        **({name: float(value) for name, value in values.items()} if accepted else {}),
        "learning_rate": float(values["learning_rate"]),
        **{name: count for name, count in counts.items() if count},
        "images_per_second": images / busy,
        "tokens_per_second": tokens / busy,
        **({"padding": 1 - used / positions} if positions else {}),
        "seconds": {part: round(value, 6) for part, value in seconds.items() if value},
    }


def save_checkpoint(
    run: RunContext, stage_run: StageRun, step: int, state: stages.TrainState, stats: StageStats
) -> None:
    """Start to save a checkpoint; frozen parameters are stored by reference (`Position.frozen_id`)."""
    position = stage_run.position
    checkpoint.require_finite(state.trainable, describe_position(run.experiment, position.stage, step))
    stats.clock = time.time()
    meta = {
        "stage": position.stage,
        "step": step,
        "data": stage_run.stream.position(),
        "seed": run.experiment.seed,
        "frozen": position.frozen_id,
        "history": [*position.history[: position.stage], dataclasses.asdict(stats)],
        "score": [position.stage, stats.recent_mean_loss],
    }
    bucket_folder.publish(run.workdir)  # metrics of the updates before
    items = {"trainable": state.trainable, "optimiser": to_state_dict(state.opt_state)}
    run.checkpoints.save(updates_before(run.experiment, position.stage) + step, items, meta)
