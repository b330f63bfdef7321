# SPDX-License-Identifier: Apache-2.0
"""Fields of config classes under the names of earlier versions: still accepted, and said in one line when used.

A class that renames a field keeps reading it: in JSON, as a keyword of the constructor and of `dataclasses.replace`,
as an attribute, and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
_reported: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Renamed:
    """The field's name of today. `values`: {value as it was: as it is}; values that are not listed did not change."""

    name: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)

    def today(self, value: Any) -> Any:
        """A value of the earlier version as it is written today."""
        try:
            return self.values.get(value, value)
        except TypeError:  # a list from JSON
            return value

    def then(self, value: Any) -> Any:
        """A value of today as the earlier version wrote it."""
        return next((old for old, new in self.values.items() if new == value), value)


def renamed_fields(**renames: str | Renamed):
    """Class decorator: `@renamed_fields(vocab="vocab_size")` above `@dataclass` accepts `vocab` for `vocab_size`."""
    table = {old: new if isinstance(new, Renamed) else Renamed(new) for old, new in renames.items()}

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def init_with_old_names(self, *args, **kwargs):
            for old in table.keys() & kwargs.keys():
                report(cls.__name__, old, table[old].name)
                kwargs[table[old].name] = table[old].today(kwargs.pop(old))
            init(self, *args, **kwargs)

        cls.__init__ = init_with_old_names
        cls.RENAMED_FIELDS = getattr(cls, "RENAMED_FIELDS", {}) | table
        for old, new in table.items():
            if old not in vars(cls):
                setattr(cls, old, property(lambda self, new=new: new.then(getattr(self, new.name))))
        return cls

    return decorate


def renames_of(cls: type) -> Mapping[str, Renamed]:
    """{name of an earlier version: the field of today} of a config class."""
    return getattr(cls, "RENAMED_FIELDS", {})


def report(owner: str, old: str, new: str) -> None:
    """Say once in a process that an old name was used."""
    if f"{owner}.{old}" not in _reported:
        _reported.add(f"{owner}.{old}")
        log.warning("%s.%s is now %s; the old name still works", owner, old, new)
