# SPDX-License-Identifier: Apache-2.0
"""Apply a weight map in memory: PyTorch state dict to Flax parameters, to sharded parameters, and back, bit for bit."""

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
TENSOR_VALUES = "the values of the torch tensors"


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A parameter whose layers are computed on access; `get_layer` takes their index on the leading axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    get_layer: Callable[[tuple[int, ...]], np.ndarray]


def params_from_state_dict(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, ignore=(), expected: Params | None = None
) -> Params:
    """The parameters of a PyTorch state dict, bit for bit, as numpy arrays.

    `state_dict` maps torch names to numpy arrays, which may be memory maps. `ignore` and `expected` are those of
    `plan.plan_params`. Raises UserError with all problems.
    """
    plan = plan_params(weight_map, state_dict, ignore, expected)
    flat_params = {path: np.empty(spec.shape, spec.dtype) for path, spec in plan.output_specs.items()}
    for path, index, part in iter_param_slices(plan, state_dict):
        copy_bits(flat_params[path][(*index, ...)], part)
    return trees.unflatten(flat_params)


def state_dict_from_params(
    weight_map: Iterable[WeightMapping], params: Params, expected: Params | None = None
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of parameters, bit for bit, as numpy arrays; the inverse of `params_from_state_dict`.

    Raises UserError with all problems.
    """
    flat_params = trees.flatten(params)
    plan = plan_state_dict(weight_map, flat_params, expected)
    state = {}
    for name, _, tensor in iter_torch_tensors(plan, flat_params):
        state[name] = np.empty(tensor.shape, tensor.dtype)
        copy_bits(state[name], tensor)
    return state


def sharded_params_from_state_dict(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, like: Params, ignore=()
) -> Params:
    """The parameters of a PyTorch state dict as jax.Arrays on a mesh; each process reads only the bytes of its shards.

    `like` is a tree of shapes with shardings, as from `sharding.abstract_params(..., mesh=mesh)`; the dtypes are those
    of `state_dict`. Raises UserError with all problems.
    """
    plan = plan_params(weight_map, state_dict, ignore, like)
    mapped_by_path: dict[str, dict[tuple, MappedTensor]] = {}
    for mapped in plan.mapped_tensors:
        for path in mapped.mapping.flax_paths:
            mapped_by_path.setdefault(path, {})[mapped.index] = mapped
    problems: list[str] = []

    def make_leaf(path, target):
        mapped_layers, spec = mapped_by_path[path], plan.output_specs[path]
        mapping = next(iter(mapped_layers.values())).mapping
        depth, leaf_number = len(mapping.index_letters), mapping.flax_paths.index(path)

        def shard(shard_index: tuple[slice, ...]) -> np.ndarray:
            ranges = [range(size)[part] for size, part in zip(spec.shape, shard_index, strict=True)]
            block = np.zeros([len(r) for r in ranges], spec.dtype)
            for local in np.ndindex(block.shape[:depth]):
                mapped = mapped_layers[tuple(r[k] for r, k in zip(ranges, local))]
                for part in to_flax_leaves(mapped, state_dict, problems)[leaf_number : leaf_number + 1]:
                    copy_bits(block[(*local, ...)], part[shard_index[depth:]])
                for name in mapped.tied_keys:
                    (part,) = mapping.to_flax(state_dict[name])
                    _check_tied(mapped, name, block[(*local, ...)], part[shard_index[depth:]], problems)
            return block

        return jax.make_array_from_callback(spec.shape, target.sharding, shard)

    flat_params = {path: make_leaf(path, target) for path, target in trees.flatten(like).items()}
    raise_problems(problems, TENSOR_VALUES)
    return trees.unflatten(flat_params)


def iter_param_slices(
    plan: ConversionPlan, state_dict: Mapping, release: Callable = lambda name, array: None
) -> TensorSlices:
    """Yields every layer of every parameter, in the order of the weight map, mostly as views of torch tensors.

    `release` is called with name and array of each tensor that is no longer needed. Raises UserError at the end, with
    all problems of the tensors' values.
    """
    problems: list[str] = []
    for mapped in plan.mapped_tensors:
        for name in mapped.tied_keys:
            _check_tied(mapped, name, state_dict[mapped.torch_keys[0]], state_dict[name], problems)
            release(name, state_dict[name])
        for path, part in zip(mapped.mapping.flax_paths, to_flax_leaves(mapped, state_dict, problems)):
            yield path, mapped.index, part
        for name in mapped.torch_keys:
            release(name, state_dict[name])
    raise_problems(problems, TENSOR_VALUES)


def to_flax_leaves(mapped_tensor: MappedTensor, state_dict: Mapping, problems: list[str]) -> tuple[np.ndarray, ...]:
    """The layers of the parameters that one mapped tensor yields; () with an entry in `problems` for wrong values."""
    tensors = [np.asarray(state_dict[name]) for name in mapped_tensor.torch_keys]
    if mapped_tensor.dtype is not None:
        tensors = [tensor.astype(mapped_tensor.dtype, copy=False) for tensor in tensors]
    try:
        return mapped_tensor.mapping.to_flax(*tensors)
    except ValueError as error:
        problems.append(f"tensor {mapped_tensor.torch_keys[0]!r}: {error}")
        return ()


def _check_tied(
    mapped_tensor: MappedTensor, tied_key: str, tensor: np.ndarray, tied_tensor: np.ndarray, problems: list[str]
) -> None:
    if not bitwise_equal(np.asarray(tensor), np.asarray(tied_tensor)):
        problems.append(f"tied tensors {mapped_tensor.torch_keys[0]!r} and {tied_key!r} hold different values")


def iter_torch_tensors(
    plan: ConversionPlan, flat_params: Mapping, release: Callable = lambda path, array: None
) -> TensorSlices:
    """Yields every torch tensor, in the order of the weight map, a tied one under each of its names.

    `flat_params` maps paths to arrays, which may be on devices. `release` is called with the path and the layer of a
    parameter that is no longer needed.
    """
    for _, group in itertools.groupby(
        plan.mapped_tensors, key=lambda mapped: mapped.mapping.flax_paths or mapped.mapping.torch_keys
    ):
        group = list(group)
        leaves = {path: flat_params[path] for path in group[0].mapping.flax_paths}
        leaves = {p: x if isinstance(x, LazyTensor) else np.asarray(x) for p, x in leaves.items()}
        for mapped in group:
            parts = {path: _leaf_layer(leaf, mapped.index) for path, leaf in leaves.items()}
            tensors = mapped.mapping.to_torch(*parts.values())
            yield from ((name, (), tensor) for name, tensor in zip(mapped.torch_keys, tensors))
            yield from ((name, (), tensors[0]) for name in mapped.tied_keys)
            for path in parts:
                if not isinstance(leaves[path], LazyTensor):
                    release(path, parts[path])
            del parts, tensors  # otherwise two layers are in memory while the next is computed


def _leaf_layer(leaf: np.ndarray | LazyTensor, index: tuple[int, ...]) -> np.ndarray:
    return leaf.get_layer(index) if isinstance(leaf, LazyTensor) else leaf[(*index, ...)]
