# SPDX-License-Identifier: Apache-2.0
"""Reading and writing small files: JSON, JSON Lines, atomic writes, failed downloads, and errors of a full disk."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
from pathlib import Path

from lionjax.core.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:  # the command line imports this module, and `lionjax --help` is to be fast
    from typing import Any

log = logging.getLogger(__name__)

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL_MESSAGES = ("no space left", "file too large", "disk quota")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|title|script|meta)\b", re.I | re.S)
XML_ERROR = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<Error>", re.S)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, its cause or its context reports a full disk, an exceeded quota or file-size limit."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL_ERRNOS:
            return True
        if any(message in str(error).lower() for message in DISK_FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_downloaded(path: Path) -> None:
    """Raise UserError for a file that a download left in place of the real one: a Git LFS pointer or a web page."""
    with path.open("rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, which only names the real file; run `git lfs pull` in its repository, or "
            "download the file itself"
        )
    if WEB_PAGE.match(head) or XML_ERROR.match(head):
        kind = "an HTML page" if WEB_PAGE.match(head) else "an XML error message"
        raise UserError(
            f"{path} is {kind} under the name of a model file: its download failed or needs a login; download it again"
        )


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files in a folder and its subfolders."""
    import hashlib

    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
    return total.hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically: to a temporary name in the same folder, then rename it.

    The content is on disk before the new name is, so that a power loss does not leave an empty file.
    """
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a damaged file to NAME.damaged, or NAME.damaged1 and so on; logs a warning and returns its new path."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    target = next(name for name in names if not name.exists())
    os.replace(path, target)
    log.warning("%s is damaged (%s); it is kept as %s", path, reason, target.name)
    return target


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run writes; {} if it is missing or damaged, with a warning."""
    try:
        content = read_json(path)
    except (UserError, OSError) as error:
        log.warning("%s is damaged and not used (%s)", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def take_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file that is about to be written again; {} if it is missing or damaged.

    A damaged file is set aside, as it may hold figures that a person can read.
    """
    try:
        content = read_json(path)
    except UserError as error:
        set_aside(path, str(error))
        return {}
    if content is not None and not isinstance(content, dict):
        set_aside(path, "it holds no JSON object")
    return content if isinstance(content, dict) else {}


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing. Raises UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is no file. Raises UserError if it is not valid JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # also of bytes that are no UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def update_json(path: Path, fields: dict[str, Any]) -> None:
    """Set fields of the JSON object in a file and keep its other fields; creates the file if it is missing."""
    write_json(path, take_record(path) | fields)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; an empty list if it is missing.

    A truncated last line, from a killed process, is skipped. Raises UserError for any other invalid line.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not valid JSON: {error}") from error
    return rows


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(objects of the lines that are valid, number of the others) of a JSON Lines file; ([], 0) if it is missing."""
    rows, num_damaged = [], 0
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for line in filter(bytes.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_damaged += 1
    return rows, num_damaged


def write_jsonl(path: Path, rows) -> None:
    """Write one JSON object per line, atomically."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())
    finally:
        os.close(file)
