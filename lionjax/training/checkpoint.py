# SPDX-License-Identifier: Apache-2.0
"""What a run keeps on disk, and how it knows that what it reads is what it wrote.

A run's folder holds, each an Orbax directory that appears whole or not at all:

    frozen/HASH           the parameters that no stage trains, written once
    base/0_NAME ...       the parameters that some stage trains, as each stage found them; the last one is the result
    checkpoints/STEP      the trainable half, the optimiser and a record: where the run stands. STEP counts updates
                          from the first stage on
    quarantined/          what could not be trusted

Orbax restores a flipped byte without a word, and casts dtypes as silently. So every directory carries a record
with a fingerprint of each leaf, and nothing is used before it has been checked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
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

from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.training import distributed
from lionjax.training.checksum import digest, fingerprints, in_host_memory, manifest

log = logging.getLogger(__name__)

# Orbax logs a traceback for each of its threads; what goes wrong there comes back as an exception anyway.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_unraisable = sys.unraisablehook


def _not_of_a_closed_loop(what) -> None:
    """After one file failed, TensorStore's other files report to an event loop that is gone, each with a traceback."""
    if str(what.exc_value) != "Event loop is closed":
        _unraisable(what)


sys.unraisablehook = _not_of_a_closed_loop

# Copies of a parameter on several devices are saved each by a slice of its own, which has to be compiled for every
# shape; that pays for large ones alone.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20), override=True
)

TEMPORARY = ".orbax-checkpoint-tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("no space left", "file too large", "disk quota")


class Damaged(Exception):
    """What was read is not what was written: `path` is the directory, the text says what is wrong."""

    def __init__(self, path: Path, text: str):
        super().__init__(f"{path}: {text}")
        self.path = path


# Directories


def _async_options() -> ocp.AsyncOptions:
    # Where a folder cannot be made by another thread, on a full disk, the threads that wait for it do so for minutes.
    return ocp.AsyncOptions(create_directories_asynchronously=False)


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    """`alone`: this process waits for no other, as one that meets damage does not come to where they would meet."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(me, {me}) if alone else None
    options = options or ocp.options.MultiprocessingOptions()
    inside = ocp.CompositeOptions(multiprocessing_options=options, async_options=_async_options())
    handler = ocp.CompositeCheckpointHandler(composite_options=inside)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _args(items: dict[str, Params], meta: dict) -> ocp.args.Composite:
    body = {"leaves": manifest(items), "meta": meta}
    record = ocp.args.JsonSave({**body, "sha256": digest(body)})
    saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(record=record, **saved)


def write(path: Path, items: dict[str, Params], meta: dict) -> None:
    """Trees and a JSON-able value as one directory, which appears whole; what stood there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), _args(items, meta), force=True)


def read_record(path: Path) -> dict:
    """{"leaves": manifest, "meta": ...} of a directory. Raises Damaged when it is not what was written."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = _restored(path, args, "its record")["record"]
    body = {name: record.get(name) for name in ("leaves", "meta")} if isinstance(record, dict) else {}
    if not body or digest(body) != record.get("sha256"):
        raise Damaged(path, "its record is not what was written")
    return body


def read(path: Path, targets: dict[str, Params]) -> tuple[dict[str, Params], dict]:
    """The trees of a directory, laid out as `targets` (ShapeDtypeStructs with shardings), and its meta.

    Raises Damaged when a leaf is not what was written, UserError when it was written for other parameters.
    """
    record = agreed(path, lambda: read_record(path))
    wanted = trees.flatten(targets)
    leaves = {name: leaf for name, leaf in record["leaves"].items() if name.split("/")[0] in targets}
    if odd := sorted(leaves.keys() ^ wanted.keys()):
        side = "has no" if odd[0] in wanted else "holds a"
        raise UserError(f"{path} {side} leaf {odd[0]!r}, unlike the config; it was made by another version")
    for name, (dtype, shape, _) in leaves.items():
        want = wanted[name]
        if (dtype, tuple(shape)) != (str(want.dtype), tuple(want.shape)):
            raise UserError(
                f"{path}: {name!r} was saved as {dtype} {tuple(shape)} and is wanted as {want.dtype} "
                f"{tuple(want.shape)}; nothing is cast in silence, so set the config back to what made it"
            )
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    restored = agreed(path, lambda: _restored(path, ocp.args.Composite(**args), "an array"))
    items = {name: restored[name] for name in targets}
    found = fingerprints(items)
    if wrong := [name for name, (_, _, fingerprint) in leaves.items() if found[name] != fingerprint]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(path, f"{wrong[0]!r}{more} is not what was written")
    return items, record["meta"]


def agreed(path: Path, attempt: Callable[[], Any]) -> Any:
    """What an attempt to read gives; where it meets damage in one process, it is Damaged in all."""
    value = damage = None
    try:
        value = attempt()
    except Damaged as error:
        damage = error
    if any(distributed.sum_of(damage is not None)):
        raise damage or Damaged(path, "another process cannot read it")
    return value


def _restored(path: Path, args: ocp.args.Composite, what: str):
    try:
        with _checkpointer(alone=True) as checkpointer:
            return checkpointer.restore(path.absolute(), args)
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # these say nothing about the files
    except Exception as error:  # Orbax and TensorStore meet damage with errors of any type
        first = error
        while first.__cause__:  # Orbax's own text need not say which array it was
            first = first.__cause__
        said = " ".join(str(first).split())
        raise Damaged(path, f"{what} cannot be read ({type(first).__name__}: {said[:300]})") from error


def quarantine(workdir: Path, path: Path, why: str) -> Path:
    """Move a directory out of the way, never to be read again, and say so. All processes must call it."""
    target = workdir / "quarantined" / f"{path.parent.name}_{path.name}_{time.time_ns()}"
    if distributed.first():
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        (target.parent / f"{target.name}.txt").write_text(why + "\n")
        log.warning("%s is put aside in %s: %s", path, target, why)
    distributed.meet("put aside")
    return target


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that no more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error).lower() for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_full_disk(record: logging.LogRecord) -> bool:
    """Writes that failed beside the first one, whose error is raised, have nothing to add when they are collected."""
    return not (record.exc_info and disk_is_full(record.exc_info[1]))


logging.getLogger("asyncio").addFilter(_no_full_disk)

# Steps


@dataclasses.dataclass(frozen=True)
class Keep:
    """Orbax's preservation policy: the last so many steps, and the best one of the stage that runs.

    `scores`: {step: (stage number, loss)}; steps without one are never the best.
    """

    last: int
    scores: dict[int, tuple[int, float]]

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scores = {step: self.scores[step] for step in steps if step in self.scores}
        stage = max((stage for stage, _ in scores.values()), default=0)
        best = min((loss, step) for step, (s, loss) in scores.items() if s == stage)[1] if scores else None
        return [step in steps[-self.last :] or step == best for step in steps]


class Steps:
    """The steps of a run, saved while it goes on: `with Steps(folder, keep) as steps: steps.save(...)`.

    An error of a save that was under way is raised by the next `save`, by `check` or on leaving. Orbax copies what it
    saves before it lets go, and then writes behind our backs. Where the state lies in this process's own memory, we
    copy it instead, which is soon done, and fingerprints and Orbax's own preparations are left to a thread as well.
    The room of a copy that is written serves for the next: memory that is new to a process costs more than the copying.
    """

    def __init__(self, folder: Path, keep: int):
        self.scores: dict[int, tuple[int, float]] = {}
        self.began: float | None = None  # the save under way
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "save")
        self.handed: concurrent.futures.Future | None = None
        self.copies: list = []  # of the newest step
        for step in found_steps(folder):
            with contextlib.suppress(Damaged):
                self.scores[step] = tuple(read_record(folder / str(step))["meta"]["score"])
        policy = Keep(max(keep, 1), self.scores)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, preservation_policy=policy, async_options=_async_options()
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.wait()
            self.manager.close()
            self.thread.shutdown()
            return
        meant = isinstance(error, UserError | SystemExit | KeyboardInterrupt)
        if jax.process_count() > 1 and not meant:
            return  # the others may not be there to finish with
        try:
            self._collect()
            self.manager.close()
        except Exception as second:
            log.error("the last checkpoint was not saved: %s", second)
        self.thread.shutdown()

    def save(self, step: int, items: dict[str, Params], meta: dict) -> None:
        """Begin to write a step; training may go on at once. `meta["score"]` is (stage number, loss)."""
        self._collect()
        self.began = time.perf_counter()
        if all(in_host_memory(leaf) for leaf in jax.tree.leaves(items)):
            leaves, structure = jax.tree.flatten(items)
            if self.manager.is_saving_in_progress():
                self.copies = []  # they are being written still
            room = itertools.chain(self.copies, itertools.repeat(None))
            # The next update overwrites the state.
            self.copies = copies = [copied(leaf, into) for leaf, into in zip(leaves, room)]
            where = [getattr(leaf, "sharding", None) for leaf in leaves]

            def write():
                placed = structure.unflatten(map(jax.device_put, copies, where))
                self._write(step, placed, meta)

            self.handed = self.thread.submit(write)
        else:
            self._write(step, items, meta)

    def _write(self, step: int, items: dict[str, Params], meta: dict) -> None:
        self.scores[step] = tuple(meta["score"])
        self.manager.save(step, args=_args(items, meta))

    def _collect(self) -> None:
        """Until the thread has handed the last step to Orbax. Raises what went wrong there."""
        if self.handed is not None:
            handed, self.handed = self.handed, None
            handed.result()

    def finished(self) -> float:
        """Seconds that a save took which has ended since this was asked last; 0 where there is none."""
        handing = self.handed is not None and not self.handed.done()
        if self.began is None or handing or self.manager.is_saving_in_progress():
            return 0.0
        began, self.began = self.began, None
        return time.perf_counter() - began

    def check(self) -> None:
        """Raise what went wrong in a save under way, without waiting for it."""
        if self.handed is not None and self.handed.done():
            self._collect()
        self.manager.check_for_errors()

    def wait(self) -> None:
        """Until all is on disk."""
        self._collect()
        self.manager.wait_until_finished()
        self.manager.check_for_errors()


def copied(leaf: jax.Array, into: np.ndarray | None = None):
    """What an array in this process's memory holds now, in `into` where it fits there.

    By numpy, which takes a tenth of the time for small leaves.
    """
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return jnp.copy(leaf)
    held = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
    fits = isinstance(into, np.ndarray) and (into.shape, into.dtype) == (held.shape, held.dtype)
    if not fits:
        return np.array(held)
    np.copyto(into, held)
    return into


def found_steps(folder: Path) -> list[int]:
    """The steps that stand complete in a folder, newest first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def found_bases(folder: Path) -> dict[int, Path]:
    """{stage number: directory} of the bases in a folder."""
    names = {path: re.fullmatch(r"(\d+)_\w+", path.name) for path in folder.glob("*")}
    return {int(match[1]): path for path, match in names.items() if match}


def clean(workdir: Path) -> None:
    """Remove what a killed run left half-written. For one process alone."""
    for folder in ("frozen", "base", "checkpoints"):
        for path in (workdir / folder).glob(f"*{TEMPORARY}*"):
            shutil.rmtree(path)


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turn "the disk is full", whoever says it, into one sentence that names what is still good."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        if distributed.first():
            with contextlib.suppress(OSError):
                clean(workdir)
        last = next(iter(found_steps(workdir / "checkpoints")), None)
        good = f"the checkpoint of update {last} is whole" if last else "what was saved before is whole"
        raise UserError(
            f"the disk is full while writing in {workdir}; {good}: free some space and start the same command again"
        ) from error
