# SPDX-License-Identifier: Apache-2.0
"""Looking for a better plan: other meshes, other policies of remembering, other batch sizes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

from lionjax.core.experiment import Experiment, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.nn.layers import REMAT
from lionjax.planner.plans import Plan, plan
from lionjax.planner.topologies import Topology
from lionjax.planner.worker import BrokeOff, unplanned

log = logging.getLogger(__name__)


def with_rows(experiment: Experiment, number: int, rows: int) -> Experiment:
    """The experiment with another batch size in one stage."""
    changed = list(experiment.stages)
    changed[number] = dataclasses.replace(changed[number], batch_size=rows)
    return dataclasses.replace(experiment, stages=tuple(changed))


def search(
    experiment: Experiment,
    topology: Topology,
    number: int,
    most: int = 12,
    quick: bool = False,
    make: Callable[..., Plan] = plan,
) -> Iterator[Plan]:
    """Plans for other meshes, then other policies of remembering, then other batch sizes; at most `most`.

    Each round begins from the best so far, by predicted examples a second among those that fit. `make`: `plans.plan` or
    `Apart.plan`, with which the search goes on where the compiler breaks off.
    """
    best: Plan | None = None
    tried: set[tuple] = set()
    rows = experiment.stages[number].batch_size
    rounds = (
        lambda: [(mesh, None, rows) for mesh in meshes(experiment.stages[number], topology)],
        lambda: [(_mesh_of(best), policy, best.rows) for policy in REMAT],
        lambda: [(_mesh_of(best), _policy(best), best.rows * k // 2) for k in (1, 4, 8)],
    )
    for candidates in rounds:
        if tried and best is None:
            return
        for candidate in candidates():
            if candidate in tried or len(tried) >= most:
                continue
            tried.add(candidate)
            mesh, policy, size = candidate
            tried_one = with_rows(experiment, number, size)
            try:
                made = make(tried_one, topology, number, mesh, policy, quick=quick)
            except BrokeOff as error:
                made = unplanned(tried_one, topology, number, mesh, policy, quick, str(error))
            except UserError as error:
                log.info("%s", error)
                continue
            yield made
            if made.fits and (best is None or made.speed > best.speed):
                best = made


def meshes(stage: Stage, topology: Topology) -> list[MeshConfig]:
    """Shapes that split the stage's batch, over all that the chips can: fsdp as wide as it goes, tensor up to 8."""
    each, slices = topology.devices // topology.slices, topology.slices
    rows = stage.batch_size // stage.accumulate
    found = []
    for tensor in (1, 2, 4, 8, 16):
        parts, rest = divmod(each, tensor)
        if rest or rows % (parts * slices):
            continue
        found.append(MeshConfig(1, parts, tensor, slices))
        if parts > 32:
            found.append(MeshConfig(parts // 16, 16, tensor, slices))
    return found or [MeshConfig(1, each, 1, slices)]


def _mesh_of(made: Plan) -> MeshConfig:
    slices, data, fsdp, tensor = made.mesh
    return MeshConfig(data, fsdp, tensor, slices)


def _policy(made: Plan) -> str | None:
    return made.remat if made.remat in REMAT else None
