# SPDX-License-Identifier: Apache-2.0
"""The lock of a run folder in a bucket: an object that the run's process writes again every few seconds.

Each write names the generation that it replaces, so that of several processes only one gets the lock, and one that has
lost it learns so. A process that was killed leaves its lock behind. The next one takes it at once where it can see that
the process has ended (same machine, same container), and otherwise after LIONJAX_LOCK_SECONDS (default 60) without a
write, measured by its own clock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from lionjax.core.errors import RetryError, UserError

SECONDS = "LIONJAX_LOCK_SECONDS"  # environment variable
DEFAULT_SECONDS = 60.0
LOOKS = 12  # at a lock, while waiting for its process
BEATS = 4  # writes within LIONJAX_LOCK_SECONDS
log = logging.getLogger(__name__)


def lock_seconds() -> float:
    """LIONJAX_LOCK_SECONDS. Raises UserError if it is no positive number."""
    text = os.environ.get(SECONDS) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{SECONDS} is {text!r} and must be a positive number of seconds")
    return seconds


class BucketLock:
    """The lock `key` of `store` (a KvStore); `name` is the run folder's, for messages."""

    def __init__(self, store: Any, key: str, name: str):
        self.store, self.key, self.name, self.seconds = store, key, name, lock_seconds()
        self.owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), **_process()}
        self.generation, self.written = b"", 0.0

    def acquire(self) -> float:
        """Take the lock; returns the time of the last process's last write, 0 without one.

        Raises RetryError where another process holds it, which may be the previous one that is still saving.
        """
        seen, since = None, time.monotonic()
        while True:
            read = self.store.read(self.key).result()
            held = _content(read.value) if read.state == "value" else {}
            if not held or held.get("released") or _has_ended(held):
                if self._write(read.stamp.generation):
                    return float(held.get("time") or 0.0)
                continue
            holder = f"process {held.get('pid')} on {held.get('host')}"
            changed = seen is not None and read.stamp.generation != seen
            if changed or _is_here(held):
                raise RetryError(f"{holder} is training in {self.name}; stop it or set another --workdir")
            if seen is None:
                log.info("%s is locked by %s: waiting %.0f s for a sign of it", self.name, holder, self.seconds)
                seen, since = read.stamp.generation, time.monotonic()
            elif time.monotonic() - since >= self.seconds:
                log.warning("%s has not been heard of for %.0f s: taking its lock", holder, self.seconds)
                if self._write(read.stamp.generation):
                    return float(held.get("time") or 0.0)
            time.sleep(self.seconds / LOOKS)

    def beat(self) -> None:
        """Write the lock again if that is due. Raises RetryError if another process has taken it."""
        if time.monotonic() - self.written < self.seconds / BEATS:
            return
        if not self._write(self.generation):
            raise RetryError(f"another process has taken over {self.name}, as this one was not heard of; it goes on")

    def release(self) -> None:
        """Give the lock back, unless another process has taken it."""
        self._write(self.generation, released=True)

    def _write(self, replaced: bytes, released: bool = False) -> bool:
        """Write the lock in place of a generation; returns whether that was still there."""
        body = json.dumps(self.owner | {"time": time.time(), "released": released}) + "\n"
        self.written = time.monotonic()
        generation = self.store.write(self.key, body, if_equal=replaced).result().generation
        if not generation:  # a write whose answer was lost is refused when it is sent again
            read = self.store.read(self.key).result()
            if read.state != "value" or read.value.decode(errors="replace") != body:
                return False
            generation = read.stamp.generation
        self.generation = generation
        return True


def _content(value: bytes) -> dict[str, Any]:
    try:
        content = json.loads(value)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _process() -> dict[str, Any]:
    """What tells this process from all others, on Linux: of the machine since its start, and of the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return {"pid": os.getpid(), "place": place, "started": _start(os.getpid())}
    except OSError:
        return {"pid": os.getpid(), "place": "", "started": ""}


def _start(pid: int) -> str:
    """When a process of this container was started, in the kernel's count; "" if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_here(held: dict[str, Any]) -> bool:
    """Whether a lock is of a process of this container that is running."""
    here = _process()
    return bool(here["place"]) and held.get("place") == here["place"] and _start(held["pid"]) == held.get("started")


def _has_ended(held: dict[str, Any]) -> bool:
    """Whether a lock is of a process of this container that has ended."""
    here = _process()
    return bool(here["place"]) and held.get("place") == here["place"] and _start(held["pid"]) != held.get("started")
