# SPDX-License-Identifier: Apache-2.0
"""Every system, small, on several meshes: the same first parameters, losses and gradient norms as on one device."""

import jax
import numpy as np
import pytest
from mesh_systems import (
    MESHES,
    SYSTEMS,
    compiled_anew,  # noqa: F401
    fingerprints,
    first_batch,
    mesh_of,
    programs_are_let_go,  # noqa: F401
    trained,
)

from lionjax.core import sharding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_one_device():
    known = {}

    def of(name):
        if name not in known:
            known[name] = trained(*SYSTEMS[name], "one")
        return known[name]

    return of


# Lyrics differs from BLIP-2 and InstructBLIP in its regions only.
CASES = [(name, mesh) for name in SYSTEMS for mesh in ("data", "fsdp", "all") if mesh == "all" or "lyrics" not in name]


@pytest.mark.parametrize("name, mesh", CASES)
def test_first_parameters_do_not_depend_on_the_mesh(name, mesh):
    what, _ = SYSTEMS[name]
    assert fingerprints(what, mesh) == fingerprints(what, "one")


@pytest.mark.parametrize("name, mesh", CASES)
def test_losses_and_gradient_norms_do_not_depend_on_the_mesh(on_one_device, name, mesh):
    losses, norms, split = trained(*SYSTEMS[name], mesh)
    wanted = on_one_device(name)
    np.testing.assert_allclose(losses, wanted[0], rtol=2e-5)
    np.testing.assert_allclose(norms, wanted[1], rtol=2e-4)
    assert losses[2] != losses[0] and min(norms) > 0  # the first update is a warm-up
    assert bool(split) == (mesh != "data")  # else nothing was tried


@pytest.mark.parametrize("name", ["lion", "nextchat, masks"])
def test_batch_keeps_its_row_order_on_every_mesh(name):
    what, number = SYSTEMS[name]
    batch = first_batch(what, number)
    for mesh in map(mesh_of, MESHES):
        assert sharding.process_shard(mesh) == (0, 1)  # one process reads all rows, whatever the mesh
        placed = sharding.shard_batch(batch, mesh)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
