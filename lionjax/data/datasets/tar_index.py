# SPDX-License-Identifier: Apache-2.0
"""Where the files of a tar lie in it: read once from its headers, then kept beside it or in a cache folder.

Nothing is unpacked: the names of members are labels, links and devices are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from lionjax.core.files import write_atomic
from lionjax.core.types import UserError

log = logging.getLogger(__name__)

FORMAT = 1
BLOCK = 512
INDEX_SUFFIX = ".index.json"


class Member(NamedTuple):
    """A file in a tar: its bytes are `size` from `offset` on. `problem`: why it cannot be read."""

    name: str
    offset: int
    size: int
    problem: str = ""


class Span(NamedTuple):
    """The place of the bytes of a member."""

    file: str
    offset: int
    size: int


def read_span(span: Span, max_bytes: int) -> bytes:
    """The bytes of a member. Raises UserError if they are more than `max_bytes`, or the file became shorter."""
    if span.size > max_bytes:
        raise UserError(f"a file in {span.file} is larger than {max_bytes >> 20} MiB; make it smaller")
    try:
        with open(span.file, "rb") as file:
            file.seek(span.offset)
            data = file.read(span.size)
    except OSError as error:
        raise UserError(f"{span.file} cannot be read ({error}); check the path") from error
    if len(data) != span.size:
        raise UserError(f"{span.file} became shorter since it was opened; download it again")
    return data


def members(tar: Path) -> list[Member]:
    """The files in a tar, in order, from its index if that is of this very file, else from its headers.

    Raises UserError for a tar that is compressed, cut off or damaged.
    """
    state = tar.stat()
    identity = {"format": FORMAT, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
    places = (tar.with_name(tar.name + INDEX_SUFFIX), _cache_file(tar))
    for place in places:
        if (kept := _read_index(place, identity)) is not None:
            return kept
    found = _scan(tar, state.st_size)
    content = json.dumps(identity | {"members": found})
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, content)
            break
    else:
        log.warning("the index of %s cannot be kept; its headers are read each time it is opened", tar)
    return found


def _cache_file(tar: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lionjax" / "tar_index"
    return folder / f"{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}-{tar.name}{INDEX_SUFFIX}"


def _read_index(path: Path, identity: dict[str, int]) -> list[Member] | None:
    """The members in an index; None if it is missing, damaged or of another state of the tar."""
    try:
        content = json.loads(path.read_bytes())
        rows = [Member(*row) for row in content.pop("members")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    is_sound = all(
        isinstance(row.name, str)
        and isinstance(row.problem, str)
        and type(row.offset) is type(row.size) is int
        and 0 <= row.offset <= row.offset + row.size <= identity["bytes"]
        for row in rows
    )
    return rows if is_sound and content == identity else None


def _scan(tar: Path, num_bytes: int) -> list[Member]:
    found: list[Member] = []
    damaged = f"{tar} is cut off or damaged behind its file number"
    try:
        with tarfile.open(tar, "r:") as file:
            start = -1
            while (info := file.next()) is not None:
                if info.offset <= start or info.size < 0:  # sizes below 0 would lead back
                    raise UserError(f"{damaged} {len(found)}; download it again")
                start = info.offset
                file.members = []  # which would keep all headers in memory
                if info.isdir():
                    continue
                end = info.offset_data + info.size
                is_plain = info.isreg() and not info.issparse()
                kind = "a link" if info.islnk() or info.issym() else "no plain file"
                if is_plain and end > num_bytes:
                    raise UserError(f"{damaged} {len(found)}; download it again")
                span = (info.offset_data, info.size) if is_plain else (0, 0)
                found.append(Member(info.name, *span, "" if is_plain else f"{kind}; pack the file itself"))
            file.fileobj.seek(file.offset)
            if file.fileobj.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"{damaged} {len(found)}; download it again")
    except tarfile.ReadError as error:
        with tar.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        mend = "; decompress it first, as files are read at their places" if is_gzip else "; download it again"
        reason = "it is compressed" if is_gzip else error
        raise UserError(f"{tar} cannot be read as a tar ({reason}){mend}") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{damaged} {len(found)} ({error}); download it again") from error
    return found
