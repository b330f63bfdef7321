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

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BYTES = {
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
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%[\w.\-]+")
HEAD = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = ")
# These move nothing: they name, group or wait, or what they do is counted inside.
FREE = {
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
    kind: str
    shape: str
    given: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return NAME.findall(self.given)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and how often each runs in one run of the whole."""

    computations: dict[str, Computation]
    runs: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange among `group` devices. `size`: bytes that each hands in; `moved`: sent by each in a ring, over all
    runs. `largest` is the array that comes out, of which a gathered weight is one. `far`: it leaves the slice."""

    kind: str
    group: int
    size: int
    runs: int
    far: bool
    path: str

    @property
    def moved(self) -> float:
        """Bytes each device sends, over all runs, where devices hand on in a ring."""
        ring = (self.group - 1) / self.group
        once = {"all-gather": self.group * ring, "all-reduce": 2 * ring, "collective-permute": 1.0}
        return self.size * once.get(self.kind, ring) * self.runs

    @property
    def largest(self) -> int:
        """Bytes of what comes out."""
        return self.size * (self.group if self.kind == "all-gather" else 1)


def read(text: str) -> Program:
    """A program from the text that a compiled function's `as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if inside is None:
            if (head := HEAD.match(line)) and line.endswith("{"):
                inside = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        elif made := _instruction(line):
            inside[made.name] = made
    return Program(computations, _runs(computations, entry))


def _instruction(line: str) -> Instruction | None:
    found = INSTRUCTION.match(line)
    if found is None:
        return None
    body = line[found.end() :]
    end = _closing(body, 0) + 1 if body.startswith("(") else body.index(" ")
    shape, body = body[:end], body[end + 1 :]
    opening = body.index("(")
    closing = _closing(body, opening)
    is_root = line.lstrip().startswith("ROOT ")
    given, rest = body[opening + 1 : closing], body[closing + 1 :]
    return Instruction(found[1], body[:opening], shape, given, rest, is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _runs(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """How often each computation runs. One that is called from several places runs in all of them."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for made in computations[name].values():
            if made.kind == "while":
                body, condition = _named(made.rest, "body"), _named(made.rest, "condition")
                turns = trips(computations[condition[0]]) if condition else 1
                for inner in (*body, *condition):
                    visit(inner, times * turns)
            elif made.kind in ("fusion", "call", "async-start", "conditional"):
                keys = ("calls", "to_apply", "branch_computations", "true_computation")
                for key in (*keys, "false_computation"):
                    for inner in _named(made.rest, key):
                        visit(inner, times)

    if entry:
        visit(entry, 1)
    return runs


def _named(rest: str, key: str) -> list[str]:
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", rest)
    return NAME.findall(found[1]) if found else []


def trips(condition: Computation) -> int:
    """How often a loop runs at most: the largest number that its condition compares with."""
    constants = [made.given for made in condition.values() if made.kind == "constant"]
    return max((int(number) for number in constants if number.isdigit()), default=1)


def size_of(shape: str, outside: bool = False) -> int:
    """Bytes of an array or of a tuple's arrays together; `outside`: only of those in the chip's large memory."""
    total = 0.0
    for kind, sizes, layout in ARRAY.findall(shape):
        if outside and re.search(r"S\([1-9]", layout):
            continue  # on the chip itself
        total += BYTES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
    return int(total)


# Between chips


def collectives(program: Program, slice_devices: int = 0) -> list[Collective]:
    """All exchanges. `slice_devices`: devices of one slice where there are several.

    The compiler may spread one exchange over several pieces of code, which then share a channel: it is counted once.
    """
    found: dict[object, Collective] = {}
    for name, times in program.runs.items():
        computation = program.computations[name]
        for made in computation.values():
            kind = made.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            handed = (computation[operand].shape for operand in made.operands)
            members = group(made.rest)
            far = bool(slice_devices) and len({member // slice_devices for member in members}) > 1
            path = re.search(r'op_name="([^"]*)"', made.rest)
            size = sum(size_of(shape) for shape in handed)
            one = Collective(kind, len(members), size, times, far, path[1] if path else "")
            channel = re.search(r"channel_id=(\d+)", made.rest)
            key = (kind, channel[1]) if channel else (name, made.name)
            if key not in found or one.runs * one.size > found[key].runs * found[key].size:
                found[key] = one
    return [one for one in found.values() if one.group > 1]


def group(rest: str) -> list[int]:
    """The members of an exchange's first group, of the pairs of a permutation the first that moves."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        numbers = [[int(n) for n in pair.split(",")] for pair in pairs[1].split("},{")]
        return next((pair for pair in numbers if pair[0] != pair[1]), numbers[0][:1])
    if plain := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return [int(n) for n in plain[1].split(",")]
    if table := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", rest):
        groups, sizes, order = ([int(n) for n in (part or "").split(",") if n] for part in table.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        numbers = numbers.transpose(order) if order else numbers
        return numbers.reshape(groups)[0].tolist()
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        return _along(axes[1], axes[2])
    return [0]


def _along(mesh: str, along: str) -> list[int]:
    """The first group along some of a mesh's axes: ("'a'=4,'b'=2", "'b'") is [0, 1]; an axis may be cut: 'a':(1)2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers, steps, step = [0], {}, 1
    for name, size in reversed(axes.items()):
        steps[name], step = step, step * size
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        size = int(part) if part else axes[name]
        stride = steps[name] * (axes[name] // (int(before) * size) if part else 1)
        numbers = [start + stride * n for start in numbers for n in range(size)]
    return numbers


# Between a chip and its memory


def memory_traffic(program: Program) -> int:
    """Bytes read from and written to the chip's large memory. What a loop takes a slice of counts as that slice."""
    inner = {
        name
        for computation in program.computations.values()
        for made in computation.values()
        if made.kind in ("fusion", "async-start")
        for name in _named(made.rest, "calls")
    }
    total = 0
    for name, times in program.runs.items():
        if name not in inner:
            computation = program.computations[name]
            total += times * sum(_moved(program, computation, made) for made in computation.values())
    return total


def _moved(program: Program, computation: Computation, made: Instruction) -> int:
    if made.kind in FREE:
        return 0
    shapes = [computation[name].shape for name in made.operands if name in computation]
    if made.kind in ("dynamic-slice", "gather"):
        return 2 * size_of(made.shape, outside=True)
    if made.kind in ("dynamic-update-slice", "scatter"):
        return 2 * size_of(shapes[-1 if made.kind == "scatter" else 1], outside=True)
    called = _named(made.rest, "calls") if made.kind == "fusion" else []
    if not called:
        return size_of(made.shape, outside=True) + sum(size_of(s, outside=True) for s in shapes)
    inside = program.computations[called[0]]
    read_ = sum(
        _read(program, inside, one) for one, shape in zip(_parameters(inside), shapes) if size_of(shape, outside=True)
    )
    root = next(one for one in inside.values() if one.is_root)
    return read_ + (_written(program, inside, root) if size_of(made.shape, outside=True) else 0)


def _parameters(inside: Computation) -> list[Instruction]:
    """What a computation is given, in the order in which it is given: the text has them in any."""
    found = [one for one in inside.values() if one.kind == "parameter"]
    return sorted(found, key=lambda one: int(one.given))


def _users(computation: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """Each instruction that reads another, and as the how manyth of what it is given."""
    for made in computation.values():
        for place, operand in enumerate(made.operands):
            if operand == name and made.kind == "bitcast":
                yield from _users(computation, made.name)
            elif operand == name:
                yield made, place


def _read(program: Program, inside: Computation, parameter: Instruction) -> int:
    """What a fusion reads of one input: slices of it, nothing where it only writes into it, or all."""
    total, whole = 0, size_of(parameter.shape)
    for one, place in _users(inside, parameter.name):
        if one.kind == "dynamic-slice" and place == 0:
            total += size_of(one.shape)
        elif one.kind == "fusion":
            nested = program.computations[_named(one.rest, "calls")[0]]
            total += _read(program, nested, _parameters(nested)[place])
        elif one.kind != "dynamic-update-slice" or place:
            return whole
    return min(total, whole)


def _written(program: Program, inside: Computation, made: Instruction) -> int:
    """What a fusion writes: the piece where it updates a larger array in place."""
    if made.kind == "tuple":
        return sum(_written(program, inside, inside[name]) for name in made.operands)
    if made.kind == "bitcast":
        return _written(program, inside, inside[made.operands[0]])
    if made.kind == "dynamic-update-slice":
        return size_of(inside[made.operands[1]].shape)
    if made.kind == "fusion":
        nested = program.computations[_named(made.rest, "calls")[0]]
        return _written(program, nested, next(one for one in nested.values() if one.is_root))
    return size_of(made.shape)


# Products


def products(jaxpr, loop_turns: int = 1) -> float:
    """FLOPs of all matrix products and convolutions of a traced function, loops counted as often as they run.

    `loop_turns`: of a `while`, whose turns nobody knows before.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(_inner(equation.params.values()))
        if name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in left)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
            outputs = kernel.shape[numbers.rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(products(one, loop_turns) for one in inner)
        else:
            total += _turns(equation, loop_turns) * sum(products(one, loop_turns) for one in inner)
    return total


def _turns(equation, loop_turns: int) -> int:
    """How often an equation runs what is in it: a kernel once a place of its grid, `shard_map` once a device."""
    name, given = equation.primitive.name, equation.params
    if name == "pallas_call":
        return math.prod(given["grid_mapping"].grid)
    if name == "shard_map":
        return given["mesh"].size
    return {"scan": given.get("length", 1), "while": loop_turns}.get(name, 1)


def _inner(values: Sequence) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _inner(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr
