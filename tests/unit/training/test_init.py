# SPDX-License-Identifier: Apache-2.0
"""First parameters: a model is traced once for its shapes, shardings and values."""

import jax
import numpy as np
import toy

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.training import init


def test_specs_and_values_of_runs_with_one_model_trace_it_once(monkeypatch):
    jax.clear_caches()
    experiment, traced, make = toy.experiment(), [], toy.Toy.init
    monkeypatch.setattr(toy.Toy, "init", lambda self, *given: traced.append(1) or make(self, *given))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    example = toy.batch_of([0, 1])
    specs = init.make_param_specs(experiment, example, mesh)
    frozen, trainable = init.init_params(experiment, example, specs)
    again = init.make_param_specs(toy.experiment(), example, mesh)
    assert len(traced) == 1 and jax.tree.structure(again.trainable) == jax.tree.structure(trainable)
    expected = trees.flatten(sharding.init_sharded(experiment.model.init, jax.random.key(experiment.seed), example))
    found = trees.flatten(trees.merge(frozen, trainable))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path].astype(leaf.dtype), err_msg=path)
