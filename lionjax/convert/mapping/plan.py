# SPDX-License-Identifier: Apache-2.0
"""Conversion plans, made from a weight map, tensor names, shapes and dtypes before any value is read.

A tensor without a mapping, a mapping without a tensor, a missing layer, two mappings for one tensor, a wrong shape or
dtype: all problems are collected, and one UserError lists them by name.
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
from lionjax.core.weight_map import KeyTemplate, WeightMapping

MAX_LISTED_PROBLEMS = 60  # problems listed in one message; further ones are counted
MAX_LAYERS = 100_000  # of one mapping; larger numbers in a name are not layer numbers


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def from_array(array) -> TensorSpec:
        return TensorSpec(tuple(array.shape), np.dtype(array.dtype))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """One mapping at one layer: its torch tensors, and their index in the stacked parameters."""

    mapping: WeightMapping
    index: tuple[int, ...]  # on the leading axes of the mapping's parameters
    torch_keys: tuple[str, ...]  # in the order of the mapping's torch_keys
    tied_keys: tuple[str, ...] = ()  # tied names of the single tensor (from torch: those in the state dict)
    dtype: np.dtype | None = None  # that all torch tensors are cast to, where those of the mapping have several


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """All mapped tensors in the order of the weight map, and the specs of the outputs."""

    mapped_tensors: tuple[MappedTensor, ...]
    output_specs: dict[str, TensorSpec]  # of each parameter (from torch) or torch tensor (to torch)
    ignored: dict[str, str]  # torch name -> the ignore pattern that it matches


def plan_params(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, ignore=(), expected: Params | None = None
) -> ConversionPlan:
    """The plan from torch tensors to parameters; the values of `state_dict` only need a shape and a dtype.

    `ignore`: regular expressions (full match) of torch names to skip, tested before the weight map. `expected`: a tree
    of abstract parameters, as from `sharding.abstract_params`. Raises UserError with all problems.
    """
    expected_flat = None if expected is None else trees.flatten(expected)
    ignored = {name: pattern for name in state_dict for pattern in ignore if re.fullmatch(pattern, name)}
    input_specs = {name: TensorSpec.from_array(array) for name, array in state_dict.items() if name not in ignored}
    problems: list[str] = []
    owner: dict[str, WeightMapping] = {}
    mapped_tensors, output_specs = [], {}
    weight_map = _check_distinct_paths(weight_map, problems)
    for mapping in weight_map:
        matched = _match_tensors(mapping, input_specs, expected_flat, problems)
        matched = _with_common_dtype(matched, input_specs)
        for name in (name for mapped in matched for name in (*mapped.torch_keys, *mapped.tied_keys)):
            if name in owner:
                problems.append(f"tensor {name!r} has two mappings: {owner[name].flax} and {mapping.flax}")
            owner[name] = mapping
        mapped_tensors += matched
        output_specs |= _leaf_specs(mapping, matched, input_specs, problems)
    problems += [f"tensor {text} has no mapping" for text in group_numbered_names(input_specs.keys() - owner.keys())]
    if expected_flat is not None:
        known_paths = {path for mapping in weight_map for path in mapping.flax_paths}
        problems += _compare_with_expected(output_specs, expected_flat, known_paths)
    raise_problems(problems, "the torch tensors")
    return ConversionPlan(tuple(mapped_tensors), output_specs, ignored)


def plan_state_dict(
    weight_map: Iterable[WeightMapping], flat_params: Mapping, expected: Params | None = None
) -> ConversionPlan:
    """The plan from parameters to torch tensors; the values of `flat_params` only need a shape and a dtype.

    Raises UserError with all problems.
    """
    problems: list[str] = []
    mapped_tensors, output_specs = [], {}
    weight_map = _check_distinct_paths(weight_map, problems)
    for mapping in weight_map:
        if missing := [path for path in mapping.flax_paths if path not in flat_params]:
            problems += [f"the mapping of {mapping.torch_keys[0]!r} finds no parameter {path!r}" for path in missing]
            continue
        leaves = [flat_params[path] for path in mapping.flax_paths]
        sizes = _stacked_axis_sizes(mapping, leaves, problems)
        specs = () if sizes is None else _tensor_specs(mapping, leaves, problems)
        if not specs:
            continue
        for index in np.ndindex(*sizes):
            torch_keys = tuple(KeyTemplate.parse(name).fill(index) for name in mapping.torch_keys)
            tied_keys = tuple(KeyTemplate.parse(name).fill(index) for name in mapping.tied_keys)
            mapped_tensors.append(MappedTensor(mapping, index, torch_keys, tied_keys))
            for name, spec in zip((*torch_keys, *tied_keys), (*specs, *specs * len(tied_keys))):
                if name in output_specs:
                    problems.append(f"tensor {name!r} has two mappings, one of them to {mapping.flax}")
                output_specs[name] = spec
    known_paths = {path for mapping in weight_map for path in mapping.flax_paths}
    problems += [f"parameter {path!r} has no mapping" for path in flat_params if path not in known_paths]
    if expected is not None:
        param_specs = {path: TensorSpec.from_array(leaf) for path, leaf in flat_params.items()}
        problems += _compare_with_expected(param_specs, trees.flatten(expected), known_paths)
    raise_problems(problems, "the parameters")
    return ConversionPlan(tuple(mapped_tensors), output_specs, {})


def raise_problems(problems: list[str], subject: str) -> None:
    """Raise one UserError that lists all problems between the weight map and `subject`, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED_PROBLEMS])
        more = f"\n  and {len(problems) - MAX_LISTED_PROBLEMS} more" if len(problems) > MAX_LISTED_PROBLEMS else ""
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} between the weight map and {subject}:{listed}{more}")


def group_numbered_names(names: Iterable[str]) -> list[str]:
    """One line for all names that differ only in numbers: 'blocks.0..38.attn.qkv.bias' (39 of them)."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"[0-9]+", "#", name), []).append(name)
    return [_format_name_group(members) for members in groups.values()]


def _format_name_group(names: list[str]) -> str:
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
    """Whether a dtype is floating point, including bfloat16 and the 8-bit floats that numpy does not classify."""
    return jax.dtypes.issubdtype(dtype, np.floating)


def _check_distinct_paths(weight_map: Iterable[WeightMapping], problems: list[str]) -> tuple[WeightMapping, ...]:
    weight_map, first_keys = tuple(weight_map), {}
    for mapping in weight_map:
        for path in mapping.flax_paths:
            if path in first_keys:
                problems.append(
                    f"parameter {path!r} has two mappings: {first_keys[path]!r} and {mapping.torch_keys[0]!r}"
                )
            first_keys[path] = mapping.torch_keys[0]
    return weight_map


def _match_tensors(
    mapping: WeightMapping, specs: dict[str, TensorSpec], expected, problems: list[str]
) -> list[MappedTensor]:
    """The mapped tensors of a mapping, one per layer; missing tensors and layers are added to `problems`."""
    columns = [_match_keys(name, specs) for name in (*mapping.torch_keys, *mapping.tied_keys)]
    indices = set().union(*columns)
    if not indices and not mapping.flax_paths:
        return []  # a constant (a mapping without parameter) may be missing
    sizes = [1 + max((index[axis] for index in indices), default=0) for axis in range(len(mapping.index_letters))]
    if expected is not None and mapping.flax_paths and mapping.flax_paths[0] in expected:
        leaf_shape = tuple(expected[mapping.flax_paths[0]].shape)
        sizes = [max(size, min_size) for size, min_size in zip(sizes, (*leaf_shape, *sizes[len(leaf_shape) :]))]
    bounds = [KeyTemplate.parse(mapping.torch_keys[0]).bound(letter) or 0 for letter in mapping.index_letters]
    sizes = [max(size, bound) for size, bound in zip(sizes, bounds)]
    if math.prod(sizes) > MAX_LAYERS:
        problems.append(
            f"the mapping to {mapping.flax} finds {len(indices)} layers, numbered up to {[size - 1 for size in sizes]}"
        )
        return []
    mapped_tensors, missing_keys = [], []
    for index in np.ndindex(*sizes):
        keys = [column[index] for column in columns if index in column]
        count = 1 if mapping.tied_keys else len(mapping.torch_keys)
        if len(keys) >= count:
            mapped_tensors.append(MappedTensor(mapping, index, tuple(keys[:count]), tuple(keys[count:])))
        else:
            missing_keys += [
                KeyTemplate.parse(name).fill(index) for name, c in zip(mapping.torch_keys, columns) if index not in c
            ]
    missing = group_numbered_names(missing_keys)
    problems += [f"the mapping to {mapping.flax} finds no tensor {text}" for text in missing]
    return mapped_tensors


def _match_keys(key_template: str, specs: dict[str, TensorSpec]) -> dict[tuple[int, ...], str]:
    template = KeyTemplate.parse(key_template)
    if not template.index_letters:
        return {(): key_template} if key_template in specs else {}
    matches = ((template.match(name), name) for name in specs)
    return {index: name for index, name in matches if index is not None}


def _with_common_dtype(mapped_tensors: list[MappedTensor], specs: dict[str, TensorSpec]) -> list[MappedTensor]:
    """The mapped tensors of one mapping; with different float dtypes, `dtype` is the smallest that holds all values."""
    dtypes = {specs[name].dtype for mapped in mapped_tensors for name in mapped.torch_keys}
    if len(dtypes) < 2 or not all(map(is_float, dtypes)):
        return mapped_tensors
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    if widest.itemsize < 4:  # float16 and bfloat16: neither holds all values of the other
        widest = np.dtype(np.float32)
    return [dataclasses.replace(mapped, dtype=widest) for mapped in mapped_tensors]


def _leaf_specs(
    mapping: WeightMapping, mapped_tensors: list[MappedTensor], specs: dict[str, TensorSpec], problems: list[str]
) -> dict[str, TensorSpec]:
    """{path: spec} of a mapping's parameters, layers stacked on the leading axes.

    Layers that differ in shape or dtype are added to `problems`.
    """
    names_by_specs: dict[tuple[TensorSpec, ...], list[str]] = {}
    for mapped in mapped_tensors:
        found = (specs[name] for name in mapped.torch_keys)
        layer_specs = tuple(dataclasses.replace(spec, dtype=mapped.dtype or spec.dtype) for spec in found)
        names_by_specs.setdefault(layer_specs, []).append(mapped.torch_keys[0])
    if len(names_by_specs) > 1:
        listed = "; ".join(
            f"{', '.join(map(str, layer_specs))} in {group_numbered_names(names)[0]}"
            for layer_specs, names in names_by_specs.items()
        )
        problems.append(f"the layers of {mapping.flax} differ: {listed}")
    if len(names_by_specs) != 1 or not mapping.flax_paths:
        return {}
    ((layer_specs, (first, *_)),) = names_by_specs.items()
    if len({spec.dtype for spec in layer_specs}) > 1:
        problems.append(
            f"the tensors {mapping.torch_keys} of one mapping differ in dtype: {', '.join(map(str, layer_specs))}"
        )
        return {}
    parts = _eval_transform(mapping.to_flax, mapping.to_torch, layer_specs)
    if isinstance(parts, str):
        problems.append(
            f"tensor {first!r}, {', '.join(map(str, layer_specs))}, does not fit {mapping.transform.name}: {parts}"
        )
        return {}
    stacked_sizes = tuple(1 + size for size in mapped_tensors[-1].index)
    return {
        path: TensorSpec(stacked_sizes + part.shape, part.dtype)
        for path, part in zip(mapping.flax_paths, parts, strict=True)
    }


def _stacked_axis_sizes(mapping: WeightMapping, leaves: list, problems: list[str]) -> tuple[int, ...] | None:
    """Number of layers on each leading axis of a mapping's parameters; None with an entry in `problems`."""
    depth, torch_keys = len(mapping.index_letters), mapping.torch_keys
    sizes = {tuple(leaf.shape[:depth]) for leaf in leaves} or {()}
    size = next(iter(sizes))
    bounds = [KeyTemplate.parse(torch_keys[0]).bound(letter) for letter in mapping.index_letters]
    if len(sizes) > 1 or len(size) < depth:
        problems.append(
            f"parameters {mapping.flax_paths} must have the same {depth} leading axes (layers of {torch_keys[0]!r})"
        )
    elif any(bound not in (None, length) for bound, length in zip(bounds, size)):
        problems.append(
            f"parameter {mapping.flax_paths[0]!r} has leading axes {size}; layers of {torch_keys[0]!r} need {bounds}"
        )
    else:
        return size
    return None


def _tensor_specs(mapping: WeightMapping, leaves: list, problems: list[str]) -> tuple[TensorSpec, ...]:
    """Specs of the torch tensors of one layer of a mapping; () with an entry in `problems`."""
    layer_specs = [TensorSpec(tuple(leaf.shape[len(mapping.index_letters) :]), np.dtype(leaf.dtype)) for leaf in leaves]
    text = ", ".join(map(str, layer_specs))
    if len({spec.dtype for spec in layer_specs}) > 1:
        problems.append(f"parameters {mapping.flax_paths} of one mapping differ in dtype: {text}")
        return ()
    parts = _eval_transform(mapping.to_torch, mapping.to_flax, layer_specs)
    if isinstance(parts, str):
        problems.append(
            f"parameters {mapping.flax_paths}, one layer of {text}, do not fit {mapping.transform.name}: {parts}"
        )
        return ()
    return parts


def _eval_transform(forward, inverse, specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...] | str:
    """Specs of a transform's outputs, or its error message; also checks that `inverse` restores the input specs.

    Runs on zero arrays that take no memory, because all their strides are zero.
    """
    inputs = [np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for spec in specs]
    try:
        outputs = forward(*inputs)
        returned = tuple(map(TensorSpec.from_array, inverse(*outputs)))
    except (ValueError, IndexError) as error:
        return str(error)
    if returned != tuple(specs):
        return f"its inverse returns {', '.join(map(str, returned))}"
    return tuple(map(TensorSpec.from_array, outputs))


def _compare_with_expected(specs: Mapping[str, TensorSpec], expected: Mapping, known_paths: set[str]) -> list[str]:
    """Differences from the expected parameters: shapes, integer instead of float, paths of one side only."""
    unmapped = [path for path in expected if path not in specs and path not in known_paths]
    problems = [f"parameter {path!r} has no mapping" for path in unmapped]
    for path, spec in specs.items():
        if path not in expected:
            problems.append(f"parameter {path!r} is not part of the model")
            continue
        expected_spec = TensorSpec.from_array(expected[path])
        if expected_spec.shape != spec.shape:
            problems.append(f"parameter {path!r} is {spec.shape} where the model has {expected_spec.shape}")
        if is_float(expected_spec.dtype) != is_float(spec.dtype):
            problems.append(f"parameter {path!r} is {spec.dtype} where the model has {expected_spec.dtype}")
    return problems
