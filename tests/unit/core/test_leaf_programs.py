# SPDX-License-Identifier: Apache-2.0
"""Parameters that a program of one draw for each shape makes are those of the whole function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax.core import leaf_programs

TABLE = np.arange(6, dtype=np.float32)


def draw(key, number: int):
    return 0.02 * jax.random.normal(jax.random.fold_in(key, number), (8, 6))


def layer(x, keys):
    """A layer of two scanned ones, in which one draw depends on the activations."""
    own, inner = keys
    x = jax.nn.relu(x @ draw(own, 3))
    rows = jax.lax.scan(jax.checkpoint(lambda c, key: (c + 1, draw(key, 5))), 0.0, jax.random.split(inner, 3))[1]
    return x @ jnp.ones((6, 8)), {"first": draw(own, 3), "second": draw(own, 4), "rows": rows, "seen": x.mean(0)}


def init(key, x):
    stacked = jax.lax.scan(layer, x, (jax.random.split(jax.random.fold_in(key, 1)), jax.random.split(key)))[1]
    plain = {
        "a": draw(key, 7),
        "b": jax.jit(draw, static_argnums=1)(key, 8),
        "ones": jnp.ones((8, 6)),
        "zero": jnp.zeros(3),
    }
    return plain | stacked | {"table": 2 * TABLE + jax.random.uniform(key, (6,))}


ARGS = jax.random.key(3), np.zeros((4, 8), np.float32)
NAMES = {"a", "b", "first", "ones", "rows", "second", "seen", "table", "zero"}


@pytest.fixture(scope="module")
def whole():
    return jax.device_get(jax.jit(init)(*ARGS))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_leaves_are_bit_equal_to_those_of_one_program(whole, num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]).reshape(-1, 1 + (num_devices > 1)), ("x", "y"))
    spec = {"a": PartitionSpec("x"), "first": PartitionSpec(None, "x", "y"), "rows": PartitionSpec(None, None, "x")}
    shardings = {name: NamedSharding(mesh, spec.get(name, PartitionSpec())) for name in NAMES}
    made = leaf_programs.evaluate_leaves(init, *ARGS, shardings=shardings)
    assert made.keys() == whole.keys() == NAMES
    for name, leaf in made.items():
        assert leaf.sharding == shardings[name] and leaf.dtype == whole[name].dtype
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)


def test_leaves_of_one_shape_share_a_draw_and_others_are_not_made(monkeypatch):
    drawn = []
    run = leaf_programs._run
    monkeypatch.setattr(leaf_programs, "_run", lambda *program: drawn.append(program[:2]) or run(*program))
    names = {"a", "b", "first", "ones", "rows", "second"}
    leaves = leaf_programs.evaluate_leaves(init, *ARGS, shardings=dict.fromkeys(names))
    assert leaves.keys() == names
    # a and b; first and second, which scan a layer; rows, which scan a scan of a layer; ones
    assert len(drawn) == len(set(drawn)) + 2 == 7
    assert float(jnp.abs(leaves["a"] - leaves["b"]).min()) > 0
