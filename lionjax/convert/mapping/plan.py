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
from lionjax.core.weight_map import KeyTemplate, WeightMapping

MAX_LISTED_PROBLEMS = 60  # problems named in one message; the rest are counted
MAX_LAYERS = 100_000  # of one row; a name with a larger number in it is no layer's


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
    """One row at one layer: the torch tensors, and where in the row's leaves their numbers stand."""

    mapping: WeightMapping
    index: tuple[int, ...]  # of the leading axes of the row's leaves
    torch_keys: tuple[str, ...]  # in the order of the row's names
    tied_keys: tuple[str, ...] = ()  # further names of the single tensor (on the way in, those that are there)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """All pieces in the order of the table, and the form of every leaf (way in) or tensor (way out) they make."""

    mapped_tensors: tuple[MappedTensor, ...]
    output_specs: dict[str, TensorSpec]
    ignored: dict[str, str]  # torch name -> the pattern that let it pass


def plan_params(
    weight_map: Iterable[WeightMapping], state_dict: Mapping, ignore=(), expected: Params | None = None
) -> ConversionPlan:
    """The way in: what becomes of the tensors in `state`, whose values need only have a shape and a dtype.

    `ignore`: regular expressions of names that are passed over, matched whole, before any row is. `expected`: a tree of
    anything with shapes and dtypes, such as `sharding.abstract` makes. Raises UserError with all problems.
    """
    wanted = None if expected is None else trees.flatten(expected)
    ignored = {name: pattern for name in state_dict for pattern in ignore if re.fullmatch(pattern, name)}
    forms = {name: TensorSpec.from_array(array) for name, array in state_dict.items() if name not in ignored}
    problems: list[str] = []
    owner: dict[str, WeightMapping] = {}
    pieces, made = [], {}
    weight_map = _check_distinct_paths(weight_map, problems)
    for row in weight_map:
        found = _match_tensors(row, forms, wanted, problems)
        for name in (name for piece in found for name in (*piece.torch_keys, *piece.tied_keys)):
            if name in owner:
                problems.append(f"tensor {name!r} has two rows: {owner[name].flax} and {row.flax}")
            owner[name] = row
        pieces += found
        made |= _leaf_specs(row, found, forms, problems)
    problems += [f"tensor {text} has no row" for text in group_numbered_names(forms.keys() - owner.keys())]
    if wanted is not None:
        problems += _compare_with_expected(made, wanted, {path for row in weight_map for path in row.flax_paths})
    raise_problems(problems, "the torch tensors")
    return ConversionPlan(tuple(pieces), made, ignored)


def plan_state_dict(
    weight_map: Iterable[WeightMapping], flat_params: Mapping, expected: Params | None = None
) -> ConversionPlan:
    """The way out: what becomes of the leaves in `flat` (by path), whose values need only have a shape and a dtype.

    Raises UserError with all problems.
    """
    problems: list[str] = []
    pieces, made = [], {}
    weight_map = _check_distinct_paths(weight_map, problems)
    for row in weight_map:
        if missing := [path for path in row.flax_paths if path not in flat_params]:
            problems += [f"row {row.torch_keys[0]!r} finds no parameter {path!r}" for path in missing]
            continue
        leaves = [flat_params[path] for path in row.flax_paths]
        sizes = _stacked_axis_sizes(row, leaves, problems)
        forms = () if sizes is None else _tensor_specs(row, leaves, problems)
        if not forms:
            continue
        for index in np.ndindex(*sizes):
            names = tuple(KeyTemplate.parse(name).fill(index) for name in row.torch_keys)
            tied = tuple(KeyTemplate.parse(name).fill(index) for name in row.tied_keys)
            pieces.append(MappedTensor(row, index, names, tied))
            for name, form in zip((*names, *tied), (*forms, *forms * len(tied))):
                if name in made:
                    problems.append(f"tensor {name!r} has two rows, one of them for {row.flax}")
                made[name] = form
    known = {path for row in weight_map for path in row.flax_paths}
    problems += [f"parameter {path!r} has no row" for path in flat_params if path not in known]
    if expected is not None:
        problems += _compare_with_expected(
            {path: TensorSpec.from_array(leaf) for path, leaf in flat_params.items()}, trees.flatten(expected), known
        )
    raise_problems(problems, "the parameters")
    return ConversionPlan(tuple(pieces), made, {})


def raise_problems(problems: list[str], subject: str) -> None:
    """Raise one UserError that lists all problems between a table and `what`; nothing when there are none."""
    problems = list(dict.fromkeys(problems))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED_PROBLEMS])
        more = f"\n  and {len(problems) - MAX_LISTED_PROBLEMS} more" if len(problems) > MAX_LISTED_PROBLEMS else ""
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} between the weight table and {subject}:{shown}{more}")


def group_numbered_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in their numbers as one line: 'blocks.0..38.attn.qkv.bias' (39 of them)."""
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
    """Whether a dtype holds floating numbers; bfloat16 and the 8-bit floats do, though numpy does not know them."""
    return jax.dtypes.issubdtype(dtype, np.floating)


def _check_distinct_paths(weight_map: Iterable[WeightMapping], problems: list[str]) -> tuple[WeightMapping, ...]:
    weight_map, seen = tuple(weight_map), {}
    for row in weight_map:
        for path in row.flax_paths:
            if path in seen:
                problems.append(f"parameter {path!r} has two rows: {seen[path]!r} and {row.torch_keys[0]!r}")
            seen[path] = row.torch_keys[0]
    return weight_map


def _match_tensors(
    mapping: WeightMapping, specs: dict[str, TensorSpec], expected, problems: list[str]
) -> list[MappedTensor]:
    """The pieces of a row among the names that are there; gaps and absences become problems."""
    columns = [_match_keys(name, specs) for name in (*mapping.torch_keys, *mapping.tied_keys)]
    found = set().union(*columns)
    if not found and not mapping.flax_paths:
        return []  # a constant may be missing
    sizes = [1 + max((index[axis] for index in found), default=0) for axis in range(len(mapping.index_letters))]
    if expected is not None and mapping.flax_paths and mapping.flax_paths[0] in expected:
        given = tuple(expected[mapping.flax_paths[0]].shape)
        sizes = [max(size, least) for size, least in zip(sizes, (*given, *sizes[len(given) :]))]
    bounds = [KeyTemplate.parse(mapping.torch_keys[0]).bound(letter) or 0 for letter in mapping.index_letters]
    sizes = [max(size, bound) for size, bound in zip(sizes, bounds)]
    if math.prod(sizes) > MAX_LAYERS:
        problems.append(
            f"row for {mapping.flax} finds {len(found)} layers, numbered up to {[size - 1 for size in sizes]}"
        )
        return []
    pieces, absent = [], []
    for index in np.ndindex(*sizes):
        there = [column[index] for column in columns if index in column]
        count = 1 if mapping.tied_keys else len(mapping.torch_keys)
        if len(there) >= count:
            pieces.append(MappedTensor(mapping, index, tuple(there[:count]), tuple(there[count:])))
        else:
            absent += [
                KeyTemplate.parse(name).fill(index) for name, c in zip(mapping.torch_keys, columns) if index not in c
            ]
    problems += [f"row for {mapping.flax} finds no tensor {text}" for text in group_numbered_names(absent)]
    return pieces


def _match_keys(key_template: str, specs: dict[str, TensorSpec]) -> dict[tuple[int, ...], str]:
    template = KeyTemplate.parse(key_template)
    if not template.index_letters:
        return {(): key_template} if key_template in specs else {}
    found = ((template.match(name), name) for name in specs)
    return {index: name for index, name in found if index is not None}


def _leaf_specs(
    mapping: WeightMapping, mapped_tensors: list[MappedTensor], specs: dict[str, TensorSpec], problems: list[str]
) -> dict[str, TensorSpec]:
    """The form of the row's leaves, with the run of layers in front; layers that are not alike become problems."""
    kinds: dict[tuple[TensorSpec, ...], list[str]] = {}
    for piece in mapped_tensors:
        kinds.setdefault(tuple(specs[name] for name in piece.torch_keys), []).append(piece.torch_keys[0])
    if len(kinds) > 1:
        sorts = "; ".join(
            f"{', '.join(map(str, kind))} in {group_numbered_names(names)[0]}" for kind, names in kinds.items()
        )
        problems.append(f"the layers for {mapping.flax} differ: {sorts}")
    if len(kinds) != 1 or not mapping.flax_paths:
        return {}
    ((kind, (first, *_)),) = kinds.items()
    if len({form.dtype for form in kind}) > 1:
        problems.append(f"the tensors of row {mapping.torch_keys} differ in dtype: {', '.join(map(str, kind))}")
        return {}
    parts = _eval_transform(mapping.to_flax, mapping.to_torch, kind)
    if isinstance(parts, str):
        problems.append(
            f"tensor {first!r}, {', '.join(map(str, kind))}, does not fit {mapping.transform.name}: {parts}"
        )
        return {}
    sizes = tuple(1 + size for size in mapped_tensors[-1].index)
    return {
        path: TensorSpec(sizes + part.shape, part.dtype) for path, part in zip(mapping.flax_paths, parts, strict=True)
    }


def _stacked_axis_sizes(mapping: WeightMapping, leaves: list, problems: list[str]) -> tuple[int, ...] | None:
    """How many layers the row's leaves hold along each leading axis, or None with the problem said."""
    depth, names = len(mapping.index_letters), mapping.torch_keys
    sizes = {tuple(leaf.shape[:depth]) for leaf in leaves} or {()}
    size = next(iter(sizes))
    bounds = [KeyTemplate.parse(names[0]).bound(letter) for letter in mapping.index_letters]
    if len(sizes) > 1 or len(size) < depth:
        problems.append(f"parameters {mapping.flax_paths} want the same {depth} leading axes, for row {names[0]!r}")
    elif any(bound not in (None, length) for bound, length in zip(bounds, size)):
        problems.append(
            f"parameter {mapping.flax_paths[0]!r} begins with axes {size} where row {names[0]!r} wants {bounds}"
        )
    else:
        return size
    return None


def _tensor_specs(mapping: WeightMapping, leaves: list, problems: list[str]) -> tuple[TensorSpec, ...]:
    """The form of each tensor that the row makes from one layer of its leaves; () with the problem said."""
    kind = [TensorSpec(tuple(leaf.shape[len(mapping.index_letters) :]), np.dtype(leaf.dtype)) for leaf in leaves]
    text = ", ".join(map(str, kind))
    if len({form.dtype for form in kind}) > 1:
        problems.append(f"parameters {mapping.flax_paths} of one row differ in dtype: {text}")
        return ()
    parts = _eval_transform(mapping.to_torch, mapping.to_flax, kind)
    if isinstance(parts, str):
        problems.append(
            f"parameters {mapping.flax_paths}, a layer of {text}, do not fit {mapping.transform.name}: {parts}"
        )
        return ()
    return parts


def _eval_transform(forward, inverse, specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...] | str:
    """The forms that a change of layout gives, or why it gives none. It must lead back to where it came from.

    It is tried on arrays of zeros that take no memory, because all their strides are zero.
    """
    blanks = [np.broadcast_to(np.zeros((), form.dtype), form.shape) for form in specs]
    try:
        made = forward(*blanks)
        returned = tuple(map(TensorSpec.from_array, inverse(*made)))
    except (ValueError, IndexError) as error:
        return str(error)
    if returned != tuple(specs):
        return f"the way back gives {', '.join(map(str, returned))}"
    return tuple(map(TensorSpec.from_array, made))


def _compare_with_expected(specs: Mapping[str, TensorSpec], expected: Mapping, known_paths: set[str]) -> list[str]:
    """How the leaves differ from what was expected: shapes, integers for floats, paths that only one side has."""
    problems = [f"parameter {path!r} has no row" for path in expected if path not in specs and path not in known_paths]
    for path, form in specs.items():
        if path not in expected:
            problems.append(f"parameter {path!r} is not part of the model")
            continue
        like = TensorSpec.from_array(expected[path])
        if like.shape != form.shape:
            problems.append(f"parameter {path!r} is {form.shape} where the model wants {like.shape}")
        if is_float(like.dtype) != is_float(form.dtype):
            problems.append(f"parameter {path!r} is {form.dtype} where the model wants {like.dtype}")
    return problems
