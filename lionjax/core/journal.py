# SPDX-License-Identifier: Apache-2.0
"""A journal of answers: one JSON line for each, found again by a key of what was asked."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lionjax.core.errors import UserError
from lionjax.core.files import append_jsonl, make_folder, read_whole_lines

log = logging.getLogger(__name__)

SETTINGS_KEY = "settings"  # of the row that says to what model and settings the others belong


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
        make_folder(path.parent)
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

    def require(self, settings: Mapping[str, Any], what: str) -> None:
        """Write `settings` as the first row of a new journal. Raises UserError for a journal that has others.

        `what` the rows are, such as "answers", for the message.
        """
        found = self.get(SETTINGS_KEY)
        if found is None and not self._rows:
            self.add(SETTINGS_KEY, settings)
            return
        found = {} if found is None else found
        differing = [name for name, value in json.loads(json.dumps(settings)).items() if found.get(name) != value]
        if differing:
            raise UserError(
                f"{self.path} holds {what} of another {' and another '.join(differing)}; delete it to start anew, or "
                "run the command again as it was"
            )

    def delete(self) -> None:
        """Remove the file, once its rows are kept elsewhere."""
        self.path.unlink(missing_ok=True)


def _drop_torn_line(path: Path) -> None:
    """Cut a file behind its last line break."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if (end := content.rfind(b"\n") + 1) < len(content):
        log.warning("the last line of %s is unfinished and is dropped", path)
        with path.open("r+b") as file:
            file.truncate(end)
