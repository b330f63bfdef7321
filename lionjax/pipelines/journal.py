# SPDX-License-Identifier: Apache-2.0
"""A journal of paid replies: one JSON line for each, found again by a key of what was asked."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lionjax.core.files import append_jsonl, read_whole_lines

log = logging.getLogger(__name__)


def journal_key(question: Mapping[str, Any]) -> str:
    """SHA-256 of what is asked, as hexadecimal digits; the order of the fields does not matter."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Journal:
    """Rows {"key": key, ...} in a JSON Lines file, safe to add to from several threads.

    A last line that a killed process left unfinished is dropped from the file; other damaged lines are passed over.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        rows, num_damaged = read_whole_lines(path)
        if num_damaged:
            log.warning("%s has %d damaged lines; what they held is asked again", path, num_damaged)
        self._rows = {row["key"]: row for row in rows if isinstance(row.get("key"), str)}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a key, None if there is none."""
        return self._rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row to the file and return it with its key."""
        keyed = {"key": key, **row}
        with self._lock:
            append_jsonl(self.path, keyed)
            self._rows[key] = keyed
        return keyed


def _drop_torn_line(path: Path) -> None:
    """Cut a file behind its last line break."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if (end := content.rfind(b"\n") + 1) < len(content):
        log.warning("the last line of %s is unfinished and is dropped", path)
        with path.open("r+b") as file:
            file.truncate(end)
