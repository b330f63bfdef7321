# SPDX-License-Identifier: Apache-2.0
"""An experiment as one value: frozen dataclasses built by a plain Python file.

It is changed from the command line, written beside every checkpoint as JSON, and read back.
Nothing in it is an array or a function; dtypes are strings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import logging
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lionjax.core import class_tags
from lionjax.core.experiment import Experiment
from lionjax.core.types import UserError

log = logging.getLogger(__name__)

TAG_OF = {home: tag for tag, home in class_tags.HOMES.items()}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a Python file with `get_config() -> Experiment`, with `overrides` applied.

    Raises UserError when the file is missing, fails, or builds no experiment of plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file {str(path)!r}; a config is a Python file, see configs/")
    try:
        names = runpy.run_path(str(path))
        experiment = names["get_config"]() if "get_config" in names else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} fails with {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} wants a function get_config() that returns an Experiment")
    # Through JSON lists become tuples, and every value is held to its field's type.
    return override(from_json(to_json(experiment)), overrides)


def override(config: Any, arguments: Sequence[str]) -> Any:
    """A config with fields replaced: ["--stages.0.steps", "20", "--system.t5.width", "64"].

    Tuples of configs are entered by position; a tuple's values follow each other, as in
    `--stages.0.mixture vqa 1 caption 2`. Raises UserError for an unknown field (with the nearest
    one) and for a value of another type.
    """
    hints = {path: hint for path, hint, _ in leaves(config)}
    changes = {}
    for name, values in _groups(arguments):
        path = _known(config, name)
        changes[path] = _parse(values, hints[path], path)
    return _replaced(config, changes, type(config).__name__)


def _parse(words: list[str], hint: Any, where: str) -> Any:
    import tyro

    quiet = io.StringIO()  # tyro draws its errors in boxes; ours are a sentence
    try:
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            return tyro.cli(hint, args=words)
    except SystemExit:
        raise UserError(f"{where} wants {_words(hint)}, got {' '.join(words)!r}") from None


def _replaced(config: Any, changes: dict[str, Any], where: str) -> Any:
    """The config with {path: value} put in, all at once: some are right only together."""
    fields: dict[str, Any] = {}
    for name, value in _parts(config):
        inside = {p.removeprefix(name + "."): v for p, v in changes.items() if p.startswith(name + ".")}
        value = _replaced(value, inside, f"{where}.{name}") if inside else changes.get(name, value)
        field, in_tuple, _ = name.partition(".")
        fields[field] = (*fields.get(field, ()), value) if in_tuple else value
    return _made(type(config), fields, where)


def _made(kind: type, fields: dict[str, Any], where: str) -> Any:
    try:
        return kind(**fields)
    except ValueError as error:  # of a config that looks at its own fields
        raise UserError(f"{where}: {error}") from error


def _groups(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"{word!r} stands alone; fields are set as in --stages.0.steps 20")
    return groups


def _known(config: Any, name: str) -> str:
    paths = [path for path, _, _ in leaves(config)]
    if name in paths:
        return name
    inside = [path for path in paths if path.startswith(name + ".")]
    near = [path for path in paths if path.endswith("." + name)]
    near = near or difflib.get_close_matches(name, paths, n=1)
    if inside:
        raise UserError(f"{name} holds several fields; set one of them, such as --{inside[0]}")
    hint = f"; did you mean {near[0]!r}?" if near else "; `lionjax show CONFIG` prints all fields"
    raise UserError(f"{type(config).__name__} has no field {name!r}{hint}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, type, value) of every field without a config in it: ("stages.0.steps", int, 20)."""
    hints = typing.get_type_hints(type(config))
    for name, value in _parts(config):
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name], value


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields; a tuple of configs comes as "stages.0", "stages.1", ..."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inside = value if isinstance(value, tuple) else ()
        if inside and all(dataclasses.is_dataclass(item) for item in inside):
            yield from ((f"{field.name}.{index}", item) for index, item in enumerate(inside))
        else:
            yield field.name, value


def show(config: Any) -> str:
    """The resolved config as a typed, indented tree, for people."""
    return "\n".join([type(config).__name__, *_lines(config, "  ")])


def _lines(config: Any, space: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for name, value in _parts(config):
        if dataclasses.is_dataclass(value):
            yield f"{space}{name}: {type(value).__name__}"
            yield from _lines(value, space + "  ")
        else:
            yield f"{space}{name}: {_words(hints[name])} = {value!r}"


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{path: (old value, new value)} of the fields that differ.

    A field that only one side has stands against None.
    """
    before, after = _flat(old), _flat(new)
    paths = list(before) + [path for path in after if path not in before]
    pairs = {path: (before.get(path), after.get(path)) for path in paths}
    return {path: (a, b) for path, (a, b) in pairs.items() if a != b}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    flat = {prefix + "class": type(config).__name__}
    for name, value in _parts(config):
        inside = dataclasses.is_dataclass(value)
        flat |= _flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


def to_json(config: Any) -> str:
    """A config as JSON text for `from_json`; each dataclass carries its class tag (see `class_tags`)."""
    return json.dumps(_plain(config, type(config).__name__), indent=1)


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        home = f"{kind.__module__}:{kind.__qualname__}"
        if not home.startswith("lionjax."):
            raise UserError(f"{where} is a {kind.__name__}; it wants a dataclass of lionjax's own")
        name = TAG_OF.get(home, home)
        names = [field.name for field in dataclasses.fields(value)]
        return {"class": name} | {n: _plain(getattr(value, n), f"{where}.{n}") for n in names}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = type(value).__name__
    raise UserError(f"{where} holds a {kind}; configs hold numbers, text, tuples and other configs")


def from_json(text: str) -> Any:
    """The config that `to_json` wrote. Only dataclasses of lionjax are built.

    A field that the text lacks takes its default, which is logged. Raises UserError for an unknown
    field, a missing one without default, a value of another type, and text that is no config.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"the config is no JSON: {error}") from error
    if not isinstance(tree, dict) or "class" not in tree:
        raise UserError("the config wants a JSON object with the key 'class'")
    return _build(dict(tree), str(tree["class"]).rpartition(".")[2])


def _build(tree: dict[str, Any], where: str) -> Any:
    kind = _class(tree.pop("class", None), where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: {kind.__name__} has no field {name!r}{hint}")
    for name, field in fields.items():
        if name not in tree and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: field {name!r} of {kind.__name__} is missing")
        if name not in tree:
            log.warning("%s: field %r is missing and takes its default", where, name)
    values = {name: _typed(tree[name], hints[name], f"{where}.{name}") for name in tree}
    return _made(kind, values, where)


def _class(name: Any, where: str) -> type:
    home = class_tags.HOMES.get(class_tags.EARLIER.get(str(name), str(name)), str(name))
    module, _, last = home.partition(":")
    kind = None
    if module.split(".")[0] == "lionjax":
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(module), last, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{where}: {name!r} is no config class of this version of lionjax")
    return kind


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value from JSON as its field wants it: a tuple for a list, a float for a whole number."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, dict):
        return _fits(_build(dict(value), where), hint, where)
    if hint in (object, Any):
        many = isinstance(value, list)
        return tuple(_typed(item, Any, where) for item in value) if many else value
    if origin in (typing.Union, types.UnionType):
        for kind in sorted(kinds, key=lambda kind: kind is not type(value)):  # the exact type first
            with contextlib.suppress(UserError):
                return _typed(value, kind, where)
    elif origin is tuple and isinstance(value, list):
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(_typed(v, k, f"{where}.{i}") for i, (v, k) in enumerate(zip(value, kinds)))
    elif hint is float and type(value) is int:
        return float(value)
    return _fits(value, hint, where)


def _fits(value: Any, hint: Any, where: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kind in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind in (object, Any) or type(value) is kind:
            return value
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
            return value
    raise UserError(f"{where} wants {_words(hint)}, got {value!r}")


def _words(hint: Any) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("NoneType", "None")
