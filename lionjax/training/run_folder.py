# SPDX-License-Identifier: Apache-2.0
"""The run folder (--workdir): lock, config check, names of its checkpoints, and the saved positions."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lionjax.core import config
from lionjax.core import params as trees
from lionjax.core.errors import RetryError
from lionjax.core.experiment import Experiment
from lionjax.core.files import append_jsonl, read_record, write_atomic
from lionjax.core.types import Params, UserError
from lionjax.training import checkpoint, distributed
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs

log = logging.getLogger(__name__)


# Fields with which a run may be resumed with other values (regular expressions): those that do not change the result,
# and those that a person changes to mend what stopped it. Each change is logged and added to changes.jsonl.
MUTABLE_FIELDS = (
    r"name",
    r"mesh\..*",
    r"run\.(log_every|save_every|evaluate_every|evaluate_limit|max_to_keep|cache_features)",
    r"run\.(feature_cache_gib|feature_cache_dir)",
    # Change the result only after a bad step, which is when a user has to set them.
    r"run\.(on_bad_step|loss_spike_sigmas|max_bad_steps|watchdog_seconds)",
    r"generation\..*",
    # Moved files. The parameters come from the checkpoints, and records of another number or order are refused.
    r"weights",
    r"data\.sources\.\d+\.(file|folder|image_dir|questions|answers|captions_file|instances_file)",
    r"data\.(on_bad_record|max_bad_fraction)",
    # From the resumed update on.
    r"stages\.\d+\.(learning_rate|warmup_learning_rate|end_learning_rate|batch_size|grad_accum_steps)",
    r"data\.(num_threads|num_workers|prefetch_buffer_size|image_cache_mib|bad_records_path)",
)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Context: creates `workdir` and locks it. Raises UserError if it is not writable.

    Raises RetryError if another process has locked it, which may be the previous one of this run that is still saving.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {workdir}: {error.strerror}; set another --workdir") from error
    with file:
        try:
            if distributed.is_main_process():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RetryError(f"another process is training in {workdir}; stop it or set another --workdir") from error
        yield


def check_or_write_config(workdir: Path, experiment: Experiment) -> None:
    """Check config.json against `experiment` if the folder holds checkpoints, then write it; all processes call it.

    Fields in `MUTABLE_FIELDS` may differ, so that a run can be resumed on another mesh, for example. Also removes the
    incomplete files of a killed run. Raises UserError with the other fields that differ, and if the processes do not
    share one folder or one config.
    """
    path, text = workdir / "config.json", config.to_json(experiment)
    has_checkpoints = any((workdir / name).exists() for name in ("base", "checkpoints"))
    if has_checkpoints and not path.is_file():
        raise UserError(f"{workdir} holds checkpoints but no config.json; set another --workdir")
    if has_checkpoints:  # without checkpoints, an earlier start has failed and its config may be replaced
        try:
            old = saved_config(workdir)
        except UserError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if old is None:
            log.warning("%s is damaged and no copy is left: the config of this command is used unchecked", path)
        changes = {} if old is None else config.diff_configs(old, experiment)
        mutable = {name for name in changes if any(re.fullmatch(pattern, name) for pattern in MUTABLE_FIELDS)}
        if fixed := [f"{name} {a!r} -> {b!r}" for name, (a, b) in changes.items() if name not in mutable]:
            raise UserError(
                f"{workdir} was made by another config ({'; '.join(fixed)}); restore these, which its parameters or "
                "its order of records depend on, or set another --workdir"
            )
        for name in sorted(mutable):
            log.info("resuming %s with %s changed: %r -> %r", workdir, name, *changes[name])
        if mutable and distributed.is_main_process():
            append_jsonl(workdir / "changes.jsonl", _change_record(workdir, {name: changes[name] for name in mutable}))
    if distributed.is_main_process():
        write_atomic(path, text)
        checkpoint.remove_tmp_directories(workdir)
    distributed.barrier("config written")
    if not path.is_file() or path.read_text() != text:
        raise UserError(
            f"process {jax.process_index()} cannot find the config.json that process 0 wrote in {workdir}; run all "
            "processes with the same config and a --workdir that all hosts share"
        )


def _change_record(workdir: Path, changes: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A line of changes.jsonl: {"time", "update" of the newest checkpoint, "changed": {field: [old, new]}}."""
    update = next(iter(checkpoint.all_steps(workdir / "checkpoints")), 0)
    changed = {name: [repr(value) for value in changes[name]] for name in sorted(changes)}
    return {"time": time.time(), "update": update, "changed": changed}


def saved_config(workdir: Path) -> Experiment | None:
    """The config of a run folder: config.json, or where that is damaged its copy in report.json; None without one.

    Raises UserError for a whole config.json that this version cannot read.
    """
    text = (workdir / "config.json").read_bytes()
    try:
        json.loads(text)
    except ValueError as error:
        copy = read_record(workdir / "report.json").get("config")
        if copy is None:
            return None
        log.warning("%s is damaged (%s); its copy in report.json is used", workdir / "config.json", error)
        text = json.dumps(copy).encode()
    return config.from_json(text.decode())


def describe_position(experiment: Experiment, stage: int, step: int) -> str:
    """Text for messages: "stage 'two', step 5"."""
    if stage == len(experiment.stages):
        return "the end of the last stage"
    return f"stage {experiment.stages[stage].name!r}, step {step}"


def updates_before(experiment: Experiment, stage: int) -> int:
    """Number of updates in the stages before stage `stage`; checkpoint directories count from the first stage on."""
    return sum(stage.steps for stage in experiment.stages[:stage])


def base_folder(workdir: Path, experiment: Experiment, stage: int) -> Path:
    """The directory of the trainable parameters at the start of a stage; for `stage` after the last: the result."""
    last = stage == len(experiment.stages)
    name = "final" if last else safe_file_name(experiment.stages[stage].name)
    return workdir / "base" / f"{stage}_{name}"


def safe_file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text)


def saved_positions(workdir: Path, experiment: Experiment) -> list[tuple[int, int]]:
    """(stage, step in the stage) of all bases and checkpoints in a run folder, newest first."""
    positions = [(stage, 0) for stage in checkpoint.all_bases(workdir / "base")]
    for update in checkpoint.all_steps(workdir / "checkpoints"):
        stage = max(s for s in range(len(experiment.stages)) if updates_before(experiment, s) < update)
        positions.append((stage, update - updates_before(experiment, stage)))
    return sorted(positions, reverse=True)


def read_position(
    workdir: Path, experiment: Experiment, specs: ParamSpecs, stage: int, step: int, opt_state: Any = None
) -> tuple[Params, Any, dict]:
    """What a run saved after `step` updates of `stage`: the trainable parameters, optimizer state and metadata.

    `opt_state` is the structure to restore the optimizer's state into; None leaves it out, as does `step` 0.
    Raises CorruptCheckpointError if a directory is damaged, or missing.
    """
    path = workdir / "checkpoints" / str(updates_before(experiment, stage) + step)
    scratch = step and experiment.stages[stage].init_from == "scratch"
    base = base_folder(workdir, experiment, 0 if scratch else stage)
    if not base.is_dir():
        raise CorruptCheckpointError(path if step else base, f"the stage's base parameters ({base}) are missing")
    items, meta = checkpoint.restore_tree(base, {"learned": specs.trainable})
    learned = items["learned"]
    if not step:
        return learned, None, meta
    patterns = experiment.stages[stage].trainable
    trainable, _ = trees.split(specs.trainable, patterns)
    optimizer = {} if opt_state is None else {"optimiser": to_state_dict(opt_state)}
    items, meta = checkpoint.restore_tree(path, {"trainable": trainable} | optimizer)
    _, untrained = trees.split(learned, patterns)
    restored = None if opt_state is None else from_state_dict(items["optimiser"], opt_state)
    return trees.merge(items["trainable"], untrained), restored, meta


def read_frozen(workdir: Path, specs: ParamSpecs, frozen_id: str) -> Params:
    """The parameters that no stage trains. Raises CorruptCheckpointError if they are damaged or missing."""
    path = workdir / "frozen" / frozen_id
    if not path.is_dir():
        raise CorruptCheckpointError(path, "the directory is missing")
    return checkpoint.restore_tree(path, {"never": specs.frozen})[0]["never"]


def latest_position(workdir: Path, experiment: Experiment) -> tuple[int, int] | None:
    return next(iter(saved_positions(workdir, experiment)), None)


def to_state_dict(tree: Any) -> Params:
    """Any pytree as nested dicts with string keys, as Orbax needs it. Nodes without leaves are dropped."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return trees.unflatten({jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs})


def from_state_dict(state_dict: Params, target: Any) -> Any:
    """The inverse of `to_state_dict`: a pytree with the structure of `target`."""
    leaves = trees.flatten(state_dict)
    pairs, structure = jax.tree_util.tree_flatten_with_path(target)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])
