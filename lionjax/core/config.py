# SPDX-License-Identifier: Apache-2.0
"""Config handling: load an `Experiment` from a Python file, override fields, convert to and from JSON.

Configs are frozen dataclasses of numbers, strings, tuples and other configs, without arrays or functions; dtypes are
strings. Every checkpoint stores its config as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import json
import logging
import os
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lionjax.core import class_tags
from lionjax.core.experiment import Experiment
from lionjax.core.renamed import check_given_once, renames_of, report
from lionjax.core.types import UserError

log = logging.getLogger(__name__)
_defaulted: list[str] = []  # fields that the config being read lacks

ALLOWED_PACKAGES = "LIONJAX_ALLOW_PACKAGES"  # environment variable: packages with own classes, separated by ":"
BOOLEAN_WORDS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
CLASS_TO_TAG = {class_path: tag for tag, class_path in class_tags.TAG_TO_CLASS.items()}


def shipped_configs() -> dict[str, Path]:
    """The config files that come with lionjax by name: those of the wheel, or in a clone those of configs/."""
    package = Path(__file__).resolve().parent.parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def find_config(path: str | Path) -> Path:
    """The file of a config: the path of a file, or the name of one that ships, such as "tiny_lion".

    A file goes before a name. Raises UserError if there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(path) in shipped:
        return shipped[str(path)]
    near = difflib.get_close_matches(path.stem, shipped, 1)
    hint = f", such as {near[0]}" if near else ""
    raise UserError(f"no config file {str(path)!r}; give a Python file, or the name of a config that ships{hint}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The `Experiment` from `get_config` of a config (see `find_config`), with `overrides` applied.

    Overrides that have the name of an argument of `get_config` are passed to it: ["--data", "talks.json"]. Raises
    UserError if the file is missing, raises an exception, or does not return an `Experiment` of plain values, and for
    an argument without a default that is not given.
    """
    path = find_config(path)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        arguments, overrides = ({}, overrides) if get_config is None else _config_arguments(path, get_config, overrides)
        experiment = None if get_config is None else get_config(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} fails with {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} must define a function get_config() that returns an Experiment")
    allow_packages(*_class_packages(experiment) - {"lionjax"})  # the file has imported them
    # The JSON round trip turns lists into tuples and checks every value against the type of its field.
    return apply_overrides(from_json(to_json(experiment)), overrides)


def _config_arguments(path: Path, get_config, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `get_config` among the overrides (texts and numbers), and the other overrides."""
    hints = {name: hint for name, hint in typing.get_type_hints(get_config).items() if hint in (str, int, float, bool)}
    parameters = {name: one for name, one in inspect.signature(get_config).parameters.items() if name in hints}
    arguments, others = {}, []
    for name, values in _group_arguments(overrides):
        if name not in parameters:
            others += [f"--{name}", *values]
        elif name in arguments:
            raise UserError(f"--{name} is given twice; give it once")
        else:
            arguments[name] = _parse_value(values, hints[name], name)
    required = [name for name, one in parameters.items() if one.default is one.empty]
    if missing := [f"--{name}" for name in required if name not in arguments]:
        description = (inspect.getdoc(get_config) or "").partition("\n\n")[0].replace("\n", " ")
        raise UserError(f"the config {path.stem} needs {' and '.join(missing)}. {description}".strip())
    return arguments, others


def apply_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """The config with fields replaced: ["--stages.0.steps", "20", "--model.language.width", "64"].

    Elements of a tuple of configs are addressed by index; values of other tuples are listed, as in
    `--stages.0.mixture vqa 1 caption 2`. Raises UserError for an unknown field (naming the closest one), for a value of
    the wrong type, and for a field under both its old and its current name.
    """
    hints = {path: hint for path, hint, _ in leaf_fields(config)}
    changes, names = {}, {}
    for name, values in _group_arguments(overrides):
        path, values = _from_old_name(config, name, values)
        path = _resolve_field(config, path)
        if names.setdefault(path, name) != name:
            raise UserError(f"--{names[path]} and --{name} are two names of one field; give --{path} only")
        changes[path] = _parse_value(values, hints[path], path)
    return _replace_fields(config, changes, type(config).__name__)


def _has_words(kind: Any) -> bool:
    """Whether a config class can be written as words: such a value is one field to the command line."""
    return isinstance(kind, type) and hasattr(kind, "from_words")


def _parse_value(arguments: list[str], hint: Any, path: str) -> Any:
    (kind, *_) = typing.get_args(hint) or (None,)
    if _has_words(kind):  # pairs of words
        if len(arguments) % 2:
            raise UserError(f"{path} must be pairs, such as vqa 1 caption 2, got {' '.join(arguments)!r}")
        try:
            return tuple(kind.from_words(*pair) for pair in zip(arguments[::2], arguments[1::2]))
        except ValueError:
            raise UserError(f"{path} must be {_type_name(hint)}, got {' '.join(arguments)!r}") from None
    if hint is bool and len(arguments) == 1 and arguments[0].strip().lower() in BOOLEAN_WORDS:
        return BOOLEAN_WORDS[arguments[0].strip().lower()]
    if "bool" in str(hint):  # tyro knows only True and False
        arguments = [word.title() if word.lower() in ("true", "false") else word for word in arguments]
    import tyro

    output = io.StringIO()  # hides tyro's own error message
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(hint, args=arguments)
    except SystemExit:
        raise UserError(f"{path} must be {_type_name(hint)}, got {' '.join(arguments)!r}") from None


def _replace_fields(config: Any, changes: dict[str, Any], path: str) -> Any:
    """The config with all {path: value} replaced at once, because some values are valid only together."""
    fields: dict[str, Any] = {}
    for name, value in _field_items(config):
        nested = {p.removeprefix(name + "."): v for p, v in changes.items() if p.startswith(name + ".")}
        value = _replace_fields(value, nested, f"{path}.{name}") if nested else changes.get(name, value)
        field, in_tuple, _ = name.partition(".")
        fields[field] = (*fields.get(field, ()), value) if in_tuple else value
    return _construct(type(config), fields, path)


def _construct(cls: type, fields: dict[str, Any], path: str) -> Any:
    try:
        return cls(**fields)
    except ValueError as error:  # from a check in __post_init__
        raise UserError(f"{path}: {error}") from error


def _group_arguments(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise UserError(f"{argument!r} is not a field; set fields as in --stages.0.steps 20")
    return groups


def _from_old_name(config: Any, name: str, values: list[str]) -> tuple[str, list[str]]:
    """The dotted field name and its values with old names (see `renamed`) replaced by current ones."""
    node, parts = config, name.split(".")
    for k, part in enumerate(parts):
        if isinstance(node, tuple):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
            continue
        if not dataclasses.is_dataclass(node):
            break
        if renamed := renames_of(type(node)).get(part):
            report(type(node).__name__, part, renamed.name)
            parts[k] = renamed.name
            if k == len(parts) - 1:
                new_values = {str(old): str(new) for old, new in renamed.values.items()}
                values = [new_values.get(value, value) for value in values]
        node = getattr(node, parts[k], None)
    return ".".join(parts), values


def _resolve_field(config: Any, name: str) -> str:
    paths = [path for path, _, _ in leaf_fields(config)]
    if name in paths:
        return name
    nested = [path for path in paths if path.startswith(name + ".")]
    close = [path for path in paths if path.endswith("." + name)]
    close = close or difflib.get_close_matches(name, paths, n=1)
    if nested:
        raise UserError(f"{name} has several fields; set one of them, such as --{nested[0]}")
    hint = f"; did you mean {close[0]!r}?" if close else "; `lionjax show CONFIG` prints all fields"
    raise UserError(f"{type(config).__name__} has no field {name!r}{hint}")


def leaf_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, type, value) of every field that is not a config itself, such as ("stages.0.steps", int, 20)."""
    hints = typing.get_type_hints(type(config))
    for name, value in _field_items(config):
        if dataclasses.is_dataclass(value):
            yield from leaf_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name], value


def _field_items(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields; elements of a tuple of configs are named "stages.0", "stages.1", ..."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items = value if isinstance(value, tuple) else ()
        if items and all(dataclasses.is_dataclass(item) and not _has_words(type(item)) for item in items):
            yield from ((f"{field.name}.{index}", item) for index, item in enumerate(items))
        else:
            yield field.name, value


def format_config(config: Any) -> str:
    """The config as a typed, indented tree for printing."""
    return "\n".join([type(config).__name__, *_format_lines(config, "  ")])


def _format_lines(config: Any, indent: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for name, value in _field_items(config):
        if dataclasses.is_dataclass(value):
            yield f"{indent}{name}: {type(value).__name__}"
            yield from _format_lines(value, indent + "  ")
        else:
            (kind, *_) = typing.get_args(hints[name]) or (None,)
            shown = tuple(map(tuple, value)) if _has_words(kind) else value  # as on the command line
            yield f"{indent}{name}: {_type_name(hints[name])} = {shown!r}"


def diff_configs(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{path: (old value, new value)} of the fields that differ; the value of an absent field is None."""
    old_values, new_values = _flatten_fields(old), _flatten_fields(new)
    paths = list(old_values) + [path for path in new_values if path not in old_values]
    pairs = {path: (old_values.get(path), new_values.get(path)) for path in paths}
    return {path: (a, b) for path, (a, b) in pairs.items() if a != b}


def _flatten_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    flat = {prefix + "class": type(config).__name__}
    for name, value in _field_items(config):
        nested = dataclasses.is_dataclass(value)
        flat |= _flatten_fields(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def to_json(config: Any) -> str:
    """The config as JSON text for `from_json`; each dataclass has its class tag under "class" (see `class_tags`).

    A class of another package is written as "module:class". Raises UserError for a value that is not a number, a
    string, a tuple or a dataclass, and for a dataclass that no module has.
    """
    return json.dumps(_to_plain(config, type(config).__name__), indent=1)


def _to_plain(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        class_path = f"{kind.__module__}:{kind.__qualname__}"
        if kind.__module__ == "<run_path>" or "<locals>" in class_path:
            raise UserError(
                f"{path} is a {kind.__name__}, which no module defines; move the class from the config file into a "
                "package that can be imported, so that a run of it can be loaded"
            )
        name = CLASS_TO_TAG.get(class_path, class_path)
        names = [field.name for field in dataclasses.fields(value)]
        return {"class": name} | {n: _to_plain(getattr(value, n), f"{path}.{n}") for n in names}
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{path}.{index}") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = type(value).__name__
    raise UserError(f"{path} is a {kind}; it must be a number, a string, a tuple or a config")


def from_json(text: str) -> Any:
    """The config in JSON text from `to_json`. Only dataclasses of lionjax and of allowed packages are constructed.

    Missing fields, such as those of later versions, take their defaults; a process logs once which ones. Raises
    UserError for an unknown field, a missing field without a default, a value of the wrong type, and text that is not a
    config.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"the config is not valid JSON: {error}") from error
    if not isinstance(tree, dict) or "class" not in tree:
        raise UserError("the config must be a JSON object with the key 'class'")
    _defaulted.clear()
    value = _from_plain(dict(tree), str(tree["class"]).rpartition(".")[2])
    _report_defaults(tuple(_defaulted))
    return value


@functools.cache
def _report_defaults(paths: tuple[str, ...]) -> None:
    if paths:
        log.warning(
            "the config lacks fields of this version (%d), which are at their defaults: %s",
            len(paths),
            ", ".join(paths),
        )


def _from_plain(tree: dict[str, Any], path: str) -> Any:
    kind = _resolve_class(tree.pop("class", None), path)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_given_once(kind, tree, f"{path}: ")
    for old, renamed in renames_of(kind).items():
        if old in tree and old not in fields:
            tree[renamed.name] = renamed.today(tree.pop(old))
    for name in tree:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{path}: {kind.__name__} has no field {name!r}{hint}")
    for name, field in fields.items():
        if name not in tree and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}: field {name!r} of {kind.__name__} is missing")
        if name not in tree:
            _defaulted.append(f"{path}.{name}")
    values = {name: _coerce_type(tree[name], hints[name], f"{path}.{name}") for name in tree}
    return _construct(kind, values, path)


def allow_packages(*names: str) -> None:
    """Let configs in JSON use classes of these packages, which are imported then; processes started from here too."""
    os.environ[ALLOWED_PACKAGES] = ":".join(dict.fromkeys([*_allowed_packages(), *names]))


def _allowed_packages() -> list[str]:
    return [name for name in os.environ.get(ALLOWED_PACKAGES, "").split(":") if name]


def _class_packages(value: Any) -> set[str]:
    """The packages of all dataclasses in a config."""
    if isinstance(value, list | tuple):
        return set().union(*map(_class_packages, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return set()
    inner = (_class_packages(getattr(value, field.name)) for field in dataclasses.fields(value))
    return {type(value).__module__.partition(".")[0]}.union(*inner)


def _resolve_class(name: Any, path: str) -> type:
    tag = class_tags.LEGACY_CLASS_TO_TAG.get(str(name), str(name))
    module, _, class_name = class_tags.TAG_TO_CLASS.get(tag, str(name)).partition(":")
    package, kind = module.partition(".")[0], None
    if package in ("lionjax", *_allowed_packages()):
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(module), class_name, None)
    elif class_name and module.replace(".", "").isidentifier():
        raise UserError(
            f"{path} is {name!r}, a class of the package {package!r}; if you trust this package, set "
            f"{ALLOWED_PACKAGES}={package} to let it be imported"
        )
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        where = f"of {package!r}" if package in _allowed_packages() else "of this lionjax version"
        raise UserError(f"{path}: {name!r} is not a config class {where}")
    return kind


def _coerce_type(value: Any, hint: Any, path: str) -> Any:
    """A JSON value converted to the type of its field: list to tuple, int to float. Raises UserError otherwise."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, dict):
        return _check_type(_from_plain(dict(value), path), hint, path)
    if isinstance(value, list) and _has_words(hint) and len(value) == 2:
        return hint.from_words(*value)
    if hint in (object, Any):
        is_list = isinstance(value, list)
        return tuple(_coerce_type(item, Any, path) for item in value) if is_list else value
    if origin in (typing.Union, types.UnionType):
        for kind in sorted(kinds, key=lambda kind: kind is not type(value)):  # try the exact type first
            with contextlib.suppress(UserError):
                return _coerce_type(value, kind, path)
    elif origin is tuple and isinstance(value, list):
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(_coerce_type(v, k, f"{path}.{i}") for i, (v, k) in enumerate(zip(value, kinds)))
    elif hint is float and type(value) is int:
        return float(value)
    return _check_type(value, hint, path)


def _check_type(value: Any, hint: Any, path: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kind in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind in (object, Any) or type(value) is kind:
            return value
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
            return value
    raise UserError(f"{path} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("NoneType", "None")
