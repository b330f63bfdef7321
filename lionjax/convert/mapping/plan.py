# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, known from a table, names, shapes and dtypes alone, before any number is read.

Nothing is guessed. A tensor without a row, a row without a tensor, a gap in a run of layers, two rows for one tensor,
a wrong shape or a wrong dtype: everything that is wrong is collected and said at once, by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Row, Template

SAID_AT_ONCE = 60  # problems named in one message; the rest are counted
MOST_LAYERS = 100_000  # of one row; a name with a larger number in it is no layer's


@dataclasses.dataclass(frozen=True)
class Form:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def of(array) -> Form:
        return Form(tuple(array.shape), np.dtype(array.dtype))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One row at one layer: the torch tensors, and where in the row's leaves their numbers stand."""

    row: Row
    index: tuple[int, ...]  # of the leading axes of the row's leaves
    tensors: tuple[str, ...]  # in the order of the row's names
    tied: tuple[str, ...] = ()  # further names of the single tensor (on the way in, those that are there)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All pieces in the order of the table, and the form of every leaf (way in) or tensor (way out) they make."""

    pieces: tuple[Piece, ...]
    made: dict[str, Form]
    ignored: dict[str, str]  # torch name -> the pattern that let it pass


def plan_params(rows: Iterable[Row], state: Mapping, ignore=(), expected: Params | None = None) -> Plan:
    """The way in: what becomes of the tensors in `state`, whose values need only have a shape and a dtype.

    `ignore`: regular expressions of names that are passed over, matched whole, before any row is. `expected`: a tree of
    anything with shapes and dtypes, such as `sharding.abstract` makes. Raises UserError with all problems.
    """
    wanted = None if expected is None else trees.flatten(expected)
    ignored = {name: pattern for name in state for pattern in ignore if re.fullmatch(pattern, name)}
    forms = {name: Form.of(array) for name, array in state.items() if name not in ignored}
    problems: list[str] = []
    owner: dict[str, Row] = {}
    pieces, made = [], {}
    rows = _distinct_paths(rows, problems)
    for row in rows:
        found = _find(row, forms, wanted, problems)
        for name in (name for piece in found for name in (*piece.tensors, *piece.tied)):
            if name in owner:
                problems.append(f"tensor {name!r} has two rows: {owner[name].flax} and {row.flax}")
            owner[name] = row
        pieces += found
        made |= _leaf_forms(row, found, forms, problems)
    problems += [f"tensor {text} has no row" for text in grouped(forms.keys() - owner.keys())]
    if wanted is not None:
        problems += _unlike(made, wanted, {path for row in rows for path in row.paths})
    refuse(problems, "the torch tensors")
    return Plan(tuple(pieces), made, ignored)


def plan_state(rows: Iterable[Row], flat: Mapping, expected: Params | None = None) -> Plan:
    """The way out: what becomes of the leaves in `flat` (by path), whose values need only have a shape and a dtype.

    Raises UserError with all problems.
    """
    problems: list[str] = []
    pieces, made = [], {}
    rows = _distinct_paths(rows, problems)
    for row in rows:
        if missing := [path for path in row.paths if path not in flat]:
            problems += [f"row {row.names[0]!r} finds no parameter {path!r}" for path in missing]
            continue
        leaves = [flat[path] for path in row.paths]
        sizes = _layers(row, leaves, problems)
        forms = () if sizes is None else _tensor_forms(row, leaves, problems)
        if not forms:
            continue
        for index in np.ndindex(*sizes):
            names = tuple(Template.of(name).fill(index) for name in row.names)
            tied = tuple(Template.of(name).fill(index) for name in row.also)
            pieces.append(Piece(row, index, names, tied))
            for name, form in zip((*names, *tied), (*forms, *forms * len(tied))):
                if name in made:
                    problems.append(f"tensor {name!r} has two rows, one of them for {row.flax}")
                made[name] = form
    known = {path for row in rows for path in row.paths}
    problems += [f"parameter {path!r} has no row" for path in flat if path not in known]
    if expected is not None:
        problems += _unlike({path: Form.of(leaf) for path, leaf in flat.items()}, trees.flatten(expected), known)
    refuse(problems, "the parameters")
    return Plan(tuple(pieces), made, {})


def refuse(problems: list[str], what: str) -> None:
    """Raise one UserError that lists all problems between a table and `what`; nothing when there are none."""
    problems = list(dict.fromkeys(problems))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:SAID_AT_ONCE])
        more = f"\n  and {len(problems) - SAID_AT_ONCE} more" if len(problems) > SAID_AT_ONCE else ""
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} between the weight table and {what}:{shown}{more}")


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ only in their numbers as one line: 'blocks.0..38.attn.qkv.bias' (39 of them)."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"[0-9]+", "#", name), []).append(name)
    return [_one_line(members) for members in groups.values()]


def _one_line(names: list[str]) -> str:
    spans = []
    for column in zip(*(re.findall(r"[0-9]+", name) for name in names)):
        numbers = sorted(set(column), key=lambda text: (len(text), text))
        values = [int(number[:9]) for number in numbers]
        run = len(values) > 1 and values == list(range(values[0], values[0] + len(values)))
        spans.append(f"{numbers[0]}..{numbers[-1]}" if run else ",".join(numbers[:12]))
    parts = re.split(r"[0-9]+", names[0])
    text = "".join(part + span for part, span in zip(parts, [*spans, ""]))
    return repr(text) + (f" ({len(names)} of them)" if len(names) > 1 else "")


def is_float(dtype) -> bool:
    """Whether a dtype holds floating numbers; bfloat16 and the 8-bit floats do, though numpy does not know them."""
    return jax.dtypes.issubdtype(dtype, np.floating)


def _distinct_paths(rows: Iterable[Row], problems: list[str]) -> tuple[Row, ...]:
    rows, seen = tuple(rows), {}
    for row in rows:
        for path in row.paths:
            if path in seen:
                problems.append(f"parameter {path!r} has two rows: {seen[path]!r} and {row.names[0]!r}")
            seen[path] = row.names[0]
    return rows


def _find(row: Row, forms: dict[str, Form], wanted, problems: list[str]) -> list[Piece]:
    """The pieces of a row among the names that are there; gaps and absences become problems."""
    columns = [_matches(name, forms) for name in (*row.names, *row.also)]
    found = set().union(*columns)
    if not found and not row.paths:
        return []  # a constant may be missing
    sizes = [1 + max((index[axis] for index in found), default=0) for axis in range(len(row.letters))]
    if wanted is not None and row.paths and row.paths[0] in wanted:
        given = tuple(wanted[row.paths[0]].shape)
        sizes = [max(size, least) for size, least in zip(sizes, (*given, *sizes[len(given) :]))]
    bounds = [Template.of(row.names[0]).bound(letter) or 0 for letter in row.letters]
    sizes = [max(size, bound) for size, bound in zip(sizes, bounds)]
    if math.prod(sizes) > MOST_LAYERS:
        problems.append(f"row for {row.flax} finds {len(found)} layers, numbered up to {[size - 1 for size in sizes]}")
        return []
    pieces, absent = [], []
    for index in np.ndindex(*sizes):
        there = [column[index] for column in columns if index in column]
        count = 1 if row.also else len(row.names)
        if len(there) >= count:
            pieces.append(Piece(row, index, tuple(there[:count]), tuple(there[count:])))
        else:
            absent += [Template.of(name).fill(index) for name, c in zip(row.names, columns) if index not in c]
    problems += [f"row for {row.flax} finds no tensor {text}" for text in grouped(absent)]
    return pieces


def _matches(text: str, forms: dict[str, Form]) -> dict[tuple[int, ...], str]:
    template = Template.of(text)
    if not template.letters:
        return {(): text} if text in forms else {}
    found = ((template.match(name), name) for name in forms)
    return {index: name for index, name in found if index is not None}


def _leaf_forms(row: Row, pieces: list[Piece], forms: dict[str, Form], problems: list[str]) -> dict[str, Form]:
    """The form of the row's leaves, with the run of layers in front; layers that are not alike become problems."""
    kinds: dict[tuple[Form, ...], list[str]] = {}
    for piece in pieces:
        kinds.setdefault(tuple(forms[name] for name in piece.tensors), []).append(piece.tensors[0])
    if len(kinds) > 1:
        sorts = "; ".join(f"{', '.join(map(str, kind))} in {grouped(names)[0]}" for kind, names in kinds.items())
        problems.append(f"the layers for {row.flax} differ: {sorts}")
    if len(kinds) != 1 or not row.paths:
        return {}
    ((kind, (first, *_)),) = kinds.items()
    if len({form.dtype for form in kind}) > 1:
        problems.append(f"the tensors of row {row.names} differ in dtype: {', '.join(map(str, kind))}")
        return {}
    parts = _through(row.to_flax, row.to_torch, kind)
    if isinstance(parts, str):
        problems.append(f"tensor {first!r}, {', '.join(map(str, kind))}, does not fit {row.op.name}: {parts}")
        return {}
    sizes = tuple(1 + size for size in pieces[-1].index)
    return {path: Form(sizes + part.shape, part.dtype) for path, part in zip(row.paths, parts, strict=True)}


def _layers(row: Row, leaves: list, problems: list[str]) -> tuple[int, ...] | None:
    """How many layers the row's leaves hold along each leading axis, or None with the problem said."""
    depth, names = len(row.letters), row.names
    sizes = {tuple(leaf.shape[:depth]) for leaf in leaves} or {()}
    size = next(iter(sizes))
    bounds = [Template.of(names[0]).bound(letter) for letter in row.letters]
    if len(sizes) > 1 or len(size) < depth:
        problems.append(f"parameters {row.paths} want the same {depth} leading axes, for row {names[0]!r}")
    elif any(bound not in (None, length) for bound, length in zip(bounds, size)):
        problems.append(f"parameter {row.paths[0]!r} begins with axes {size} where row {names[0]!r} wants {bounds}")
    else:
        return size
    return None


def _tensor_forms(row: Row, leaves: list, problems: list[str]) -> tuple[Form, ...]:
    """The form of each tensor that the row makes from one layer of its leaves; () with the problem said."""
    kind = [Form(tuple(leaf.shape[len(row.letters) :]), np.dtype(leaf.dtype)) for leaf in leaves]
    text = ", ".join(map(str, kind))
    if len({form.dtype for form in kind}) > 1:
        problems.append(f"parameters {row.paths} of one row differ in dtype: {text}")
        return ()
    parts = _through(row.to_torch, row.to_flax, kind)
    if isinstance(parts, str):
        problems.append(f"parameters {row.paths}, a layer of {text}, do not fit {row.op.name}: {parts}")
        return ()
    return parts


def _through(there, back, forms: Iterable[Form]) -> tuple[Form, ...] | str:
    """The forms that a change of layout gives, or why it gives none. It must lead back to where it came from.

    It is tried on arrays of zeros that take no memory, because all their strides are zero.
    """
    blanks = [np.broadcast_to(np.zeros((), form.dtype), form.shape) for form in forms]
    try:
        made = there(*blanks)
        returned = tuple(map(Form.of, back(*made)))
    except (ValueError, IndexError) as error:
        return str(error)
    if returned != tuple(forms):
        return f"the way back gives {', '.join(map(str, returned))}"
    return tuple(map(Form.of, made))


def _unlike(made: Mapping[str, Form], wanted: Mapping, known: set[str]) -> list[str]:
    """How the leaves differ from what was expected: shapes, integers for floats, paths that only one side has."""
    problems = [f"parameter {path!r} has no row" for path in wanted if path not in made and path not in known]
    for path, form in made.items():
        if path not in wanted:
            problems.append(f"parameter {path!r} is not part of the model")
            continue
        like = Form.of(wanted[path])
        if like.shape != form.shape:
            problems.append(f"parameter {path!r} is {form.shape} where the model wants {like.shape}")
        if is_float(like.dtype) != is_float(form.dtype):
            problems.append(f"parameter {path!r} is {form.dtype} where the model wants {like.dtype}")
    return problems
