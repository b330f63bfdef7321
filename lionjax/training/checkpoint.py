# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with Orbax: atomic writes, a checksum for each array, asynchronous saving, and the retention policy.

A run folder holds Orbax directories, each written atomically:

    frozen/HASH           the parameters that no stage trains, written once
    base/0_NAME ...       the parameters that some stage trains, at the start of each stage; the last one is the result
    checkpoints/STEP      trainable parameters, optimizer state and a record of the position; STEP counts updates from
                          the first stage on
    quarantined/          directories that failed a check

Orbax restores corrupted bytes and casts dtypes without an error. Each directory therefore holds a record with the
dtype, shape and checksum of every leaf, and these are checked before any parameter is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lionjax.core import bucket
from lionjax.core import params as trees
from lionjax.core.files import is_disk_full
from lionjax.core.types import Params, UserError
from lionjax.training import bucket_paths, distributed
from lionjax.training.bucket_folder import arrays_folder
from lionjax.training.checksum import in_host_memory, leaf_checksums, manifest, sha256_of_json

log = logging.getLogger(__name__)

# Orbax logs a traceback for each of its threads; the same errors are also raised as exceptions.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_default_unraisablehook = sys.unraisablehook


def _ignore_closed_event_loop(unraisable) -> None:
    """After one write failed, TensorStore's other writes report to a closed event loop, each with a traceback."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _default_unraisablehook(unraisable)


sys.unraisablehook = _ignore_closed_event_loop

# Orbax saves a replicated array as one slice per replica, and compiles the slicing for each shape; this is faster only
# for large arrays.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20), override=True
)

ORBAX_TMP_SUFFIX = ".orbax-checkpoint-tmp"


class CorruptCheckpointError(Exception):
    """The content of the directory `path` differs from what was written; the message gives the difference."""

    def __init__(self, path: Path, text: str):
        super().__init__(f"{path}: {text}")
        self.path = path


def _async_options() -> ocp.AsyncOptions:
    # On a full disk, directory creation in another thread fails and the threads that wait for it hang for minutes.
    return ocp.AsyncOptions(create_directories_asynchronously=False)


def _checkpointer(single_process: bool = False) -> ocp.Checkpointer:
    """With `single_process`, Orbax uses no barrier: a process that finds corruption would never reach it."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(process, {process}) if single_process else None
    options = options or ocp.options.MultiprocessingOptions()
    composite_options = ocp.CompositeOptions(multiprocessing_options=options, async_options=_async_options())
    handler = ocp.CompositeCheckpointHandler(composite_options=composite_options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _save_args(items: dict[str, Params], meta: dict) -> ocp.args.Composite:
    body = {"leaves": manifest(items), "meta": meta}
    record = ocp.args.JsonSave({**body, "sha256": sha256_of_json(body)})
    saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}  # Orbax refuses empty trees
    return ocp.args.Composite(record=record, **saved)


def require_finite(params: Params, what: str) -> None:
    """Raise UserError if a parameter is NaN or infinite; all processes must call it. `what`: text for the message."""
    flat = {path: leaf for path, leaf in trees.flatten(params).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if all(in_host_memory(leaf) for leaf in flat.values()):
        is_finite = {path: bool(np.isfinite(np.asarray(leaf, np.float32)).all()) for path, leaf in flat.items()}
    else:
        is_finite = jax.device_get(_all_finite(flat))
    if bad := [path for path, finite in is_finite.items() if not finite]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{what}: the parameters {bad[0]!r}{more} are not finite (NaN or infinity), so they are not saved; the "
            "earlier checkpoints are valid: lower the learning rate, or check the weights that the run starts from"
        )


@jax.jit
def _all_finite(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in flat.items()}


def save_tree(path: Path, items: dict[str, Params], meta: dict) -> None:
    """Write pytrees and JSON-serializable `meta` atomically as one directory; replaces an existing directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), _save_args(items, meta), force=True)


def restore_record(path: Path) -> dict:
    """{"leaves": manifest, "meta": ...} of a directory. Raises CorruptCheckpointError if the checksum differs."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = _orbax_restore(path, args, "the record")["record"]
    body = {name: record.get(name) for name in ("leaves", "meta")} if isinstance(record, dict) else {}
    if not body or sha256_of_json(body) != record.get("sha256"):
        raise CorruptCheckpointError(path, "the record differs from what was written (checksum mismatch)")
    return body


def restore_tree(path: Path, targets: dict[str, Params]) -> tuple[dict[str, Params], dict]:
    """The pytrees of a directory, with the shardings of `targets` (ShapeDtypeStructs), and its `meta`.

    Raises CorruptCheckpointError if the checksum of a leaf differs from the record, and UserError if the directory
    holds other leaves, shapes or dtypes than `targets`.
    """
    record = restore_on_all_processes(path, lambda: restore_record(path))
    specs = trees.flatten(targets)
    leaves = {name: leaf for name, leaf in record["leaves"].items() if name.split("/")[0] in targets}
    if mismatched := sorted(leaves.keys() ^ specs.keys()):
        side = "has no leaf" if mismatched[0] in specs else "has an additional leaf"
        raise UserError(
            f"{path} {side} {mismatched[0]!r}; it was written by another config or version: use the config.json beside "
            "it, or another folder"
        )
    for name, (dtype, shape, _) in leaves.items():
        spec = specs[name]
        if (dtype, tuple(shape)) != (str(spec.dtype), tuple(spec.shape)):
            raise UserError(
                f"{path}: {name!r} was saved as {dtype} {tuple(shape)}, but the config needs {spec.dtype} "
                f"{tuple(spec.shape)}; restore the config that wrote it (checkpoints are not cast)"
            )
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items() if target}
    restored = restore_on_all_processes(path, lambda: _orbax_restore(path, ocp.args.Composite(**args), "an array"))
    items = {name: restored[name] if name in args else {} for name in targets}
    checksums = leaf_checksums(items)
    if wrong := [name for name, (_, _, checksum) in leaves.items() if checksums[name] != checksum]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CorruptCheckpointError(path, f"{wrong[0]!r}{more} differs from what was written (checksum mismatch)")
    return items, record["meta"]


def restore_on_all_processes(path: Path, restore_fn: Callable[[], Any]) -> Any:
    """The value of `restore_fn()`. If it fails in one process, raises CorruptCheckpointError in all processes."""
    value = corruption = None
    try:
        value = restore_fn()
    except CorruptCheckpointError as error:
        corruption = error
    if any(distributed.sum_across_processes(corruption is not None)):
        raise corruption or CorruptCheckpointError(path, "another process cannot read it")
    return value


def _orbax_restore(path: Path, args: ocp.args.Composite, description: str):
    try:
        with _checkpointer(single_process=True) as checkpointer:
            return checkpointer.restore(path.absolute(), args)
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # not caused by the files' content
    except Exception as error:  # Orbax and TensorStore raise errors of many types for corrupt files
        if isinstance(path, bucket_paths.BucketPath) and (sentence := bucket.explain(error, str(path))):
            raise sentence from error
        cause = error
        while cause.__cause__:  # only the innermost error names the array
            cause = cause.__cause__
        message = " ".join(str(cause).split())
        raise CorruptCheckpointError(
            path, f"{description} cannot be read ({type(cause).__name__}: {message[:300]})"
        ) from error


def quarantine(workdir: Path, path: Path, reason: str) -> Path:
    """Move a directory to `workdir`/quarantined and log a warning; returns its new path. All processes must call it."""
    target = arrays_folder(workdir) / "quarantined" / f"{path.parent.name}_{path.name}_{time.time_ns()}"
    if distributed.is_main_process():
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        (target.parent / f"{target.name}.txt").write_text(reason + "\n")
        log.warning("moved %s to %s: %s", path, target, reason)
    distributed.barrier("quarantine")
    return target


def _drop_disk_full_records(record: logging.LogRecord) -> bool:
    """Logging filter for further failed writes: the error of the first one is raised."""
    return not (record.exc_info and is_disk_full(record.exc_info[1]))


logging.getLogger("asyncio").addFilter(_drop_disk_full_records)


@dataclasses.dataclass(frozen=True)
class LatestAndBest:
    """Orbax preservation policy: the latest `num_latest` steps, and the step with the lowest loss in the newest stage.

    `scores`: {step: (stage index, mean recent loss)}; a step without a score cannot be the best.
    """

    num_latest: int
    scores: dict[int, tuple[int, float]]

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scores = {step: self.scores[step] for step in steps if step in self.scores}
        stage = max((stage for stage, _ in scores.values()), default=0)
        best = min((loss, step) for step, (s, loss) in scores.items() if s == stage)[1] if scores else None
        return [step in steps[-self.num_latest :] or step == best for step in steps]


class AsyncCheckpointManager:
    """Saves steps while training continues: `with AsyncCheckpointManager(folder, max_to_keep) as manager: ...`.

    An error of a background save is raised by the next `save`, by `check_for_errors` or on leaving the context. Orbax
    blocks until it has copied the arrays and writes them in the background. If all arrays are in host memory, we copy
    them ourselves with numpy and run the checksums and Orbax's preparation in a thread, so that `save` blocks for less
    time. Copy buffers are reused, because allocating new memory takes longer than the copy.
    """

    def __init__(self, folder: Path, max_to_keep: int):
        self.scores: dict[int, tuple[int, float]] = {}
        self.save_started: float | None = None  # time.perf_counter() at the start of the current save
        self.executor = concurrent.futures.ThreadPoolExecutor(1, "save")
        self.pending_save: concurrent.futures.Future | None = None
        self.host_buffers: list = []  # copies of the leaves of the newest step
        for step in all_steps(folder):
            with contextlib.suppress(CorruptCheckpointError):
                self.scores[step] = tuple(restore_record(folder / str(step))["meta"]["score"])
        policy = LatestAndBest(max(max_to_keep, 1), self.scores)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, preservation_policy=policy, async_options=_async_options()
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.wait_until_finished()
            self.manager.close()
            self.executor.shutdown()
            return
        expected = isinstance(error, UserError | SystemExit | KeyboardInterrupt)
        if jax.process_count() > 1 and not expected:
            return  # finishing a save waits for the other processes, which may be dead
        try:
            self._join_pending_save()
            self.manager.close()
        except Exception as second:
            log.error("the last checkpoint was not saved: %s", second)
        self.executor.shutdown()

    def save(self, step: int, items: dict[str, Params], meta: dict) -> None:
        """Start to write a step in the background. `meta["score"]`: (stage index, mean recent loss)."""
        self._join_pending_save()
        self.save_started = time.perf_counter()
        if all(in_host_memory(leaf) for leaf in jax.tree.leaves(items)):
            leaves, structure = jax.tree.flatten(items)
            if self.manager.is_saving_in_progress():
                self.host_buffers = []  # Orbax still reads the old buffers
            buffers = itertools.chain(self.host_buffers, itertools.repeat(None))
            # Copied because the next train step donates the state's memory.
            self.host_buffers = copies = [copy_leaf(leaf, out) for leaf, out in zip(leaves, buffers)]
            shardings = [getattr(leaf, "sharding", None) for leaf in leaves]

            def write():
                arrays = structure.unflatten(map(jax.device_put, copies, shardings))
                self._save_step(step, arrays, meta)

            self.pending_save = self.executor.submit(write)
        else:
            self._save_step(step, items, meta)

    def _save_step(self, step: int, items: dict[str, Params], meta: dict) -> None:
        self.scores[step] = tuple(meta["score"])
        self.manager.save(step, args=_save_args(items, meta))

    def _join_pending_save(self) -> None:
        """Wait until the thread has passed the last step to Orbax. Raises the thread's error."""
        if self.pending_save is not None:
            pending, self.pending_save = self.pending_save, None
            pending.result()

    def pop_save_seconds(self) -> float:
        """Duration in seconds of a save that finished since the last call; 0 if none did."""
        is_pending = self.pending_save is not None and not self.pending_save.done()
        if self.save_started is None or is_pending or self.manager.is_saving_in_progress():
            return 0.0
        started, self.save_started = self.save_started, None
        return time.perf_counter() - started

    def check_for_errors(self) -> None:
        """Raise the error of a background save, if any, without waiting for the save."""
        if self.pending_save is not None and self.pending_save.done():
            self._join_pending_save()
        self.manager.check_for_errors()

    def wait_until_finished(self) -> None:
        """Wait until all saves are on disk. Raises their error."""
        self._join_pending_save()
        self.manager.wait_until_finished()
        self.manager.check_for_errors()


def copy_leaf(leaf: jax.Array, out: np.ndarray | None = None):
    """A copy of an array in host memory, written to `out` if that has the same shape and dtype.

    A single-device array is copied with numpy, which takes a tenth of jnp.copy's time for small leaves.
    """
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return jnp.copy(leaf)
    source = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
    reusable = isinstance(out, np.ndarray) and (out.shape, out.dtype) == (source.shape, source.dtype)
    if not reusable:
        return np.array(source)
    np.copyto(out, source)
    return out


def all_steps(folder: Path) -> list[int]:
    """The completely written steps of a checkpoints folder, newest first."""
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted((int(path.name) for path in paths if bucket_paths.is_complete(path)), reverse=True)


def all_bases(folder: Path) -> dict[int, Path]:
    """{stage index: directory} of the base folders in `folder`."""
    names = {path: re.fullmatch(r"(\d+)_\w+", path.name) for path in folder.glob("*")}
    return {int(match[1]): path for path, match in names.items() if match and bucket_paths.is_complete(path)}


def remove_tmp_directories(workdir: Path) -> None:
    """Remove the incomplete Orbax directories of a killed run. Call it in one process only."""
    for folder in ("frozen", "base", "checkpoints"):
        for path in (workdir / folder).glob(f"*{ORBAX_TMP_SUFFIX}*"):
            shutil.rmtree(path)
    if (arrays := arrays_folder(workdir)) != workdir:
        for path in (path for folder in ("frozen", "base", "checkpoints") for path in (arrays / folder).glob("*")):
            if not bucket_paths.is_complete(path):
                path.rmtree()


@contextlib.contextmanager
def explain_disk_full(workdir: Path) -> Iterator[None]:
    """Context: turns any disk-full error into a UserError that names the last valid checkpoint."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        if distributed.is_main_process():
            for _ in range(20):  # threads may still be writing files of the failed save
                try:
                    remove_tmp_directories(workdir)
                    break
                except OSError:
                    time.sleep(0.1)
        last = next(iter(all_steps(arrays_folder(workdir) / "checkpoints")), None)
        valid = f"the checkpoint of update {last} is complete" if last else "earlier files are complete"
        raise UserError(
            f"the disk is full while writing in {workdir}; {valid}: free disk space and run the same command again"
        ) from error
