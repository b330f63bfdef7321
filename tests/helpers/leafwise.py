# SPDX-License-Identifier: Apache-2.0
"""Random parameters drawn leaf by leaf.

Compiled as one program, as `sharding.init_sharded` does it, those of a small model take ten seconds of the processor,
most of it for a hundred copies of the random number generator.
"""

from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from lionjax.core import sharding

compiled_whole = sharding.init_sharded


def init_leafwise(init_fn, *args, mesh=None, shardings=None):
    """What `sharding.init_sharded` returns, to rounding, on one device; on several it is that function itself.

    Values are computed step by step, without the forward pass. A draw of random numbers is a program of its own, of
    which there is one for each shape, whatever the model; all else is computed by numpy.
    """
    placed = jax.tree.leaves(shardings)
    meshes = ([mesh] if mesh else []) + [leaf.mesh for leaf in placed[:1]]
    if any(one.size > 1 for one in meshes):
        return compiled_whole(init_fn, *args, mesh=mesh, shardings=shardings)
    closed, shapes = jax.make_jaxpr(lambda *a: nn.unbox(init_fn(*a)), return_shape=True)(*args)
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    needed = [x for x, is_used in zip(jax.tree.leaves(args), used) if is_used]
    leaves = [np.array(leaf) for leaf in evaluated(jaxpr, closed.consts, needed)]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(shapes), leaves), shardings)


@pytest.fixture(scope="module", autouse=True)
def runs_have_one_device():
    """For the files of tests that import it: a mesh of one device, and first parameters drawn leaf by leaf."""
    make_mesh = sharding.make_mesh

    def one(*config, devices=None):
        return make_mesh(*config) if len(config) > 1 else make_mesh(*config, devices=devices or jax.devices()[:1])

    with mock.patch.object(sharding, "make_mesh", one), mock.patch.object(sharding, "init_sharded", init_leafwise):
        yield


def evaluated(jaxpr, consts, args) -> list:
    """The outputs of a jaxpr, step by step."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(var):
        return var.val if isinstance(var, Literal) else known[var]

    for eqn in jaxpr.eqns:
        known |= zip(eqn.outvars, outputs_of(eqn, [read(var) for var in eqn.invars]))
    return [read(var) for var in jaxpr.outvars]


def outputs_of(eqn, inputs) -> list:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return unrolled(inputs, **params)
    if name in ON_HOST:
        return [ON_HOST[name](*inputs, params)]
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None and not is_draw(name, inner):
        return evaluated(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    made = eqn.primitive.bind(*inputs, **params)
    return list(made) if eqn.primitive.multiple_results else [made]


def is_draw(name: str, inner) -> bool:
    """Whether a step is a function of jax.random: they are compiled functions of compiled functions alone."""
    return name in ("jit", "pjit") and all(
        eqn.primitive.name in ("jit", "pjit") or not [*jaxprs_of(eqn)] for eqn in inner.jaxpr.eqns
    )


def jaxprs_of(eqn):
    return (value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr"))


def unrolled(inputs, jaxpr, length, num_consts, num_carry, reverse=False, **_) -> list:
    """A scan over stacked layers, layer by layer."""
    assert not reverse
    consts, carry, stacked = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    rows = []
    for layer in range(length):
        made = evaluated(jaxpr.jaxpr, jaxpr.consts, [*consts, *carry, *(row_of(x, layer) for x in stacked)])
        carry = made[:num_carry]
        rows.append(made[num_carry:])
    return [*carry, *(np.stack(leaf) for leaf in zip(*rows))]


def row_of(stacked, row: int):
    if not jax.dtypes.issubdtype(stacked.dtype, jax.dtypes.prng_key):
        return np.asarray(stacked)[row]
    data = np.asarray(jax.random.key_data(stacked))[row]
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(stacked))


def broadcast_in_dim(x, params) -> np.ndarray:
    x, shape, axes = np.asarray(x), params["shape"], params["broadcast_dimensions"]
    sizes = [x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    return np.broadcast_to(x.reshape(sizes), shape)


ON_HOST = {
    "mul": lambda x, y, _: np.multiply(x, y),
    "add": lambda x, y, _: np.add(x, y),
    "reshape": lambda x, params: np.reshape(x, params["new_sizes"]),
    "convert_element_type": lambda x, params: np.asarray(x).astype(params["new_dtype"]),
    "broadcast_in_dim": broadcast_in_dim,
}
