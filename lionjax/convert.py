# SPDX-License-Identifier: Apache-2.0
"""Weights both ways: one table of rows, read from torch names to our paths and back, strict in both directions.

Nothing is guessed. A tensor without a row, a row without a tensor, a gap in a run of layers, two rows for one tensor, a
wrong shape or a wrong dtype: everything that is wrong is collected and said at once, by name. Numbers keep their exact
bits; a checkpoint's dtype is kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from lionjax import params as trees
from lionjax.interfaces import Params, UserError
from lionjax.weight_rows import (  # noqa: F401  the words that model files use, from one place
    Op,
    Row,
    Template,
    constant,
    conv,
    conv_transpose,
    fused,
    heads_in,
    heads_in_bias,
    heads_out,
    joined,
    linear,
    permuted,
    reshaped,
    same,
    squeeze,
    under,
)

SAID_AT_ONCE = 60  # problems named in one message; the rest are counted


@dataclasses.dataclass(frozen=True)
class Piece:
    """One row at one layer: the torch tensors to read and where in the row's leaves their numbers go."""

    row: Row
    index: tuple[int, ...]  # of the leading axes of the row's leaves
    tensors: tuple[str, ...]  # in the order of the row's names
    tied: tuple[str, ...] = ()  # further names of the single tensor, all present


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do, known from names, shapes and dtypes alone, before any number is read."""

    pieces: tuple[Piece, ...]  # in the order of the table; a leaf's layers follow one another
    made: dict[
        str, tuple[tuple[int, ...], np.dtype]
    ]  # shape and dtype of every leaf (in) or tensor (out)
    ignored: dict[str, str]  # torch name -> the pattern that let it be ignored


def params_from(
    rows: Iterable[Row], state: Mapping, ignore=(), expected: Params | None = None
) -> Params:
    """Torch's tensors -> our tree, bit for bit.

    `state` maps torch names to numpy arrays (they may be memory maps: each is read once). `ignore` holds regular
    expressions of names to pass over, matched whole, before the rows are. `expected` is a tree of anything with shapes
    and dtypes, such as `sharding.abstract` makes: what the leaves must look like. Raises UserError with all problems.
    """
    plan = plan_params(rows, state, ignore, expected)
    flat = {path: np.empty(shape, dtype) for path, (shape, dtype) in plan.made.items()}
    problems: list[str] = []
    for piece in plan.pieces:
        for path, part in zip(piece.row.paths, leaves_of(piece, state, problems)):
            copy_bits(flat[path][(*piece.index, ...)], part)
    refuse(problems, "tensors")
    return trees.unflatten(flat)


def state_from(
    rows: Iterable[Row], params: Params, expected: Params | None = None
) -> dict[str, np.ndarray]:
    """Our tree -> torch's tensors, bit for bit; the inverse of `params_from`. Raises UserError with all problems."""
    flat = trees.flatten(params)
    plan = plan_state(rows, flat, expected)
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    state = {}
    for piece in plan.pieces:
        for name, tensor in tensors_of(piece, flat):
            state[name] = np.ascontiguousarray(tensor).reshape(tensor.shape)
    return state


def plan_params(
    rows: Iterable[Row], state: Mapping, ignore=(), expected: Params | None = None
) -> Plan:
    """The way in, planned from the shapes and dtypes of `state`'s values. Raises UserError with all problems."""
    wanted = None if expected is None else trees.flatten(expected)
    problems: list[str] = []
    ignored = {name: p for name in state for p in ignore if re.fullmatch(p, name)}
    names = [name for name in state if name not in ignored]
    owner: dict[str, Row] = {}
    pieces, made = [], {}
    rows = _distinct_paths(rows, problems)
    for row in rows:
        found = _find(row, names, state, wanted, problems)
        for piece in found:
            for name in (*piece.tensors, *piece.tied):
                if name in owner:
                    problems.append(
                        f"tensor {name!r} has two rows: {owner[name].flax} and {row.flax}"
                    )
                owner[name] = row
        pieces += found
        made |= _leaf_shapes(row, found, state, problems)
    if extra := [name for name in names if name not in owner]:
        problems += [f"tensor {text} has no row" for text in grouped(extra)]
    if wanted is not None:
        problems += _unlike(made, wanted, {path for row in rows for path in row.paths})
    refuse(problems, "the torch tensors")
    return Plan(tuple(pieces), made, ignored)


def plan_state(rows: Iterable[Row], flat: Mapping, expected: Params | None = None) -> Plan:
    """The way out, planned from the shapes and dtypes of the leaves by path. Raises UserError with all problems."""
    problems: list[str] = []
    pieces, made = [], {}
    rows = _distinct_paths(rows, problems)
    for row in rows:
        if missing := [path for path in row.paths if path not in flat]:
            problems += [f"row {row.names[0]!r} finds no parameter {path!r}" for path in missing]
            continue
        sizes = _leading(row, [flat[path] for path in row.paths], problems)
        if sizes is None:
            continue
        shapes = _tensor_shapes(row, [flat[path] for path in row.paths], problems)
        for index in np.ndindex(*sizes):
            filled = tuple(Template.of(name).fill(index) for name in row.names)
            tied = tuple(Template.of(name).fill(index) for name in row.also)
            pieces.append(Piece(row, index, filled, tied))
            for name, shape in zip((*filled, *tied), (*shapes, *shapes * len(tied))):
                if name in made:
                    problems.append(
                        f"tensor {name!r} would be written by two rows, one of them for {row.flax}"
                    )
                made[name] = shape
    known = {path for row in rows for path in row.paths}
    problems += [f"parameter {path!r} has no row" for path in flat if path not in known]
    if expected is not None:
        like = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flat.items()}
        problems += _unlike(like, trees.flatten(expected), set())
    refuse(problems, "the parameters")
    return Plan(tuple(pieces), made, {})


def leaves_of(piece: Piece, state: Mapping, problems: list[str]) -> tuple[np.ndarray, ...]:
    """The parts of the leaves that one piece gives; what its numbers forbid is added to `problems`."""
    tensors = [np.asarray(state[name]) for name in piece.tensors]
    for name in piece.tied:
        if not same_numbers(tensors[0], np.asarray(state[name])):
            problems.append(
                f"tied tensors {piece.tensors[0]!r} and {name!r} hold different numbers"
            )
    try:
        return piece.row.to_flax(*tensors)
    except ValueError as error:
        problems.append(f"tensor {piece.tensors[0]!r}: {error}")
        return ()


def tensors_of(piece: Piece, flat: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """The torch tensors, by name, that one piece writes; a tied tensor comes under each of its names."""
    tensors = piece.row.to_torch(*(flat[path][(*piece.index, ...)] for path in piece.row.paths))
    yield from zip(piece.tensors, tensors)
    yield from ((name, tensors[0]) for name in piece.tied)


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, as plain words of the same size: numpy is slow with bfloat16 and fast with them."""
    if target.dtype != source.dtype:
        raise ValueError(
            f"a {source.dtype} tensor cannot fill a {target.dtype} leaf without rounding"
        )
    word = np.dtype(f"u{target.dtype.itemsize}")
    np.copyto(target.view(word), np.asarray(source).view(word))


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tied tensors agree, bit for bit; if their dtypes differ, after rounding the wider to the narrower."""
    if one.dtype.itemsize > other.dtype.itemsize:
        one, other = other, one
    if one.dtype != other.dtype:
        other = other.astype(one.dtype)
    word = np.dtype(f"u{one.dtype.itemsize}")
    return one.shape == other.shape and np.array_equal(one.view(word), other.view(word))


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ only in their numbers as one line: "blocks.0..38.attn.qkv.bias (39 of them)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    lines = []
    for members in groups.values():
        columns = zip(*(re.findall(r"\d+", name) for name in members))
        spans = []
        for column in columns:
            numbers = sorted({int(number) for number in column})
            run = numbers == list(range(numbers[0], numbers[-1] + 1))
            text = f"{numbers[0]}..{numbers[-1]}" if run else ",".join(map(str, numbers))
            spans.append(text if len(numbers) > 1 else str(numbers[0]))
        numbers = iter(spans)
        text = re.sub(r"\d+", lambda _, numbers=numbers: next(numbers), members[0])
        lines.append(repr(text) + (f" ({len(members)} of them)" if len(members) > 1 else ""))
    return lines


def refuse(problems: list[str], what: str) -> None:
    """Raise one UserError that lists all problems between a table and `what`; nothing when there are none."""
    problems = list(dict.fromkeys(problems))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:SAID_AT_ONCE])
        more = (
            f"\n  and {len(problems) - SAID_AT_ONCE} more" if len(problems) > SAID_AT_ONCE else ""
        )
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} between the weight table and {what}:{shown}{more}")


def _distinct_paths(rows: Iterable[Row], problems: list[str]) -> tuple[Row, ...]:
    rows, seen = tuple(rows), {}
    for row in rows:
        for path in row.paths:
            if path in seen:
                problems.append(
                    f"parameter {path!r} has two rows: {seen[path]!r} and {row.names[0]!r}"
                )
            seen[path] = row.names[0]
    return rows


def _find(row: Row, names: list[str], state: Mapping, wanted, problems: list[str]) -> list[Piece]:
    """The pieces of a row among the names that are there; gaps and absences become problems."""
    columns = [_matches(name, names, state) for name in (*row.names, *row.also)]
    found = set().union(*columns)
    if not found and not row.paths:
        return []
    sizes = [
        1 + max((index[axis] for index in found), default=0) for axis in range(len(row.letters))
    ]
    if wanted is not None and row.paths and row.paths[0] in wanted:
        given = wanted[row.paths[0]].shape[: len(sizes)]
        sizes = [max(size, expected) for size, expected in zip(sizes, given)]
    for axis, letter in enumerate(row.letters):
        sizes[axis] = max(sizes[axis], Template.of(row.names[0]).bound(letter) or 0)
    pieces, absent = [], []
    for index in np.ndindex(*sizes):
        if row.also:
            present = [column[index] for column in columns if index in column]
            filled, tied = present[:1], present[1:]
        else:
            filled, tied = [column[index] for column in columns if index in column], []
        if len(filled) == len(row.names):
            pieces.append(Piece(row, index, tuple(filled), tuple(tied)))
        else:
            absent += [
                Template.of(name).fill(index)
                for name, c in zip(row.names, columns)
                if index not in c
            ]
    problems += [f"row for {row.flax} finds no tensor {text}" for text in grouped(absent)]
    return pieces


def _matches(text: str, names: list[str], state: Mapping) -> dict[tuple[int, ...], str]:
    template = Template.of(text)
    if not template.letters:
        return {(): text} if text in state else {}
    found = ((template.match(name), name) for name in names)
    return {index: name for index, name in found if index is not None}


def _leaf_shapes(row: Row, pieces: list[Piece], state: Mapping, problems: list[str]) -> dict:
    """Shape and dtype of the row's leaves, with the run of layers in front; unlike layers become problems."""
    looks: dict[tuple, list[str]] = {}
    for piece in pieces:
        tensors = [state[name] for name in piece.tensors]
        look = tuple((tuple(w.shape), str(w.dtype)) for w in tensors)
        looks.setdefault(look, []).append(piece.tensors[0])
    if not pieces:
        return {}
    if len(looks) > 1:
        sorts = "; ".join(f"{look} in {grouped(names)[0]}" for look, names in looks.items())
        problems.append(f"the layers of {row.flax} differ: {sorts}")
        return {}
    first = [state[name] for name in pieces[0].tensors]
    if len({str(w.dtype) for w in first}) > 1:
        problems.append(
            f"the tensors {pieces[0].tensors} of one row differ in dtype: {[str(w.dtype) for w in first]}"
        )
        return {}
    try:
        parts = row.to_flax(*(_blank(w.shape, w.dtype) for w in first)) if row.paths else ()
    except (ValueError, IndexError) as error:
        shapes = [tuple(w.shape) for w in first]
        problems.append(
            f"tensor {pieces[0].tensors[0]!r} of shape {shapes} does not fit {row.op.name}: {error}"
        )
        return {}
    sizes = tuple(1 + size for size in pieces[-1].index)
    return {
        path: (sizes + part.shape, part.dtype) for path, part in zip(row.paths, parts, strict=True)
    }


def _leading(row: Row, leaves: list, problems: list[str]) -> tuple[int, ...] | None:
    """How many layers the row's leaves hold along each leading axis, or None with the problem said."""
    depth = len(row.letters)
    sizes = {tuple(leaf.shape[:depth]) for leaf in leaves} or {()}
    bounds = [Template.of(row.names[0]).bound(letter) for letter in row.letters]
    size = next(iter(sizes))
    if len(sizes) > 1 or len(size) < depth:
        problems.append(
            f"the parameters {row.paths} want the same {depth} leading axes for row {row.names[0]!r}"
        )
    elif any(bound is not None and bound != length for bound, length in zip(bounds, size)):
        problems.append(
            f"parameter {row.paths[0]!r} has leading axes {size} but row {row.names[0]!r} wants {bounds}"
        )
    else:
        return size
    return None


def _tensor_shapes(row: Row, leaves: list, problems: list[str]) -> tuple:
    """Shape and dtype of each tensor that the row makes from one layer of its leaves."""
    depth = len(row.letters)
    if len({str(leaf.dtype) for leaf in leaves}) > 1:
        problems.append(
            f"the parameters {row.paths} of one row differ in dtype: {[str(x.dtype) for x in leaves]}"
        )
        return ()
    try:
        tensors = row.to_torch(*(_blank(leaf.shape[depth:], leaf.dtype) for leaf in leaves))
    except (ValueError, IndexError) as error:
        shapes = [tuple(leaf.shape[depth:]) for leaf in leaves]
        problems.append(
            f"parameter {row.paths[0]!r} of shape {shapes} does not fit {row.op.name}: {error}"
        )
        return ()
    return tuple((tuple(w.shape), w.dtype) for w in tensors)


def _blank(shape, dtype) -> np.ndarray:
    """An array of zeros of any size that takes no memory: all its strides are zero."""
    return np.broadcast_to(np.zeros((), np.dtype(dtype)), tuple(shape))


def _unlike(made: Mapping, wanted: Mapping, known: set[str]) -> list[str]:
    """How the leaves differ from what was expected: shapes, integers for floats, paths that only one side has."""
    problems = [
        f"parameter {path!r} has no row"
        for path in wanted
        if path not in made and path not in known
    ]
    for path, (shape, dtype) in made.items():
        if path not in wanted:
            problems.append(f"parameter {path!r} is not part of the model")
            continue
        leaf = wanted[path]
        if tuple(leaf.shape) != shape:
            problems.append(
                f"parameter {path!r} would have shape {shape} where the model wants {tuple(leaf.shape)}"
            )
        if is_float(dtype) != is_float(leaf.dtype):
            problems.append(
                f"parameter {path!r} would be {dtype} where the model wants {leaf.dtype}"
            )
    return problems


def is_float(dtype) -> bool:
    """Whether a dtype holds floating numbers; bfloat16 and the 8-bit floats do, though numpy does not know them."""
    return jax.dtypes.issubdtype(dtype, np.floating)
