# SPDX-License-Identifier: Apache-2.0
"""Paths gs://BUCKET/PATH that Orbax and this package write to, by TensorStore: neither TensorFlow nor gcsfs is needed.

Orbax writes arrays with TensorStore and all other files through etils' epath, whose own gs:// paths need one of the
two. Here epath reads and writes with TensorStore as well. Folders are the objects whose names begin with theirs; making
one does nothing. A renamed folder is copied, then deleted.
"""

from __future__ import annotations

import fnmatch
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from etils.epath import backend as epath_backend
from etils.epath import stat_utils

from lionjax.core import bucket
from lionjax.core.errors import UserError

SECONDS = "LIONJAX_BUCKET_SECONDS"  # environment variable: how long a run waits for a bucket that does not answer
DEFAULT_SECONDS = 600.0
COMMIT_FILE = "commit_success.txt"  # Orbax's, in each complete folder of a bucket
WORKERS = 8


def retries() -> dict[str, Any]:
    """TensorStore's gcs_request_retries that go on for LIONJAX_BUCKET_SECONDS (default 600)."""
    text = os.environ.get(SECONDS) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError as error:
        raise UserError(f"{SECONDS} is {text!r} and must be a number of seconds") from error
    delay = first = min(1.0, max(seconds, 0.01) / 8)
    count, waited = 0, 0.0
    while waited < seconds:
        count, waited, delay = count + 1, waited + delay, min(2 * delay, 32.0)
    return {"max_retries": count, "initial_delay": f"{1000 * first:.0f}ms", "max_delay": "32s"}


class TensorStoreBackend(epath_backend.Backend):
    """etils' interface of a file system, for gs:// paths.

    `sentinel`: an object that a run has written. TensorStore lists a folder without rights as an empty one; where a
    folder looks empty, the sentinel must still be listed. Raises FileNotFoundError and TensorStore's errors.
    """

    def __init__(self, retry_limits: Mapping[str, Any]):
        self.retry_limits, self.stores = retry_limits, {}
        self.sentinels: dict[str, str] = {}  # by bucket

    def split(self, path) -> tuple[Any, str, str]:
        """(store, bucket, key) of a path."""
        name, _, key = os.fspath(path).removeprefix("gs://").partition("/")
        if name not in self.stores:
            self.stores[name] = bucket.open_store(name, self.retry_limits)
        return self.stores[name], name, key.strip("/")

    def keys(self, path) -> list[str]:
        """The objects in a folder. Raises PermissionError if they cannot be listed."""
        store, name, key = self.split(path)
        keys = [inner for inner in bucket.keys_under(store, key) if inner not in (key, f"{key}/")]
        sentinel = self.sentinels.get(name)
        if not keys and sentinel and not bucket.keys_under(store, sentinel):
            raise ValueError(f"PERMISSION_DENIED: the objects of {name} are not listed [http_response_code='403']")
        return keys

    def is_file(self, path) -> bool:
        store, _, key = self.split(path)
        return bool(key) and store.read(key, byte_range=slice(0, 0)).result().state == "value"

    def open(self, path, mode: str):
        store, _, key = self.split(path)
        content = b""
        if "w" not in mode:
            read = store.read(key).result()
            if read.state == "value":
                content = read.value
            elif "r" in mode:
                raise FileNotFoundError(f"there is no {os.fspath(path)}")
        file = _Object(content, (lambda value: store.write(key, value).result()) if "r" not in mode else None)
        if "a" in mode:
            file.seek(0, io.SEEK_END)
        return file if "b" in mode else _TextObject(file)

    def exists(self, path) -> bool:
        return not self.split(path)[2] or self.is_file(path) or bool(self.keys(path))

    def isdir(self, path) -> bool:
        return not self.split(path)[2] or bool(self.keys(path))

    def listdir(self, path) -> list[str]:
        key = self.split(path)[2]
        start = len(key) + 1 if key else 0
        names = {inner[start:].partition("/")[0] for inner in self.keys(path)}
        if not names and not self.isdir(path):
            raise FileNotFoundError(f"there is no folder {os.fspath(path)}")
        return sorted(name for name in names if name and not name.endswith("~"))

    def glob(self, path) -> list[str]:
        folder, _, pattern = os.fspath(path).rpartition("/")
        names = self.listdir(folder) if self.isdir(folder) else []
        return [f"{folder}/{name}" for name in names if fnmatch.fnmatchcase(name, pattern)]

    def walk(self, top, *, top_down: bool = True, on_error=None) -> Iterator[tuple[str, list[str], list[str]]]:
        del on_error
        names = self.listdir(top) if self.isdir(top) else []
        folders = [name for name in names if self.isdir(f"{os.fspath(top)}/{name}")]
        here = (os.fspath(top), folders, [name for name in names if name not in folders])
        if top_down:
            yield here
        for name in folders:
            yield from self.walk(f"{os.fspath(top)}/{name}", top_down=top_down)
        if not top_down:
            yield here

    def makedirs(self, path, *, exist_ok: bool = False, mode: int | None = None) -> None:
        del mode
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"{os.fspath(path)} exists")

    mkdir = makedirs

    def rmtree(self, path) -> None:
        store, keys = self.split(path)[0], self.keys(path)
        if not keys:
            raise FileNotFoundError(f"there is no folder {os.fspath(path)}")
        for key in (key for key in keys if key.endswith(f"/{COMMIT_FILE}")):
            store.write(key, None).result()  # first, so that no part of a folder passes for the whole of it
        self._all(lambda key: store.write(key, None).result(), keys)

    def remove(self, path) -> None:
        if not self.is_file(path):
            raise FileNotFoundError(f"there is no {os.fspath(path)}")
        store, _, key = self.split(path)
        store.write(key, None).result()

    def rename(self, path, dst) -> None:
        if self.exists(dst):
            raise FileExistsError(f"{os.fspath(dst)} exists")
        self.replace(path, dst)

    def replace(self, path, dst) -> None:
        if self.is_file(path):
            self.copy(path, dst, overwrite=True)
            self.remove(path)
            return
        (store, _, start), (target, _, end), keys = self.split(path), self.split(dst), self.keys(path)
        if not keys:
            raise FileNotFoundError(f"there is no {os.fspath(path)}")
        self._all(lambda key: target.write(end + key[len(start) :], store.read(key).result().value).result(), keys)
        self.rmtree(path)

    def copy(self, path, dst, overwrite: bool) -> None:
        if not overwrite and self.exists(dst):
            raise FileExistsError(f"{os.fspath(dst)} exists")
        with self.open(path, "rb") as source, self.open(dst, "wb") as target:
            target.write(source.read())

    def stat(self, path) -> stat_utils.StatResult:
        """Without times, which TensorStore does not read."""
        is_folder = not self.is_file(path)
        if is_folder and not self.isdir(path):
            raise FileNotFoundError(f"there is no {os.fspath(path)}")
        store, _, key = self.split(path)
        length = 0 if is_folder else len(store.read(key).result().value)
        return stat_utils.StatResult(is_directory=is_folder, length=length, mtime=0, owner=None, group=None, mode=None)

    def _all(self, function, keys: list[str]) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(function, keys))


class _Object(io.BytesIO):
    """The content of an object, which is written to the bucket as a whole when it is closed without an error."""

    def __init__(self, content: bytes, write=None):
        super().__init__(content)
        self.write_object = write

    def __exit__(self, kind, *rest) -> None:
        if kind is not None:
            self.write_object = None
        super().__exit__(kind, *rest)

    def close(self) -> None:
        write, self.write_object = self.write_object, None
        if write is not None:
            write(self.getvalue())
        super().close()


class _TextObject(io.TextIOWrapper):
    """An `_Object` of UTF-8 text."""

    def __init__(self, file: _Object):
        super().__init__(file, encoding="utf-8", newline="\n")

    def __exit__(self, kind, *rest) -> None:
        if kind is not None:
            self.buffer.write_object = None
        super().__exit__(kind, *rest)


class BucketPath(epath.gpath.PosixGPath):
    """A gs:// path of epath that reads and writes by TensorStore."""

    @property
    def _backend(self) -> epath_backend.Backend:
        return backend() if self._uri_scheme == "gs" else super()._backend

    def absolute(self) -> BucketPath:
        return self


_backends: list[TensorStoreBackend] = []  # the one of this process


def backend() -> TensorStoreBackend:
    """The file system of this process's gs:// paths."""
    if not _backends:
        install()
    return _backends[0]


def install() -> None:
    """Let epath, and so Orbax, use this module for gs:// paths from now on, with retries by LIONJAX_BUCKET_SECONDS."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    limits = retries()
    _backends[:] = [TensorStoreBackend(limits)]
    epath.register_path_cls("gs://")(BucketPath)
    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        context["gcs_request_retries"] = limits
    # Orbax asks Google's own client, which would have to be installed and may ask for more rights than a run needs.
    # Folders of a bucket with a hierarchical namespace are found by their objects here, as in other buckets.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


def is_complete(path) -> bool:
    """Whether a directory of arrays is whole: in a bucket, where it is written in place, if it says so."""
    return not isinstance(path, BucketPath) or backend().is_file(path / COMMIT_FILE)
