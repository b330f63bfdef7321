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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lionjax.core.errors import RetryError, UserError
from lionjax.core.files import read_record, write_atomic

NAME = re.compile(r"gs:/{1,2}(?P<bucket>[a-z0-9][\w.-]*)(?:/(?P<path>.+))?")
CACHE = "LIONJAX_BUCKET_CACHE"  # environment variable: the folder of the copies
STEP = re.compile(r"checkpoints/(\d+)/")
COMMITTED = re.compile(r"((?:checkpoints|base|frozen)/[^/]+)/commit_success\.txt")  # Orbax writes it last in a bucket
ARRAYS = ("checkpoints/*", "base/*", "frozen/*")  # Orbax's directories of a run folder
NOT_READ = ("compiled/*", "tensorboard/*", "quarantined/*", "lock")  # of a run folder
NOT_WRITTEN = ("lock", "compiled/*", "*.part", "*.partial/*", "*.orbax-checkpoint-tmp*", ".cache/*")
LAST_WRITTEN = "config.json"  # without it, a folder is no run
RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}
MENDED_BY_A_PERSON = re.compile(r"quota|billing|accountDisabled|retention", re.I)  # in an answer, beside its code
TRANSIENT_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED")
CODE = re.compile(r"([A-Z][A-Z_]{3,}): ")  # of Abseil's status, at the beginning of TensorStore's errors
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
    root = copies_root() / bucket
    root.mkdir(parents=True, exist_ok=True)
    record = root / f".{path.replace('/', '_')}.generations.json"
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of other processes that copy from this bucket
        with explained(value):
            store = open_store(bucket)
            keys = wanted_keys(keys_under(store, path), path)
            if not keys:
                store.read(path or "_").result()  # TensorStore lists a bucket without rights as an empty one
                raise UserError(f"there is nothing under {full_name(value)}; check the name")
            before = read_record(record) if record.is_file() else {}
            for key in before.keys() - set(keys):
                (root / key).unlink(missing_ok=True)
            with ThreadPoolExecutor(WORKERS) as pool:
                generations = list(pool.map(lambda key: fetch(store, key, root / key, before.get(key)), keys))
            write_atomic(record, json.dumps(dict(zip(keys, generations))))
    log.info("%s is read from its copy in %s", full_name(value), root / path)
    return root / path


def copies_root() -> Path:
    """The folder of the copies."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "lionjax" / "buckets")


def upload(folder: Path, value: str | Path, newer_than: float = 0.0) -> str:
    """Copy the files of a folder to a bucket; returns the name of the folder there. Raises errors as `download`.

    `newer_than` (seconds since 1970) leaves out files that have not been written since. A directory of arrays whose
    files do not say that it is complete gets such a file, as it is complete where directories can be renamed.
    """
    bucket, path = parse_name(value)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    names = [
        name for name, file in files.items() if not matches(name, NOT_WRITTEN) and file.stat().st_mtime >= newer_than
    ]
    markers = _missing_markers(names) if LAST_WRITTEN in names else []
    with explained(value):
        store = open_store(bucket)
        for name in sorted([*names, *markers], key=lambda name: (name == LAST_WRITTEN, name in markers)):
            content = files[name].read_bytes() if name in files else b"copied from a file system"
            store.write(str(PurePosixPath(path, name)), content).result()
    return f"gs://{bucket}/{path}"


def _missing_markers(names: Sequence[str]) -> list[str]:
    """The commit_success.txt that directories of arrays, and items in them, lack."""
    parents = {parent for name in names if matches(name, ARRAYS) for parent in PurePosixPath(name).parents}
    folders = [parent for parent in parents if len(parent.parts) in (2, 3)]
    return sorted({f"{folder}/commit_success.txt" for folder in folders} - set(names))


def wanted_keys(keys: Sequence[str], path: str) -> list[str]:
    """The objects under `path` that a copy needs: without a run's older checkpoints, compiled programs and curves.

    Directories of arrays that a run has not finished are left out too, where the finished ones are marked.
    """
    inside = {key: key.removeprefix(path).lstrip("/") for key in keys if not key.endswith("/")}
    done = {match[1] for name in inside.values() if (match := COMMITTED.fullmatch(name))}
    inside = {
        key: name
        for key, name in inside.items()
        if not matches(name, NOT_READ)
        and not (done and matches(name, ARRAYS) and "/".join(name.split("/")[:2]) not in done)
    }
    steps = [int(match[1]) for name in inside.values() if (match := STEP.match(name))]
    return [
        key for key, name in sorted(inside.items()) if not (match := STEP.match(name)) or int(match[1]) == max(steps)
    ]


def keys_under(store, path: str) -> list[str]:
    """The objects `path` and `path`/..., all of the bucket for "".

    A folder that may not be listed, or a bucket that is not there, looks empty.
    """
    import tensorstore

    span = tensorstore.KvStore.KeyRange(path, path + "0") if path else None  # "0" is the character after "/"
    keys = [key.decode() for key in store.list(span).result()]
    return [key for key in keys if not path or key == path or key.startswith(path + "/")]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns of `fnmatch`."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def open_store(bucket: str, retries: Mapping[str, Any] | None = None):
    """TensorStore's KvStore of a bucket; `retries`: its gcs_request_retries."""
    import tensorstore

    context = {"gcs_request_retries": dict(retries or RETRIES)}
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "context": context}).result()


def fetch(store, key: str, file: Path, generation: str | None = None) -> str:
    """Write an object to a file unless that has this generation; returns the generation, in hex."""
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
def explained(value: str | Path) -> Iterator[None]:
    """Context: raises TensorStore's errors, also as causes of other errors, as one sentence each (see `explain`)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (sentence := explain(error, value)) is None:
            raise
        raise sentence from error


def explain(error: BaseException | None, value: str | Path) -> UserError | None:
    """What TensorStore's error, or one that it caused, says about the bucket of `value`; None for other errors.

    A RetryError where the same may go well later, otherwise a UserError.
    """
    while error is not None:
        match = CODE.match(str(error)) if isinstance(error, ValueError) else None
        if match is not None or (isinstance(error, ValueError) and "http_response_code=" in str(error)):
            return _sentence(match[1] if match else "refused", str(error), full_name(value))
        error = error.__cause__ or error.__context__
    return None


def _sentence(code: str, text: str, name: str) -> UserError | None:
    said = " ".join(CODE.sub("", text, count=1).partition("[http_response")[0].split())[:200]
    if MENDED_BY_A_PERSON.search(text):
        return UserError(f"{name} takes no more ({said or code}); see the quotas and the billing of its project")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return UserError(
            f"{name} is not yours to use ({code}); run `gcloud auth application-default login`, or check the rights "
            "of this machine's account: objects are listed, read, written and deleted"
        )
    if code == "NOT_FOUND":
        return UserError(f"there is no bucket of the name of {name} ({said}); check the name, or make it")
    if code in TRANSIENT_CODES:
        return RetryError(f"the bucket of {name} does not answer ({code}); try again")
    return UserError(f"the bucket of {name} refuses a request ({code}: {said})") if "http_resp" in text else None
