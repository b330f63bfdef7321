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
from lionjax.training import bucket_folder, checkpoint, distributed
from lionjax.training.bucket_folder import arrays_folder, display_name
from lionjax.training.changes import plan_changes
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs

log = logging.getLogger(__name__)


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

    Some fields may differ, so that a run can be mended or get more steps (see `changes`). Also removes the incomplete
    files of a killed run. Raises UserError with the fields that may not differ, and if the processes do not share one
    folder or one config.
    """
    path, text = workdir / "config.json", config.to_json(experiment)
    has_checkpoints = any((arrays_folder(workdir) / name).exists() for name in ("base", "checkpoints"))
    if has_checkpoints and not path.is_file():
        raise UserError(f"{display_name(workdir)} holds checkpoints but no config.json; set another --workdir")
    if has_checkpoints:  # without checkpoints, an earlier start has failed and its config may be replaced
        try:
            old = saved_config(workdir)
        except UserError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if old is None:
            log.warning("%s is damaged and no copy is left: the config of this command is used unchecked", path)
        else:
            _apply_changes(workdir, old, experiment)
    if distributed.is_main_process():
        rename_bases(workdir, experiment)
        write_atomic(path, text)
        checkpoint.remove_tmp_directories(workdir)
        bucket_folder.publish(workdir)
    distributed.barrier("config written")
    bucket_folder.fetch(workdir, path.name)
    if not path.is_file() or path.read_text() != text:
        raise UserError(
            f"process {jax.process_index()} cannot find the config.json that process 0 wrote in "
            f"{display_name(workdir)}; run all "
            "processes with the same config and a --workdir that all hosts share"
        )


def _apply_changes(workdir: Path, old: Experiment, new: Experiment) -> None:
    """Log and record the changes of a config, and set the result of a stage aside that has more steps now."""
    positions = saved_positions(workdir, old)
    planned = plan_changes(workdir, old, new, positions)
    distributed.barrier("changes planned")  # all processes have read the folder
    for name in sorted(planned.fields):
        log.info("resuming %s with %s changed: %r -> %r", display_name(workdir), name, *planned.fields[name])
    for note in planned.notes:
        log.info("%s", note)
    if planned.reopened is not None:
        result, name = base_folder(workdir, old, planned.reopened + 1), f"stages.{planned.reopened}.steps"
        before, after = planned.fields[name]
        checkpoint.quarantine(workdir, result, f"the result after {before} steps, which are {after} now")
    if planned.fields and distributed.is_main_process():
        stage, step = positions[0] if positions else (0, 0)
        changed = {name: [repr(value) for value in planned.fields[name]] for name in sorted(planned.fields)}
        line = {"time": time.time(), "update": updates_before(old, stage) + step, "changed": changed}
        append_jsonl(workdir / "changes.jsonl", line | ({"notes": planned.notes} if planned.notes else {}))


def rename_bases(workdir: Path, experiment: Experiment) -> None:
    """Give the directories in `base/` the names of `experiment`'s stages, of which one may have been added."""
    for stage, path in checkpoint.all_bases(arrays_folder(workdir) / "base").items():
        if stage <= len(experiment.stages) and path != base_folder(workdir, experiment, stage):
            path.rename(base_folder(workdir, experiment, stage))


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
    return arrays_folder(workdir) / "base" / f"{stage}_{name}"


def safe_file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text)


def saved_positions(workdir: Path, experiment: Experiment) -> list[tuple[int, int]]:
    """(stage, step in the stage) of all bases and checkpoints in a run folder, newest first."""
    arrays = arrays_folder(workdir)
    positions = [(stage, 0) for stage in checkpoint.all_bases(arrays / "base")]
    for update in checkpoint.all_steps(arrays / "checkpoints"):
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
    path = arrays_folder(workdir) / "checkpoints" / str(updates_before(experiment, stage) + step)
    scratch = step and experiment.stages[stage].init_from == "scratch"
    base = base_folder(workdir, experiment, 0 if scratch else stage)
    if not base.is_dir():
        raise CorruptCheckpointError(path if step else base, f"the stage's base parameters ({base}) are missing")
    learned, meta = read_base(workdir, base, specs)
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
    """The parameters that no stage trains. Raises CorruptCheckpointError if they are damaged or missing.

    Those that a stage was to train which has been changed or left out before it began are in the first base.
    """
    path, wanted = arrays_folder(workdir) / "frozen" / frozen_id, trees.flatten(specs.frozen)
    if not path.is_dir():
        raise CorruptCheckpointError(path, "the directory is missing")
    held, _ = _read_group(path, "never", specs)
    if wanted.keys() - held.keys():
        learned, meta = _read_group(checkpoint.all_bases(path.parent.parent / "base")[0], "learned", specs)
        held = _read_group(path.parent / meta["frozen"], "never", specs)[0] | learned | held
    return _with_specs(held, wanted)


def read_base(workdir: Path, path: Path, specs: ParamSpecs) -> tuple[Params, dict]:
    """The trainable parameters in a directory of `base/`, and its metadata.

    Those that only a stage trains which was added later are in the frozen parameters of that directory.
    """
    held, meta = _read_group(path, "learned", specs)
    wanted = trees.flatten(specs.trainable)
    if missing := wanted.keys() - held.keys():
        held |= _read_group(arrays_folder(workdir) / "frozen" / meta["frozen"], "never", specs)[0]
        values = (len(missing), min(missing), held[min(missing)].dtype)
        log.info("%d parameters that were frozen so far (%s, ...) go on from the run's %s values", *values)
    return _with_specs(held, wanted), meta


def _read_group(path: Path, name: str, specs: ParamSpecs) -> tuple[dict[str, jax.Array], dict]:
    """The parameters in a directory, "never" or "learned", as {path: array}, and the directory's metadata.

    A parameter that belongs to the other group by now, because stages were added or changed, has its saved dtype.
    """
    target = dict(trees.flatten(specs.frozen if name == "never" else specs.trainable))
    leaves = checkpoint.restore_on_all_processes(path, lambda: checkpoint.restore_record(path))["leaves"]
    saved = {
        leaf.removeprefix(f"{name}/"): dtype for leaf, (dtype, *_) in leaves.items() if leaf.startswith(f"{name}/")
    }
    if moved := saved.keys() ^ target.keys():
        all_specs = trees.flatten(trees.merge(specs.frozen, specs.trainable))
        target |= {
            leaf: jax.ShapeDtypeStruct(all_specs[leaf].shape, saved[leaf], sharding=all_specs[leaf].sharding)
            for leaf in moved & saved.keys() & all_specs.keys()
        }
        target = {leaf: spec for leaf, spec in target.items() if leaf in saved}
    items, meta = checkpoint.restore_tree(path, {name: trees.unflatten(target)})
    return trees.flatten(items[name]), meta


def _with_specs(held: dict[str, jax.Array], specs: dict[str, jax.ShapeDtypeStruct]) -> Params:
    """The arrays of those paths that `specs` has, in its dtypes."""
    arrays = {path: held[path] for path in specs}
    return trees.unflatten({p: x if x.dtype == specs[p].dtype else x.astype(specs[p].dtype) for p, x in arrays.items()})


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
