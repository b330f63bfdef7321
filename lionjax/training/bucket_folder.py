# SPDX-License-Identifier: Apache-2.0
"""A run whose folder lies in a bucket: `--workdir gs://BUCKET/PATH`.

Orbax writes the arrays (frozen/, base/, checkpoints/) to the bucket itself, each process its own part. All other files
are appended to, renamed and locked, which a bucket cannot do: each process has a folder of its own for them on its
disk, and copies those that have changed to the bucket, as whole objects: before each checkpoint, every PUBLISH_SECONDS
and at the end. The bucket has the truth: at the start the files on the disk are replaced by those of the bucket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from lionjax.core import bucket
from lionjax.core.errors import UserError
from lionjax.core.files import make_folder
from lionjax.training import bucket_paths, distributed
from lionjax.training.bucket_lock import BucketLock

PUBLISH_SECONDS = 10.0
LOCK = "lock"
KEPT = "compiled"  # of the folder on the disk: programs for this machine, which are not in the bucket
NOT_FETCHED = (*bucket.ARRAYS, *bucket.NOT_READ)
log = logging.getLogger(__name__)
_open_folders: dict[Path, BucketFolder] = {}  # of this process, by the folder on the disk


class BucketFolder:
    """The files of a run in a bucket, and their copies in the folder `local`; see the module."""

    def __init__(self, name: str | Path):
        self.name, (bucket_name, self.path) = bucket.full_name(name), bucket.parse_name(name)
        if not self.path:
            raise UserError(f"--workdir {self.name} is a bucket, not a folder in it; write gs://BUCKET/PATH")
        bucket_paths.install()
        self.arrays = bucket_paths.BucketPath(self.name)
        self.store = bucket.open_store(bucket_name, bucket_paths.retries())
        self.bucket_name = bucket_name
        process = f".process{jax.process_index()}" if jax.process_index() else ""
        self.local = bucket.copies_root() / ".runs" / bucket_name / f"{self.path}{process}"
        self.lock: BucketLock | None = None
        self.published: dict[str, tuple[int, int]] = {}  # {name: time and size of the file} that the bucket has
        self.error: BaseException | None = None
        self.one_at_a_time, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._publish_now_and_then, name="bucket", daemon=True)

    def open(self) -> None:
        """Lock the folder in the bucket and bring the local one to its state; all processes call it."""
        last_sign = 0.0
        if distributed.is_main_process():
            self.lock = BucketLock(self.store, self._key(LOCK), self.name)
            last_sign = self.lock.acquire()
        distributed.barrier("bucket locked")
        bucket_paths.backend().sentinels[self.bucket_name] = self._key(LOCK)
        try:
            self._fetch_all(last_sign)
            _open_folders[self.local] = self
            self.thread.start()
        except BaseException:
            if self.lock:
                self.lock.release()
            raise
        log.info("%s: files other than arrays are also in %s", self.name, self.local)

    def publish(self) -> None:
        """Copy the files that have changed to the bucket. Raises the error of the background copying, too."""
        if self.error is not None:
            raise self.error
        with self.one_at_a_time:
            found = self._local_files()
            changed = [name for name, state in found.items() if self.published.get(name) != state]
            changed.sort(key=lambda name: name == bucket.LAST_WRITTEN)
            for name in changed:
                with contextlib.suppress(FileNotFoundError):  # a file that lasted a moment
                    self.store.write(self._key(name), (self.local / name).read_bytes()).result()
                    self.published[name] = found[name]
            for name in self.published.keys() - found.keys():
                if self.lock:  # of several processes, one deletes
                    self.store.write(self._key(name), None).result()
                del self.published[name]

    def fetch(self, name: str) -> None:
        """Bring one file to the state of the bucket."""
        (self.local / name).unlink(missing_ok=True)
        bucket.fetch(self.store, self._key(name), self.local / name)
        self.published[name] = _state(self.local / name)

    def close(self, error: BaseException | None) -> None:
        """End the copying in the background, copy what is left, and give the lock back; `error` ended the run."""
        self.ended.set()
        _open_folders.pop(self.local, None)
        if error is not None and bucket.explain(error, self.name):  # the bucket does not take more, or does not answer
            return
        self.thread.join()
        bucket_paths.backend().sentinels.pop(self.bucket_name, None)
        self.publish()
        if self.lock:
            self.lock.release()

    def _publish_now_and_then(self) -> None:
        pause = min(PUBLISH_SECONDS, self.lock.seconds / 8 if self.lock else PUBLISH_SECONDS)
        while not self.ended.wait(pause):
            try:
                if self.lock:
                    self.lock.beat()
                self.publish()
            except Exception as error:
                self.error = self.error or error
                return

    def _fetch_all(self, last_sign: float) -> None:
        """Replace the local files by those of the bucket, which were last written at `last_sign` or before."""
        keys = bucket.keys_under(self.store, self.path)
        if self._key(LOCK) not in keys:  # TensorStore lists a bucket without rights as an empty one
            raise UserError(f"the objects of {self.name} cannot be listed; check the rights of this machine's account")
        make_folder(self.local)
        for path in self.local.iterdir():
            if path.is_dir() and not path.is_symlink():
                if path.name != KEPT:
                    shutil.rmtree(path)
            else:
                path.unlink()
        inside = {key: key.removeprefix(f"{self.path}/") for key in keys if not key.endswith("/")}
        wanted = {key: name for key, name in inside.items() if not bucket.matches(name, NOT_FETCHED)}
        with ThreadPoolExecutor(bucket.WORKERS) as pool:
            list(pool.map(lambda key: bucket.fetch(self.store, key, self.local / wanted[key]), wanted))
        metrics = self.local / "metrics.jsonl"
        if last_sign and metrics.is_file():  # tells how long no process was running
            os.utime(metrics, (last_sign, last_sign))
        self.published = self._local_files()

    def _local_files(self) -> dict[str, tuple[int, int]]:
        files = {}
        for folder, _, names in os.walk(self.local):  # which passes over folders that are gone meanwhile
            for path in (Path(folder) / name for name in names):
                name = path.relative_to(self.local).as_posix()
                if not bucket.matches(name, bucket.NOT_WRITTEN) and path.is_file() and not path.is_symlink():
                    with contextlib.suppress(FileNotFoundError):
                        files[name] = _state(path)
        return files

    def _key(self, name: str) -> str:
        return str(PurePosixPath(self.path, name))


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[Path]:
    """Context: the folder on the disk of a run in a bucket, which is locked meanwhile; other folders as they are.

    All processes call it. Errors of the bucket are one sentence each: see `bucket.explain`.
    """
    if not bucket.is_bucket_name(workdir):
        yield Path(workdir)
        return
    with bucket.explained(workdir):
        folder = BucketFolder(workdir)
        folder.open()
        try:
            yield folder.local
        except BaseException as error:
            try:
                folder.close(error)
            except Exception as second:
                if not isinstance(error, Exception):  # SIGTERM or Ctrl-C: the run itself went well
                    raise
                log.error("the last files were not copied to %s: %s", folder.name, second)
            raise
        folder.close(None)


def arrays_folder(workdir: Path) -> Any:
    """Where a run's frozen/, base/, checkpoints/ and quarantined/ lie: in `workdir`, or in the bucket of it."""
    folder = _open_folders.get(workdir)
    return workdir if folder is None else folder.arrays


def publish(workdir: Path) -> None:
    """Copy the changed files of a run in a bucket there; does nothing for other folders."""
    if workdir in _open_folders:
        _open_folders[workdir].publish()


def fetch(workdir: Path, name: str) -> None:
    """Bring a file of a run in a bucket to the state that process 0 has published; nothing for other folders."""
    if workdir in _open_folders and not distributed.is_main_process():
        _open_folders[workdir].fetch(name)


def own_file(workdir: Path, name: str) -> Path:
    """A file in `workdir` to which each process appends: in a bucket each process but the first has one of its own."""
    if workdir not in _open_folders or distributed.is_main_process():
        return workdir / name
    return workdir / f"{Path(name).stem}.process{jax.process_index()}{Path(name).suffix}"


def display_name(workdir: Path) -> Any:
    """The name of a run's folder for messages."""
    folder = _open_folders.get(workdir)
    return workdir if folder is None else folder.name
