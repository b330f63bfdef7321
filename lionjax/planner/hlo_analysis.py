# SPDX-License-Identifier: Apache-2.0
"""Cost analysis of programs: FLOPs of a jaxpr; collectives and HBM traffic of a compiled XLA program (HLO text).

XLA's own cost analysis counts a loop's body once; here it is counted as often as it runs. `jaxpr_flops` counts the
traced function before partitioning; `collectives` and `hbm_bytes_accessed` count the optimized program of one device.
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
QUOTED_PATTERN = re.compile(r'"(?:[^"\\]|\\.)*"')
NAME_PATTERN = re.compile(r"%[\w.\-]+")
COMPUTATION_PATTERN = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(")
INSTRUCTION_PATTERN = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = ")
# Opcodes without memory traffic of their own: they name, group or wait, or the called computation is counted.
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
    """One HLO instruction; `shape` (with layout and memory space), `operand_text` and `attributes` are HLO text."""

    name: str
    opcode: str
    shape: str
    operand_text: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operand instructions."""
        return NAME_PATTERN.findall(self.operand_text)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and how often each is executed in one run of the program."""

    computations: dict[str, Computation]
    execution_counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective among `group_size` devices, executed `count` times.

    `operand_bytes`: input bytes per device and execution. `cross_slice`: whether the group spans several slices.
    `is_async`: whether it runs beside other instructions (a start and done pair, or fused with a computation).
    """

    opcode: str
    group_size: int
    operand_bytes: int
    count: int
    cross_slice: bool
    op_name: str
    is_async: bool = False

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in all executions, with ring algorithms."""
        ring = (self.group_size - 1) / self.group_size
        factors = {"all-gather": self.group_size * ring, "all-reduce": 2 * ring, "collective-permute": 1.0}
        return self.operand_bytes * factors.get(self.opcode, ring) * self.count

    @property
    def output_bytes(self) -> int:
        """Bytes of the output per device and execution."""
        return self.operand_bytes * (self.group_size if self.opcode == "all-gather" else 1)


def parse_hlo(text: str) -> Program:
    """Parse the HLO text of a compiled function (its `as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, computation = "", None
    for line in _instruction_lines(text):
        if computation is None:
            if (head := COMPUTATION_PATTERN.match(line)) and line.endswith("{"):
                computation = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            computation = None
        elif instruction := _parse_instruction(line):
            computation[instruction.name] = instruction
    return Program(computations, _execution_counts(computations, entry))


def _instruction_lines(text: str) -> Iterator[str]:
    """The lines of an HLO text, with instructions that were printed on several lines joined.

    libtpu prints the metadata of a Pallas kernel on lines of their own; one of them begins with `}}`, which ends no
    computation.
    """
    pending, depth = "", 0
    for line in text.splitlines():
        pending = f"{pending} {line}" if pending else line
        depth += _brace_depth(line)
        if INSTRUCTION_PATTERN.match(pending) and depth > 0:
            continue
        yield pending
        pending, depth = "", 0


def _brace_depth(line: str) -> int:
    """Opening minus closing braces of a line, without those in quoted strings."""
    unquoted = QUOTED_PATTERN.sub("", line)
    return unquoted.count("{") - unquoted.count("}")


def _parse_instruction(line: str) -> Instruction | None:
    match = INSTRUCTION_PATTERN.match(line)
    if match is None:
        return None
    body = line[match.end() :]
    end = _matching_paren(body, 0) + 1 if body.startswith("(") else body.index(" ")
    shape, body = body[:end], body[end + 1 :]
    opening = body.index("(")
    closing = _matching_paren(body, opening)
    is_root = line.lstrip().startswith("ROOT ")
    operand_text, attributes = body[opening + 1 : closing], body[closing + 1 :]
    return Instruction(match[1], body[:opening], shape, operand_text, attributes, is_root)


def _matching_paren(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    return len(text)


def _execution_counts(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """How often each computation is executed, summed over all its callers."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                body = _called_computations(instruction.attributes, "body")
                condition = _called_computations(instruction.attributes, "condition")
                trip_count = loop_trip_count(computations[condition[0]]) if condition else 1
                for inner in (*body, *condition):
                    visit(inner, times * trip_count)
            elif instruction.opcode in ("fusion", "call", "async-start", "conditional"):
                keys = ("calls", "to_apply", "branch_computations", "true_computation")
                for key in (*keys, "false_computation"):
                    for inner in _called_computations(instruction.attributes, key):
                        visit(inner, times)

    if entry:
        visit(entry, 1)
    return counts


def _called_computations(attributes: str, key: str) -> list[str]:
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", attributes)
    return NAME_PATTERN.findall(match[1]) if match else []


def loop_trip_count(condition: Computation) -> int:
    """The maximum trip count of a while loop: the largest integer constant in its condition."""
    constants = [instruction.operand_text for instruction in condition.values() if instruction.opcode == "constant"]
    return max((int(number) for number in constants if number.isdigit()), default=1)


def shape_bytes(shape: str, hbm_only: bool = False) -> int:
    """Bytes of an array, or of all arrays of a tuple; with `hbm_only` only of those in HBM."""
    total = 0.0
    for dtype, sizes, layout in ARRAY_PATTERN.findall(shape):
        if hbm_only and re.search(r"S\([1-9]", layout):
            continue  # memory space > 0: on-chip
        total += DTYPE_BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size)
    return int(total)


def collectives(program: Program, slice_devices: int = 0) -> list[Collective]:
    """All collectives among more than one device. `slice_devices`: devices per slice, 0 for a single slice.

    Instructions with the same channel id are parts of one collective; the largest of them is counted.
    """
    largest: dict[object, Collective] = {}
    inner = _inner_computations(program)
    for name, times in program.execution_counts.items():
        computation = program.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in COLLECTIVE_OPCODES:
                continue
            if opcode == "all-reduce" and "all-reduce-scatter" in name:
                opcode = "reduce-scatter"
            members = replica_group(instruction.attributes)
            cross_slice = bool(slice_devices) and len({member // slice_devices for member in members}) > 1
            op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            size = sum(shape_bytes(computation[operand].shape) for operand in instruction.operands)
            is_async = instruction.opcode.endswith("-start") or name in inner
            op_name = op_name[1] if op_name else ""
            collective = Collective(opcode, len(members), size, times, cross_slice, op_name, is_async)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (opcode, channel[1]) if channel else (name, instruction.name)
            if key in largest and times * size <= largest[key].count * largest[key].operand_bytes:
                continue
            largest[key] = collective
    return [collective for collective in largest.values() if collective.group_size > 1]


def replica_group(attributes: str) -> list[int]:
    """The devices of a collective's first replica group; for a permutation, of the first pair of distinct devices."""
    if match := re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes):
        pairs = [[int(n) for n in pair.split(",")] for pair in match[1].split("},{")]
        return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0][:1])
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", attributes):
        return [int(n) for n in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes):
        groups, sizes, order = ([int(n) for n in (part or "").split(",") if n] for part in match.groups())
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        devices = devices.transpose(order) if order else devices
        return devices.reshape(groups)[0].tolist()
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _mesh_axes_group(axes[1], axes[2])
    return [0]


def _mesh_axes_group(mesh: str, group_axes: str) -> list[int]:
    """The first group along axes of a mesh: [0, 1] for ("'a'=4,'b'=2", "'b'"); 'a':(1)2 is a sub-axis of size 2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    devices, strides, stride = [0], {}, 1
    for name, size in reversed(axes.items()):
        strides[name], stride = stride, stride * size
    for name, pre_size, sub_size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", group_axes):
        size = int(sub_size) if sub_size else axes[name]
        stride = strides[name] * (axes[name] // (int(pre_size) * size) if sub_size else 1)
        devices = [start + stride * n for start in devices for n in range(size)]
    return devices


def hbm_bytes_accessed(program: Program) -> int:
    """Bytes read from and written to HBM in one run; of an array that is sliced or updated in place, only the slice."""
    return sum(num_bytes for _, num_bytes in instruction_traffic(program))


def instruction_traffic(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Each instruction outside of fusions with the bytes of HBM that all its executions read and write."""
    inner = _inner_computations(program)
    for name, times in program.execution_counts.items():
        if name not in inner:
            computation = program.computations[name]
            for instruction in computation.values():
                yield instruction, times * _instruction_bytes(program, computation, instruction)


def _inner_computations(program: Program) -> set[str]:
    """Names of the computations of fusions and of asynchronous instructions."""
    return {
        name
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("fusion", "async-start")
        for name in _called_computations(instruction.attributes, "calls")
    }


def _instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in NO_TRAFFIC_OPCODES:
        return 0
    shapes = [computation[name].shape for name in instruction.operands if name in computation]
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * shape_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * shape_bytes(shapes[-1 if instruction.opcode == "scatter" else 1], hbm_only=True)
    if instruction.opcode.endswith("-start") and instruction.opcode != "async-start":
        return shape_bytes(instruction.shape, hbm_only=True)  # a tuple of the operands, which are read, and the outputs
    called = _called_computations(instruction.attributes, "calls") if instruction.opcode == "fusion" else []
    if not called:
        return shape_bytes(instruction.shape, hbm_only=True) + sum(shape_bytes(s, hbm_only=True) for s in shapes)
    fused = program.computations[called[0]]
    bytes_read = sum(
        _bytes_read(program, fused, parameter)
        for parameter, shape in zip(_parameters(fused), shapes)
        if shape_bytes(shape, hbm_only=True)
    )
    root = next(instruction for instruction in fused.values() if instruction.is_root)
    in_hbm = shape_bytes(instruction.shape, hbm_only=True)
    return bytes_read + (_bytes_written(program, fused, root) if in_hbm else 0)


def _parameters(computation: Computation) -> list[Instruction]:
    """The parameters of a computation in the order of the operands; the HLO text has them in any order."""
    parameters = [instruction for instruction in computation.values() if instruction.opcode == "parameter"]
    return sorted(parameters, key=lambda parameter: int(parameter.operand_text))


def _users(computation: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """(instruction, operand index) of each use of the instruction `name`, looking through bitcasts."""
    for instruction in computation.values():
        for index, operand in enumerate(instruction.operands):
            if operand == name and instruction.opcode == "bitcast":
                yield from _users(computation, instruction.name)
            elif operand == name:
                yield instruction, index


def _bytes_read(program: Program, computation: Computation, parameter: Instruction) -> int:
    """Bytes that a fusion reads of a parameter: its slices, 0 if it is only updated in place, or all of it."""
    total, size = 0, shape_bytes(parameter.shape)
    for user, index in _users(computation, parameter.name):
        if user.opcode == "dynamic-slice" and index == 0:
            total += shape_bytes(user.shape)
        elif user.opcode == "fusion":
            nested = program.computations[_called_computations(user.attributes, "calls")[0]]
            total += _bytes_read(program, nested, _parameters(nested)[index])
        elif user.opcode != "dynamic-update-slice" or index:
            return size
    return min(total, size)


def _bytes_written(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes that a fusion writes through its root; only the update for an in-place dynamic-update-slice."""
    if instruction.opcode == "tuple":
        return sum(_bytes_written(program, computation, computation[name]) for name in instruction.operands)
    if instruction.opcode == "bitcast":
        return _bytes_written(program, computation, computation[instruction.operands[0]])
    if instruction.opcode == "dynamic-update-slice":
        return shape_bytes(computation[instruction.operands[1]].shape)
    if instruction.opcode == "fusion":
        nested = program.computations[_called_computations(instruction.attributes, "calls")[0]]
        return _bytes_written(program, nested, next(inner for inner in nested.values() if inner.is_root))
    return shape_bytes(instruction.shape)


def jaxpr_flops(jaxpr, while_trip_count: int = 1) -> float:
    """FLOPs of all matrix products and convolutions of a jaxpr, over all devices; loops count as often as they run.

    `while_trip_count`: number of iterations of each `while`, which a jaxpr does not have.
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
            total += max(jaxpr_flops(branch, while_trip_count) for branch in inner)
        else:
            inner_flops = sum(jaxpr_flops(sub_jaxpr, while_trip_count) for sub_jaxpr in inner)
            total += _equation_repeats(equation, while_trip_count) * inner_flops
    return total


def _equation_repeats(equation, while_trip_count: int) -> int:
    """How often an equation runs its sub-jaxprs: a Pallas kernel once per grid cell, `shard_map` once per device."""
    name, params = equation.primitive.name, equation.params
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return params["mesh"].size
    return {"scan": params.get("length", 1), "while": while_trip_count}.get(name, 1)


def _sub_jaxprs(values: Sequence) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _sub_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr
