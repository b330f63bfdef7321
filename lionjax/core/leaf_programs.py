# SPDX-License-Identifier: Apache-2.0
"""The leaves of a function's output by a program that computes equal leaves in a loop.

As it is written, a model's `init` is a program with the forward pass and a random draw for every parameter, though most
draws differ in nothing but their random key. Here each leaf is cut out of the traced function: no parameter needs the
forward pass. Random keys are computed first. The program then holds one draw for each shape, repeated over the keys of
its leaves, and compiles in half of the time. The values stay the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_MAX_REPEATED = 2**20  # a loop holds all its leaves at once; larger leaves are drawn one by one
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat", "remat2"}


class _NotSeparableError(Exception):
    """A leaf depends on the state of a loop, or on another operation that contains a program."""


class _Scope:
    """A jaxpr with the `sources` of its inputs: an array, None for the state of a loop, or (scope of the caller, atom,
    `sliced`), where `sliced` says whether a scan cuts the caller's array into one slice for each layer (None: no scan).
    """

    def __init__(self, jaxpr: ClosedJaxpr | Jaxpr, sources: list):
        jaxpr = jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())
        self.outputs = jaxpr.jaxpr.outvars
        self.sources = dict(zip(jaxpr.jaxpr.constvars + jaxpr.jaxpr.invars, [*jaxpr.consts, *sources]))
        self.makers = {var: (eqn, n) for eqn in jaxpr.jaxpr.eqns for n, var in enumerate(eqn.outvars)}
        self.known = {}

    def remember(self, name: Hashable, make: Callable):
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def called_by(self, eqn) -> _Scope:
        """The scope inside a call."""
        sources = [(self, atom, None) for atom in eqn.invars]
        return self.remember(id(eqn), lambda: _Scope(eqn.params["jaxpr"], sources))

    def scanned_by(self, eqn) -> _Scope:
        """The scope of one layer of a scan."""
        first, last = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
        sources = [None if first <= n < last else (self, atom, n >= last) for n, atom in enumerate(eqn.invars)]
        return self.remember(id(eqn), lambda: _Scope(eqn.params["jaxpr"], sources))

    def array(self, atom) -> tuple[jax.Array, tuple[bool, ...]]:
        """The value of an input or of a random key, and for each scan around it: does it have an axis of layers?"""
        if isinstance(atom, Literal):
            return np.asarray(atom.val, atom.aval.dtype), ()
        return self.remember(atom, lambda: self._array(atom))

    def _array(self, var):
        if var in self.sources:
            source = self.sources[var]
            if source is None:
                raise _NotSeparableError
            if not isinstance(source, tuple):
                return source, ()
            (value, layered), sliced = source[0].array(source[1]), source[2]
            return value, layered if sliced is None else (*layered, sliced)
        eqn, position = self.makers[var]
        if eqn.primitive.name in _CALLS:
            inner = self.called_by(eqn)
            return inner.array(inner.outputs[position])
        if eqn.primitive.multiple_results or not _is_key(var):
            raise _NotSeparableError
        values, layered = zip(*map(self.array, eqn.invars))
        (flags,) = set(layered) - {()} or {()}
        params = tuple(sorted(eqn.params.items()))
        return _key_step(eqn.primitive, params, tuple(map(sum, layered)))(*values), flags


def _is_key(atom) -> bool:
    return jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=256)
def _key_step(primitive, params: tuple, depths: tuple[int, ...]) -> Callable:
    """A compiled operation on random keys; operand n has `depths[n]` axes of layers in front."""
    step = functools.partial(primitive.bind, **dict(params))
    for depth in range(1, max(depths) + 1):
        step = jax.vmap(step, [0 if own >= depth else None for own in depths])
    return jax.jit(step)


class _Program:
    """The operations that a leaf needs: `steps` of (primitive or None for a scan, parameters, operands).

    An operand is ("literal", dtype, bytes), ("input", index) or ("step", index, output). Input n is `inputs[n]`, as
    `_Scope.array` has it.
    """

    def __init__(self):
        self.steps, self.inputs, self.known = [], [], {}

    def operand(self, scope: _Scope, atom) -> tuple:
        if isinstance(atom, Literal):
            return "literal", atom.aval.dtype, np.asarray(atom.val, atom.aval.dtype).tobytes()
        if (scope, atom) not in self.known:
            self.known[scope, atom] = self._operand(scope, atom)
        return self.known[scope, atom]

    def add_input(self, value, layered: tuple) -> tuple:
        self.inputs.append((value, layered))
        return "input", len(self.inputs) - 1

    def _operand(self, scope: _Scope, var) -> tuple:
        if var in scope.sources or _is_key(var):
            source = scope.sources.get(var)
            if isinstance(source, tuple) and source[2] is None:
                return self.operand(*source[:2])
            return self.add_input(*scope.array(var))
        eqn, position = scope.makers[var]
        if eqn.primitive.name in _CALLS:
            inner = scope.called_by(eqn)
            return self.operand(inner, inner.outputs[position])
        if eqn.primitive.name == "scan":
            return self.layers(scope.scanned_by(eqn), eqn.params, position)
        if not all(map(_is_plain, eqn.params.values())):
            raise _NotSeparableError
        operands = tuple(self.operand(scope, atom) for atom in eqn.invars)
        self.steps.append((eqn.primitive, tuple(sorted(eqn.params.items())), operands))
        return "step", len(self.steps) - 1, position

    def layers(self, scope: _Scope, params: dict, position: int) -> tuple:
        """One stacked output of a scan whose layers do not depend on each other."""
        if position < params["num_carry"]:
            raise _NotSeparableError
        layer = _Program()
        result = layer.operand(scope, scope.outputs[position])
        operands = tuple(self.add_input(value, layered[:-1]) for value, layered in layer.inputs)
        sliced = tuple(bool(layered and layered[-1]) for _, layered in layer.inputs)
        how = tuple(layer.steps), result, sliced, params["length"], params["reverse"]
        self.steps.append((None, how, operands))
        return "step", len(self.steps) - 1, 0


def _is_plain(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    plain_type = isinstance(value, type) or not (callable(value) or isinstance(value, (Jaxpr, ClosedJaxpr)))
    return isinstance(value, Hashable) and plain_type


def _run(steps: tuple, result: tuple, inputs: list) -> jax.Array:
    """The leaf that a program computes from its inputs."""
    outputs = []

    def read(operand):
        kind, where, *more = operand
        if kind == "literal":
            return np.frombuffer(more[0], where)[0]
        return inputs[where] if kind == "input" else outputs[where][more[0]]

    for primitive, how, operands in steps:
        values = [read(operand) for operand in operands]
        made = _run_layers(values, *how) if primitive is None else primitive.bind(*values, **dict(how))
        outputs.append(made if primitive is not None and primitive.multiple_results else [made])
    return read(result)


def _run_layers(values: list, steps: tuple, result: tuple, sliced: tuple, length: int, reverse: bool) -> jax.Array:
    def layer(_, slices):
        slices = iter(slices)
        return None, _run(steps, result, [next(slices) if cut else value for cut, value in zip(sliced, values)])

    return jax.lax.scan(layer, None, [value for cut, value in zip(sliced, values) if cut], length, reverse)[1]


@functools.lru_cache(maxsize=32)
def _jitted(programs: tuple, shardings: tuple) -> Callable:
    """A compiled function {name: inputs} -> {name: leaf} of `programs`: (name, repeated, steps, result)."""
    groups: dict[tuple, list[str]] = {}
    for name, repeated, *program in programs:
        groups.setdefault((*program, None if repeated else name), []).append(name)

    def run(inputs: dict) -> dict:
        leaves = {}
        for (*program, _), names in groups.items():
            draw = functools.partial(_run, *program)
            if len(names) == 1:
                leaves[names[0]] = draw(inputs[names[0]])
            else:
                leaves |= zip(names, jax.lax.map(draw, jax.tree.map(lambda *x: jnp.stack(x), *map(inputs.get, names))))
        return leaves

    return jax.jit(run, out_shardings=dict(zip([name for name, *_ in programs], shardings)))


def evaluate_leaves(function: Callable, *args, shardings: dict) -> dict:
    """The leaves of the dict `function(*args)` that `shardings` names, each with its sharding (None: any).

    A leaf that is not separable (see above) comes from one program of the whole function.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    scope = _Scope(jaxpr, jax.tree.leaves(args))
    programs, inputs, rest = [], {}, {}
    for name, atom in zip(sorted(shapes), scope.outputs):
        if name not in shardings:
            continue
        program = _Program()
        try:
            result = program.operand(scope, atom)
        except _NotSeparableError:
            rest[name] = shardings[name]
            continue
        inputs[name] = [value for value, _ in program.inputs]
        repeated = bool(inputs[name]) and shapes[name].size <= _MAX_REPEATED
        programs.append((name, repeated, tuple(program.steps), result))
    leaves = _jitted(tuple(programs), tuple(shardings[name] for name in inputs))(inputs)
    if rest:
        leaves |= jax.jit(lambda *a: {name: function(*a)[name] for name in rest}, out_shardings=rest)(*args)
    return leaves
