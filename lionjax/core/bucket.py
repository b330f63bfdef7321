# SPDX-License-Identifier: Apache-2.0
"""Folders in a bucket of Google Cloud Storage by name, `gs://BUCKET/PATH`: copied here to be read, and copied there.

Objects are read and written by TensorStore, as Orbax does, with Google's application default credentials. A copy lies
in ~/.cache/lionjax/buckets (or $LIONJAX_BUCKET_CACHE); an object that has not changed since is not read again.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lionjax.core.errors import RetryError, UserError
from lionjax.core.files import read_record, write_atomic

NAME = re.compile(r"gs:/{1,2}(?P<bucket>[a-z0-9][\w.-]*)(?:/(?P<path>.+))?")
CACHE = "LIONJAX_BUCKET_CACHE"  # environment variable: the folder of the copies
STEP = re.compile(r"checkpoints/(\d+)/")
NOT_READ = ("compiled/*", "tensorboard/*", "quarantined/*", "lock")  # of a run folder
NOT_WRITTEN = ("lock", "compiled/*", "*.part", "*.orbax-checkpoint-tmp*", ".cache/*")
LAST_WRITTEN = "config.json"  # without it, a folder is no run
RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}
WORKERS = 4  # objects in memory at once
log = logging.getLogger(__name__)


def is_bucket_name(value: object) -> bool:
    """Whether a text or a path (which has lost a slash) names a folder of a bucket."""
    return str(value).startswith("gs:/")


def parse_name(value: str | Path) -> tuple[str, str]:
    """(bucket, path without slashes at its ends). Raises UserError for a text that is not of the form."""
    match = NAME.fullmatch(str(value).rstrip("/"))
    if match is None or ".." in str(value).split("/"):
        raise UserError(f"{str(value)!r} is no name of a bucket; write gs://BUCKET/PATH")
    return match["bucket"], (match["path"] or "").strip("/")


def download(value: str | Path) -> Path:
    """The local copy of a folder or object of a bucket, brought up to date.

    Of a run's checkpoints only the newest is copied. Raises UserError where nothing lies there or the bucket cannot be
    read, and RetryError where it does not answer.
    """
    bucket, path = parse_name(value)
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "lionjax" / "buckets") / bucket
    root.mkdir(parents=True, exist_ok=True)
    record = root / f".{path.replace('/', '_')}.generations.json"
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of other processes that copy from this bucket
        with _errors(value):
            store = _open(bucket)
            keys = wanted_keys(_keys_under(store, path), path)
            if not keys:
                store.read(path or "_").result()  # TensorStore lists a bucket without rights as an empty one
                raise UserError(f"there is nothing under {full_name(value)}; check the name")
            before = read_record(record) if record.is_file() else {}
            for key in before.keys() - set(keys):
                (root / key).unlink(missing_ok=True)
            with ThreadPoolExecutor(WORKERS) as pool:
                generations = list(pool.map(lambda key: _fetch(store, key, root, before.get(key)), keys))
            write_atomic(record, json.dumps(dict(zip(keys, generations))))
    log.info("%s is read from its copy in %s", full_name(value), root / path)
    return root / path


def upload(folder: Path, value: str | Path) -> str:
    """Copy the files of a folder to a bucket; returns the name of the folder there. Raises errors as `download`."""
    bucket, path = parse_name(value)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [name for name in names if not _matches(name, NOT_WRITTEN)]
    names.sort(key=lambda name: name == LAST_WRITTEN)
    with _errors(value):
        store = _open(bucket)
        for name in names:
            store.write(str(PurePosixPath(path, name)), (folder / name).read_bytes()).result()
    return f"gs://{bucket}/{path}"


def wanted_keys(keys: Sequence[str], path: str) -> list[str]:
    """The objects under `path` that a copy needs: without a run's older checkpoints, compiled programs and curves."""
    inside = {key: key.removeprefix(path).lstrip("/") for key in keys if not key.endswith("/")}
    steps = [int(match[1]) for name in inside.values() if (match := STEP.match(name))]
    return [
        key
        for key, name in sorted(inside.items())
        if not _matches(name, NOT_READ) and (not (match := STEP.match(name)) or int(match[1]) == max(steps))
    ]


def _keys_under(store, path: str) -> list[str]:
    """The objects `path` and `path`/..., all of the bucket for ""."""
    import tensorstore

    span = tensorstore.KvStore.KeyRange(path, path + "0") if path else None  # "0" is the character after "/"
    keys = [key.decode() for key in store.list(span).result()]
    return [key for key in keys if not path or key == path or key.startswith(path + "/")]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _open(bucket: str):
    import tensorstore

    context = {"gcs_request_retries": RETRIES}
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "context": context}).result()


def _fetch(store, key: str, root: Path, generation: str | None) -> str:
    """Write an object into the folder of copies unless that has this generation; returns the generation, in hex."""
    file = root / key
    known = bytes.fromhex(generation) if generation and file.is_file() else None
    read = store.read(key, if_not_equal=known).result()
    if read.state == "value":
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, read.value)
    return read.stamp.generation.hex() if read.state == "value" else generation or ""


def full_name(value: str | Path) -> str:
    """The name with both slashes, which a path has lost."""
    bucket, path = parse_name(value)
    return f"gs://{bucket}/{path}"


@contextmanager
def _errors(value: str | Path) -> Iterator[None]:
    """TensorStore's errors as one sentence each."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # with the code of Abseil's status at the beginning
        code = str(error).partition(":")[0].strip()
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            raise UserError(
                f"{full_name(value)} is not yours to use ({code}); run `gcloud auth application-default login`, or "
                "check the rights of this machine's account"
            ) from error
        if code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "UNKNOWN", "INTERNAL"):
            raise
        raise RetryError(f"the bucket of {full_name(value)} does not answer ({code}); try again") from error
