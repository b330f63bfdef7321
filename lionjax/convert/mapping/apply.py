# SPDX-License-Identifier: Apache-2.0
"""Tables of rows read both ways, in memory: torch's tensors into our tree, onto a mesh, and back.

Numbers keep their exact bits and their dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from lionjax.convert.mapping.plan import Piece, Plan, plan_params, plan_state, refuse
from lionjax.core import params as trees
from lionjax.core.types import Params
from lionjax.core.weight_map import Row, copy_bits, same_numbers

Parts = Iterator[tuple[str, tuple[int, ...], np.ndarray]]  # (name, index, array): the array is name's [index]
THE_NUMBERS = "the numbers in the torch tensors"


@dataclasses.dataclass(frozen=True)
class Computed:
    """A leaf whose layers are made when they are asked for, by their place on its leading axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layer: Callable[[tuple[int, ...]], np.ndarray]


def params_from(rows: Iterable[Row], state: Mapping, ignore=(), expected: Params | None = None) -> Params:
    """Torch's tensors -> our tree, bit for bit.

    `state` maps torch names to numpy arrays, which may be memory maps. `ignore` and `expected` are those of
    `plan.plan_params`. Raises UserError with all problems.
    """
    plan = plan_params(rows, state, ignore, expected)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.made.items()}
    for path, index, part in leaf_parts(plan, state):
        copy_bits(flat[path][(*index, ...)], part)
    return trees.unflatten(flat)


def state_from(rows: Iterable[Row], params: Params, expected: Params | None = None) -> dict[str, np.ndarray]:
    """Our tree -> torch's tensors, bit for bit; the inverse of `params_from`. Raises UserError with all problems."""
    flat = trees.flatten(params)
    plan = plan_state(rows, flat, expected)
    state = {}
    for name, _, tensor in tensor_parts(plan, flat):
        state[name] = np.empty(tensor.shape, tensor.dtype)
        copy_bits(state[name], tensor)
    return state


def placed_from(rows: Iterable[Row], state: Mapping, like: Params, ignore=()) -> Params:
    """Torch's tensors -> our tree on a mesh; each process reads only the bytes that its shards need.

    `like` is a tree of shapes with shardings, as `sharding.abstract(..., mesh=mesh)` makes; the dtypes are the
    files'. Raises UserError with all problems.
    """
    plan = plan_params(rows, state, ignore, like)
    pieces: dict[str, dict[tuple, Piece]] = {}
    for piece in plan.pieces:
        for path in piece.row.paths:
            pieces.setdefault(path, {})[piece.index] = piece
    problems: list[str] = []

    def place(path, target):
        of_leaf, form = pieces[path], plan.made[path]
        row = next(iter(of_leaf.values())).row
        depth, number = len(row.letters), row.paths.index(path)

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            ranges = [range(size)[part] for size, part in zip(form.shape, where, strict=True)]
            made = np.zeros([len(r) for r in ranges], form.dtype)
            for local in np.ndindex(made.shape[:depth]):
                piece = of_leaf[tuple(r[k] for r, k in zip(ranges, local))]
                for part in leaves_of(piece, state, problems)[number : number + 1]:
                    copy_bits(made[(*local, ...)], part[where[depth:]])
                for name in piece.tied:
                    (part,) = row.to_flax(state[name])
                    _compare(piece, name, made[(*local, ...)], part[where[depth:]], problems)
            return made

        return jax.make_array_from_callback(form.shape, target.sharding, shard)

    placed = {path: place(path, target) for path, target in trees.flatten(like).items()}
    refuse(problems, THE_NUMBERS)
    return trees.unflatten(placed)


def leaf_parts(plan: Plan, state: Mapping, done: Callable = lambda name, array: None) -> Parts:
    """Every part of every leaf, in the order of the table, mostly as a view of a torch tensor.

    `done` gets the name and the array of each tensor that is not needed any more. Raises UserError at the end, with
    all problems that only the numbers show.
    """
    problems: list[str] = []
    for piece in plan.pieces:
        for name in piece.tied:
            _compare(piece, name, state[piece.tensors[0]], state[name], problems)
            done(name, state[name])
        for path, part in zip(piece.row.paths, leaves_of(piece, state, problems)):
            yield path, piece.index, part
        for name in piece.tensors:
            done(name, state[name])
    refuse(problems, THE_NUMBERS)


def leaves_of(piece: Piece, state: Mapping, problems: list[str]) -> tuple[np.ndarray, ...]:
    """The parts of the leaves that one piece gives; what its numbers forbid is added to `problems`."""
    try:
        return piece.row.to_flax(*(np.asarray(state[name]) for name in piece.tensors))
    except ValueError as error:
        problems.append(f"tensor {piece.tensors[0]!r}: {error}")
        return ()


def _compare(piece: Piece, name: str, one: np.ndarray, other: np.ndarray, problems: list[str]) -> None:
    if not same_numbers(np.asarray(one), np.asarray(other)):
        problems.append(f"tied tensors {piece.tensors[0]!r} and {name!r} hold different numbers")


def tensor_parts(plan: Plan, flat: Mapping, done: Callable = lambda path, array: None) -> Parts:
    """Every torch tensor, in the order of the table, a tied one under each of its names.

    `flat` holds leaves by path; they may be on devices. `done` gets the path and the part of a leaf that is not
    needed any more.
    """
    for _, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.row.paths or piece.row.names):
        pieces = list(pieces)
        leaves = {path: flat[path] for path in pieces[0].row.paths}
        leaves = {p: x if isinstance(x, Computed) else np.asarray(x) for p, x in leaves.items()}
        for piece in pieces:
            parts = {path: _part(leaf, piece.index) for path, leaf in leaves.items()}
            tensors = piece.row.to_torch(*parts.values())
            yield from ((name, (), tensor) for name, tensor in zip(piece.tensors, tensors))
            yield from ((name, (), tensors[0]) for name in piece.tied)
            for path in parts:
                if not isinstance(leaves[path], Computed):
                    done(path, parts[path])
            del parts, tensors  # or two pieces would be held while the next is made


def _part(leaf: np.ndarray | Computed, index: tuple[int, ...]) -> np.ndarray:
    return leaf.layer(index) if isinstance(leaf, Computed) else leaf[(*index, ...)]
