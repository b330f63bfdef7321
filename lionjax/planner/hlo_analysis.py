# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does each time it runs: products, bytes between chips, bytes between a chip and its memory.

`collectives` and `memory_traffic` read the text of an optimised XLA program, in which a loop's body stands once: here
it counts as often as it runs. `products` counts a traced function, before the compiler has cut it into parts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

COLLECTIVE_OPCODES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DTYPE_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
ARRAY_PATTERN = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
NAME_PATTERN = re.compile(r"%[\w.\-]+")
COMPUTATION_PATTERN = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(")
INSTRUCTION_PATTERN = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = ")
# These move nothing: they name, group or wait, or what they do is counted inside.
NO_TRAFFIC_OPCODES = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "copy-done",
    "async-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "recv-done",
    "send-done",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `kind` makes `shape` (text, with its place in memory) of what is `given`; `rest` are its attributes."""

    name: str
    opcode: str
    shape: str
    operand_text: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return NAME_PATTERN.findall(self.operand_text)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and how often each runs in one run of the whole."""

    computations: dict[str, Computation]
    execution_counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange among `group` devices. `size`: bytes that each hands in; `moved`: sent by each in a ring, over all
    runs. `largest` is the array that comes out, of which a gathered weight is one. `far`: it leaves the slice."""

    opcode: str
    group_size: int
    operand_bytes: int
    count: int
    cross_slice: bool
    op_name: str

    @property
    def bytes_sent(self) -> float:
        """Bytes each device sends, over all runs, where devices hand on in a ring."""
        ring = (self.group_size - 1) / self.group_size
        once = {"all-gather": self.group_size * ring, "all-reduce": 2 * ring, "collective-permute": 1.0}
        return self.operand_bytes * once.get(self.opcode, ring) * self.count

    @property
    def output_bytes(self) -> int:
        """Bytes of what comes out."""
        return self.operand_bytes * (self.group_size if self.opcode == "all-gather" else 1)


def parse_hlo(text: str) -> Program:
    """A program from the text that a compiled function's `as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if inside is None:
            if (head := COMPUTATION_PATTERN.match(line)) and line.endswith("{"):
                inside = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        elif made := _parse_instruction(line):
            inside[made.name] = made
    return Program(computations, _execution_counts(computations, entry))


def _parse_instruction(line: str) -> Instruction | None:
    found = INSTRUCTION_PATTERN.match(line)
    if found is None:
        return None
    body = line[found.end() :]
    end = _matching_paren(body, 0) + 1 if body.startswith("(") else body.index(" ")
    shape, body = body[:end], body[end + 1 :]
    opening = body.index("(")
    closing = _matching_paren(body, opening)
    is_root = line.lstrip().startswith("ROOT ")
    given, rest = body[opening + 1 : closing], body[closing + 1 :]
    return Instruction(found[1], body[:opening], shape, given, rest, is_root)


def _matching_paren(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _execution_counts(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """How often each computation runs. One that is called from several places runs in all of them."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for made in computations[name].values():
            if made.opcode == "while":
                body, condition = (
                    _called_computations(made.attributes, "body"),
                    _called_computations(made.attributes, "condition"),
                )
                turns = loop_trip_count(computations[condition[0]]) if condition else 1
                for inner in (*body, *condition):
                    visit(inner, times * turns)
            elif made.opcode in ("fusion", "call", "async-start", "conditional"):
                keys = ("calls", "to_apply", "branch_computations", "true_computation")
                for key in (*keys, "false_computation"):
                    for inner in _called_computations(made.attributes, key):
                        visit(inner, times)

    if entry:
        visit(entry, 1)
    return runs


def _called_computations(attributes: str, key: str) -> list[str]:
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", attributes)
    return NAME_PATTERN.findall(found[1]) if found else []


def loop_trip_count(condition: Computation) -> int:
    """How often a loop runs at most: the largest number that its condition compares with."""
    constants = [made.operand_text for made in condition.values() if made.opcode == "constant"]
    return max((int(number) for number in constants if number.isdigit()), default=1)


def shape_bytes(shape: str, hbm_only: bool = False) -> int:
    """Bytes of an array or of a tuple's arrays together; `outside`: only of those in the chip's large memory."""
    total = 0.0
    for kind, sizes, layout in ARRAY_PATTERN.findall(shape):
        if hbm_only and re.search(r"S\([1-9]", layout):
            continue  # on the chip itself
        total += DTYPE_BYTES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
    return int(total)


# Between chips


def collectives(program: Program, slice_devices: int = 0) -> list[Collective]:
    """All exchanges. `slice_devices`: devices of one slice where there are several.

    The compiler may spread one exchange over several pieces of code, which then share a channel: it is counted once.
    """
    found: dict[object, Collective] = {}
    for name, times in program.execution_counts.items():
        computation = program.computations[name]
        for made in computation.values():
            kind = made.opcode.removesuffix("-start")
            if kind not in COLLECTIVE_OPCODES:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            handed = (computation[operand].shape for operand in made.operands)
            members = replica_group(made.attributes)
            far = bool(slice_devices) and len({member // slice_devices for member in members}) > 1
            path = re.search(r'op_name="([^"]*)"', made.attributes)
            size = sum(shape_bytes(shape) for shape in handed)
            one = Collective(kind, len(members), size, times, far, path[1] if path else "")
            channel = re.search(r"channel_id=(\d+)", made.attributes)
            key = (kind, channel[1]) if channel else (name, made.name)
            if key not in found or one.count * one.operand_bytes > found[key].count * found[key].operand_bytes:
                found[key] = one
    return [one for one in found.values() if one.group_size > 1]


def replica_group(attributes: str) -> list[int]:
    """The members of an exchange's first group, of the pairs of a permutation the first that moves."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes):
        numbers = [[int(n) for n in pair.split(",")] for pair in pairs[1].split("},{")]
        return next((pair for pair in numbers if pair[0] != pair[1]), numbers[0][:1])
    if plain := re.search(r"replica_groups=\{\{([0-9,]*)\}", attributes):
        return [int(n) for n in plain[1].split(",")]
    if table := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes):
        groups, sizes, order = ([int(n) for n in (part or "").split(",") if n] for part in table.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        numbers = numbers.transpose(order) if order else numbers
        return numbers.reshape(groups)[0].tolist()
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _mesh_axes_group(axes[1], axes[2])
    return [0]


def _mesh_axes_group(mesh: str, group_axes: str) -> list[int]:
    """The first group along some of a mesh's axes: ("'a'=4,'b'=2", "'b'") is [0, 1]; an axis may be cut: 'a':(1)2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers, steps, step = [0], {}, 1
    for name, size in reversed(axes.items()):
        steps[name], step = step, step * size
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", group_axes):
        size = int(part) if part else axes[name]
        stride = steps[name] * (axes[name] // (int(before) * size) if part else 1)
        numbers = [start + stride * n for start in numbers for n in range(size)]
    return numbers


# Between a chip and its memory


def hbm_bytes_accessed(program: Program) -> int:
    """Bytes read from and written to the chip's large memory. What a loop takes a slice of counts as that slice."""
    inner = {
        name
        for computation in program.computations.values()
        for made in computation.values()
        if made.opcode in ("fusion", "async-start")
        for name in _called_computations(made.attributes, "calls")
    }
    total = 0
    for name, times in program.execution_counts.items():
        if name not in inner:
            computation = program.computations[name]
            total += times * sum(_instruction_bytes(program, computation, made) for made in computation.values())
    return total


def _instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in NO_TRAFFIC_OPCODES:
        return 0
    shapes = [computation[name].shape for name in instruction.operands if name in computation]
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * shape_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * shape_bytes(shapes[-1 if instruction.opcode == "scatter" else 1], hbm_only=True)
    called = _called_computations(instruction.attributes, "calls") if instruction.opcode == "fusion" else []
    if not called:
        return shape_bytes(instruction.shape, hbm_only=True) + sum(shape_bytes(s, hbm_only=True) for s in shapes)
    inside = program.computations[called[0]]
    read_ = sum(
        _bytes_read(program, inside, one)
        for one, shape in zip(_parameters(inside), shapes)
        if shape_bytes(shape, hbm_only=True)
    )
    root = next(one for one in inside.values() if one.is_root)
    return read_ + (_bytes_written(program, inside, root) if shape_bytes(instruction.shape, hbm_only=True) else 0)


def _parameters(computation: Computation) -> list[Instruction]:
    """What a computation is given, in the order in which it is given: the text has them in any."""
    found = [one for one in computation.values() if one.opcode == "parameter"]
    return sorted(found, key=lambda one: int(one.operand_text))


def _users(computation: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """Each instruction that reads another, and as the how manyth of what it is given."""
    for made in computation.values():
        for place, operand in enumerate(made.operands):
            if operand == name and made.opcode == "bitcast":
                yield from _users(computation, made.name)
            elif operand == name:
                yield made, place


def _bytes_read(program: Program, computation: Computation, parameter: Instruction) -> int:
    """What a fusion reads of one input: slices of it, nothing where it only writes into it, or all."""
    total, whole = 0, shape_bytes(parameter.shape)
    for one, place in _users(computation, parameter.name):
        if one.opcode == "dynamic-slice" and place == 0:
            total += shape_bytes(one.shape)
        elif one.opcode == "fusion":
            nested = program.computations[_called_computations(one.attributes, "calls")[0]]
            total += _bytes_read(program, nested, _parameters(nested)[place])
        elif one.opcode != "dynamic-update-slice" or place:
            return whole
    return min(total, whole)


def _bytes_written(program: Program, computation: Computation, instruction: Instruction) -> int:
    """What a fusion writes: the piece where it updates a larger array in place."""
    if instruction.opcode == "tuple":
        return sum(_bytes_written(program, computation, computation[name]) for name in instruction.operands)
    if instruction.opcode == "bitcast":
        return _bytes_written(program, computation, computation[instruction.operands[0]])
    if instruction.opcode == "dynamic-update-slice":
        return shape_bytes(computation[instruction.operands[1]].shape)
    if instruction.opcode == "fusion":
        nested = program.computations[_called_computations(instruction.attributes, "calls")[0]]
        return _bytes_written(program, nested, next(one for one in nested.values() if one.is_root))
    return shape_bytes(instruction.shape)


# Products


def jaxpr_flops(jaxpr, while_trip_count: int = 1) -> float:
    """FLOPs of all matrix products and convolutions of a traced function, loops counted as often as they run.

    `loop_turns`: of a `while`, whose turns nobody knows before.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(_sub_jaxprs(equation.params.values()))
        if name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in left)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
            outputs = kernel.shape[numbers.rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(jaxpr_flops(one, while_trip_count) for one in inner)
        else:
            total += _equation_repeats(equation, while_trip_count) * sum(
                jaxpr_flops(one, while_trip_count) for one in inner
            )
    return total


def _equation_repeats(equation, while_trip_count: int) -> int:
    """How often an equation runs what is in it: a kernel once a place of its grid, `shard_map` once a device."""
    name, given = equation.primitive.name, equation.params
    if name == "pallas_call":
        return math.prod(given["grid_mapping"].grid)
    if name == "shard_map":
        return given["mesh"].size
    return {"scan": given.get("length", 1), "while": while_trip_count}.get(name, 1)


def _sub_jaxprs(values: Sequence) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _sub_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr
