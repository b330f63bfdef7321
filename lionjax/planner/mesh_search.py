# SPDX-License-Identifier: Apache-2.0
"""Looking for a better plan: other meshes, other policies of remembering, other batch sizes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

from lionjax.core.experiment import Experiment, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.nn.layers import REMAT_POLICIES
from lionjax.planner.plans import Plan, plan
from lionjax.planner.topologies import Topology
from lionjax.planner.worker import CompilerCrashed, failed_plan

log = logging.getLogger(__name__)


def with_batch_size(experiment: Experiment, stage_index: int, batch_size: int) -> Experiment:
    """The experiment with another batch size in one stage."""
    changed = list(experiment.stages)
    changed[stage_index] = dataclasses.replace(changed[stage_index], batch_size=batch_size)
    return dataclasses.replace(experiment, stages=tuple(changed))


def search_plans(
    experiment: Experiment,
    topology: Topology,
    stage_index: int,
    max_plans: int = 12,
    quick: bool = False,
    plan_fn: Callable[..., Plan] = plan,
) -> Iterator[Plan]:
    """Plans for other meshes, then other policies of remembering, then other batch sizes; at most `most`.

    Each round begins from the best so far, by predicted examples a second among those that fit. `make`: `plans.plan` or
    `Apart.plan`, with which the search goes on where the compiler breaks off.
    """
    best: Plan | None = None
    tried: set[tuple] = set()
    rows = experiment.stages[stage_index].batch_size
    rounds = (
        lambda: [(mesh, None, rows) for mesh in candidate_meshes(experiment.stages[stage_index], topology)],
        lambda: [(_mesh_config(best), policy, best.rows) for policy in REMAT_POLICIES],
        lambda: [(_mesh_config(best), _remat_policy(best), best.rows * k // 2) for k in (1, 4, 8)],
    )
    for candidates in rounds:
        if tried and best is None:
            return
        for candidate in candidates():
            if candidate in tried or len(tried) >= max_plans:
                continue
            tried.add(candidate)
            mesh, policy, size = candidate
            tried_one = with_batch_size(experiment, stage_index, size)
            try:
                made = plan_fn(tried_one, topology, stage_index, mesh, policy, quick=quick)
            except CompilerCrashed as error:
                made = failed_plan(tried_one, topology, stage_index, mesh, policy, quick, str(error))
            except UserError as error:
                log.info("%s", error)
                continue
            yield made
            if made.fits and (best is None or made.examples_per_second > best.examples_per_second):
                best = made


def candidate_meshes(stage: Stage, topology: Topology) -> list[MeshConfig]:
    """Shapes that split the stage's batch, over all that the chips can: fsdp as wide as it goes, tensor up to 8."""
    each, slices = topology.devices // topology.slices, topology.slices
    rows = stage.batch_size // stage.grad_accum_steps
    found = []
    for tensor in (1, 2, 4, 8, 16):
        parts, rest = divmod(each, tensor)
        if rest or rows % (parts * slices):
            continue
        found.append(MeshConfig(1, parts, tensor, slices))
        if parts > 32:
            found.append(MeshConfig(parts // 16, 16, tensor, slices))
    return found or [MeshConfig(1, each, 1, slices)]


def _mesh_config(plan_result: Plan) -> MeshConfig:
    slices, data, fsdp, tensor = plan_result.mesh
    return MeshConfig(data, fsdp, tensor, slices)


def _remat_policy(plan_result: Plan) -> str | None:
    return plan_result.remat if plan_result.remat in REMAT_POLICIES else None
