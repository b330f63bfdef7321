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

from lionjax.convert.mapping.plan import ConversionPlan, MappedTensor, plan_params, plan_state_dict, raise_problems
from lionjax.core import params as trees
from lionjax.core.types import Params
from lionjax.core.weight_map import WeightMapping, bitwise_equal, copy_bits

TensorSlices = Iterator[tuple[str, tuple[int, ...], np.ndarray]]  # (name, index, array): the array is name's [index]
TENSOR_VALUES = "the numbers in the torch tensors"


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A leaf whose layers are made when they are asked for, by their place on its leading axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    get_layer: Callable[[tuple[int, ...]], np.ndarray]


def params_from_state_dict(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, ignore=(), expected: Params | None = None
) -> Params:
    """Torch's tensors -> our tree, bit for bit.

    `state` maps torch names to numpy arrays, which may be memory maps. `ignore` and `expected` are those of
    `plan.plan_params`. Raises UserError with all problems.
    """
    plan = plan_params(weight_map, state_dict, ignore, expected)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.output_specs.items()}
    for path, index, part in iter_param_slices(plan, state_dict):
        copy_bits(flat[path][(*index, ...)], part)
    return trees.unflatten(flat)


def state_dict_from_params(
    weight_map: Iterable[WeightMapping], params: Params, expected: Params | None = None
) -> dict[str, np.ndarray]:
    """Our tree -> torch's tensors, bit for bit; the inverse of `params_from`. Raises UserError with all problems."""
    flat = trees.flatten(params)
    plan = plan_state_dict(weight_map, flat, expected)
    state = {}
    for name, _, tensor in iter_torch_tensors(plan, flat):
        state[name] = np.empty(tensor.shape, tensor.dtype)
        copy_bits(state[name], tensor)
    return state


def sharded_params_from_state_dict(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, like: Params, ignore=()
) -> Params:
    """Torch's tensors -> our tree on a mesh; each process reads only the bytes that its shards need.

    `like` is a tree of shapes with shardings, as `sharding.abstract(..., mesh=mesh)` makes; the dtypes are the
    files'. Raises UserError with all problems.
    """
    plan = plan_params(weight_map, state_dict, ignore, like)
    pieces: dict[str, dict[tuple, MappedTensor]] = {}
    for piece in plan.mapped_tensors:
        for path in piece.mapping.flax_paths:
            pieces.setdefault(path, {})[piece.index] = piece
    problems: list[str] = []

    def place(path, target):
        of_leaf, form = pieces[path], plan.output_specs[path]
        row = next(iter(of_leaf.values())).mapping
        depth, number = len(row.index_letters), row.flax_paths.index(path)

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            ranges = [range(size)[part] for size, part in zip(form.shape, where, strict=True)]
            made = np.zeros([len(r) for r in ranges], form.dtype)
            for local in np.ndindex(made.shape[:depth]):
                piece = of_leaf[tuple(r[k] for r, k in zip(ranges, local))]
                for part in to_flax_leaves(piece, state_dict, problems)[number : number + 1]:
                    copy_bits(made[(*local, ...)], part[where[depth:]])
                for name in piece.tied_keys:
                    (part,) = row.to_flax(state_dict[name])
                    _check_tied(piece, name, made[(*local, ...)], part[where[depth:]], problems)
            return made

        return jax.make_array_from_callback(form.shape, target.sharding, shard)

    placed = {path: place(path, target) for path, target in trees.flatten(like).items()}
    raise_problems(problems, TENSOR_VALUES)
    return trees.unflatten(placed)


def iter_param_slices(
    plan: ConversionPlan, state_dict: Mapping, release: Callable = lambda name, array: None
) -> TensorSlices:
    """Every part of every leaf, in the order of the table, mostly as a view of a torch tensor.

    `done` gets the name and the array of each tensor that is not needed any more. Raises UserError at the end, with
    all problems that only the numbers show.
    """
    problems: list[str] = []
    for piece in plan.mapped_tensors:
        for name in piece.tied_keys:
            _check_tied(piece, name, state_dict[piece.torch_keys[0]], state_dict[name], problems)
            release(name, state_dict[name])
        for path, part in zip(piece.mapping.flax_paths, to_flax_leaves(piece, state_dict, problems)):
            yield path, piece.index, part
        for name in piece.torch_keys:
            release(name, state_dict[name])
    raise_problems(problems, TENSOR_VALUES)


def to_flax_leaves(mapped_tensor: MappedTensor, state_dict: Mapping, problems: list[str]) -> tuple[np.ndarray, ...]:
    """The parts of the leaves that one piece gives; what its numbers forbid is added to `problems`."""
    try:
        return mapped_tensor.mapping.to_flax(*(np.asarray(state_dict[name]) for name in mapped_tensor.torch_keys))
    except ValueError as error:
        problems.append(f"tensor {mapped_tensor.torch_keys[0]!r}: {error}")
        return ()


def _check_tied(
    mapped_tensor: MappedTensor, tied_key: str, tensor: np.ndarray, tied_tensor: np.ndarray, problems: list[str]
) -> None:
    if not bitwise_equal(np.asarray(tensor), np.asarray(tied_tensor)):
        problems.append(f"tied tensors {mapped_tensor.torch_keys[0]!r} and {tied_key!r} hold different numbers")


def iter_torch_tensors(
    plan: ConversionPlan, flat_params: Mapping, release: Callable = lambda path, array: None
) -> TensorSlices:
    """Every torch tensor, in the order of the table, a tied one under each of its names.

    `flat` holds leaves by path; they may be on devices. `done` gets the path and the part of a leaf that is not
    needed any more.
    """
    for _, pieces in itertools.groupby(
        plan.mapped_tensors, key=lambda piece: piece.mapping.flax_paths or piece.mapping.torch_keys
    ):
        pieces = list(pieces)
        leaves = {path: flat_params[path] for path in pieces[0].mapping.flax_paths}
        leaves = {p: x if isinstance(x, LazyTensor) else np.asarray(x) for p, x in leaves.items()}
        for piece in pieces:
            parts = {path: _leaf_layer(leaf, piece.index) for path, leaf in leaves.items()}
            tensors = piece.mapping.to_torch(*parts.values())
            yield from ((name, (), tensor) for name, tensor in zip(piece.torch_keys, tensors))
            yield from ((name, (), tensors[0]) for name in piece.tied_keys)
            for path in parts:
                if not isinstance(leaves[path], LazyTensor):
                    release(path, parts[path])
            del parts, tensors  # or two pieces would be held while the next is made


def _leaf_layer(leaf: np.ndarray | LazyTensor, index: tuple[int, ...]) -> np.ndarray:
    return leaf.get_layer(index) if isinstance(leaf, LazyTensor) else leaf[(*index, ...)]
