# SPDX-License-Identifier: Apache-2.0
"""A mesh says where things are computed, not what comes out."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import toy

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.training import checkpoint
from lionjax.training import step as stages
from lionjax.training.optimizer import abstract_opt_state
from lionjax.training.optimizer import make_optimizer as optimizer_optimizer

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
BATCH = toy.batch_of(range(16))


def run(shape, optimizer="adamw", updates=2):
    """(first fingerprints, losses, gradient norms, parameters, shardings) of a short stage on a mesh."""
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    stage = toy.stage(batch_size=16, trainable=("blocks", "output", "words"), optimizer=optimizer)
    params = sharding.init_sharded(toy.Toy().init, jax.random.key(0), BATCH, mesh=mesh)
    first = checkpoint.leaf_checksums(params)
    trainable, frozen = trees.split(params, stage.trainable)
    where = {path: leaf.sharding.spec for path, leaf in trees.flatten(params).items()}
    axes = sharding.layer_axes(jax.eval_shape(toy.Toy().init, jax.random.key(0), BATCH))
    rule = optimizer_optimizer(stage, trainable, axes)
    state = stages.init_train_state(rule, trainable, mesh)
    step = stages.make_train_step(toy.Toy(), stage, rule, jax.random.key(1), state, mesh, [])
    losses, norms = [], []
    for _ in range(updates):
        state, metrics = step(state, frozen, sharding.shard_batch(BATCH, mesh))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return first, losses, norms, jax.device_get(trees.flatten(state.trainable)), where


@pytest.fixture(scope="module")
def one():
    return run(MESHES["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "all"])
def test_first_parameters_losses_and_gradient_norms_do_not_depend_on_the_mesh(one, name):
    first, losses, norms, params, where = run(MESHES[name])
    assert first == one[0]
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)
    np.testing.assert_allclose(norms, one[2], rtol=1e-5)
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, one[3][path], atol=1e-4, err_msg=path)
    split = {path for path, spec in where.items() if any(spec)}
    assert bool(split) == (name != "data")  # else nothing was tried


@pytest.mark.slow
def test_muon_updates_do_not_depend_on_the_sharding_of_a_matrix():
    one, cut = (run(MESHES[name], "muon") for name in ("one", "all"))
    np.testing.assert_allclose(cut[1], one[1], rtol=1e-5)
    for path, leaf in cut[3].items():
        np.testing.assert_allclose(leaf, one[3][path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_moments_are_sharded_like_their_parameters(optimizer):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    shapes = jax.eval_shape(toy.Toy().init, jax.random.key(0), BATCH)
    where = trees.flatten(sharding.named_shardings(shapes, mesh))
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[path])
        for path, leaf in trees.flatten(nn.unbox(shapes)).items()
    }
    trainable = trees.unflatten(leaves)
    rule = optimizer_optimizer(toy.stage(optimizer=optimizer), trainable, sharding.layer_axes(shapes))
    state = jax.tree.leaves(abstract_opt_state(rule, trainable, mesh))
    found = [(leaf.shape, leaf.sharding.spec) for leaf in state if any(leaf.sharding.spec)]
    wanted = []
    for path, leaf in leaves.items():  # AdamW keeps two moments of a parameter, Muon one of a matrix
        moments = 1 if optimizer == "muon" and path.endswith("kernel") else 2
        wanted += [(leaf.shape, where[path].spec)] * moments if any(where[path].spec) else []
    assert wanted and sorted(map(str, found)) == sorted(map(str, wanted))
