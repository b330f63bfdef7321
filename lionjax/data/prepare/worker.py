# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures into records, a group at a time: checked, tagged where a tagger is given, and never twice."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import Photo, Row, Table
from lionjax.data.datasets.array_record import Known, Tag, known_of

log = logging.getLogger(__name__)


class Worker:
    """Makes records of groups of pictures. What a group's tags were, and what it left out, stands in a file.

    So a preparation that is started again does not ask the tagger again.
    """

    def __init__(self, opened: Table, tag: Callable[[], Tag] | None, folder: Path):
        self.opened, self.make_tag, self.tag, self.folder = opened, tag, None, folder
        self.known = known_of(opened)

    def records(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, record) of the usable ones among these pictures."""
        numbers = range(numbers.start, min(numbers.stop, len(self.known)))
        file = self.folder / f"{numbers.start}-{numbers.stop}.json"
        before = json.loads(file.read_text()) if file.is_file() else None
        tag = None if self.make_tag is None else functools.partial(self._tagged, before)
        found, left_out = usable(self.opened, self.known, numbers, tag)
        tags = [known.photo.tags for _, known in found.values()]
        if before is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps({"tags": tags, "left_out": left_out}))
            part.replace(file)
        for number, (image, known) in found.items():
            yield number, {"id": known.photo.name, "image": image, "truth": known.to_json()}

    def _tagged(self, before: dict | None, seen: Sequence) -> Sequence[Sequence[str]]:
        if before is not None and len(before["tags"]) == len(seen):
            return before["tags"]
        self.tag = self.tag or self.make_tag()
        return self.tag(seen)


def usable(
    opened: Table, known: list[Known], numbers: Iterable[int], tag: Tag | None = None
) -> tuple[dict[int, tuple[bytes, Known]], list[str]]:
    """({number: (picture file, truth)} of some pictures that training will accept, what was left out and why).

    `known`: the truth of every picture, as `known_of` gives it. `tag` looks at the pictures and replaces the tags.
    """
    found, seen, left_out = {}, [], []
    for number in numbers:
        one = known[number]
        try:
            picture, _ = opened.read(number)
            rows = {
                task: [row for row in rows if _good(task, row, one.photo, left_out)] for task, rows in one.rows.items()
            }
            found[number] = opened.path(number).read_bytes(), Known(one.photo, rows, one.outlines)
            seen += [picture] if tag else []
        except UserError as error:
            left_out.append(str(error))
    for number, tags in zip(list(found), tag(seen) if seen else ()):
        image, one = found[number]
        photo = replace(one.photo, tags=tuple(tags))
        found[number] = image, replace(one, photo=photo)
    for reason in left_out:
        log.warning("left out: %s", reason)
    return found, left_out


def _good(task: str, row: Row, photo: Photo, left_out: list[str]) -> bool:
    try:
        annotated_images.ask(task, row, photo, np.random.default_rng(0))
    except UserError as error:
        left_out.append(str(error))
        return False
    return True
