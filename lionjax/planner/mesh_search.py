# SPDX-License-Identifier: Apache-2.0
"""Search for a faster plan over meshes, remat policies and batch sizes."""

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
    stages = list(experiment.stages)
    stages[stage_index] = dataclasses.replace(stages[stage_index], batch_size=batch_size)
    return dataclasses.replace(experiment, stages=tuple(stages))


def search_plans(
    experiment: Experiment,
    topology: Topology,
    stage_index: int,
    max_plans: int = 12,
    quick: bool = False,
    plan_fn: Callable[..., Plan] = plan,
) -> Iterator[Plan]:
    """Yields plans for other meshes, then other remat policies, then other batch sizes; at most `max_plans`.

    Each round varies the best plan so far: the one that fits and has the most predicted examples per second. The search
    ends when no mesh fits. `plan_fn`: `plans.plan`, or `PlanWorker.plan`, with which it survives compiler crashes.
    """
    best: Plan | None = None
    tried: set[tuple] = set()
    batch_size = experiment.stages[stage_index].batch_size
    rounds = (
        lambda: [(mesh, None, batch_size) for mesh in candidate_meshes(experiment.stages[stage_index], topology)],
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
            variant = with_batch_size(experiment, stage_index, size)
            try:
                result = plan_fn(variant, topology, stage_index, mesh, policy, quick=quick)
            except CompilerCrashed as error:
                result = failed_plan(variant, topology, stage_index, mesh, policy, quick, str(error))
            except UserError as error:
                log.info("%s", error)
                continue
            yield result
            if result.fits and (best is None or result.examples_per_second > best.examples_per_second):
                best = result


def candidate_meshes(stage: Stage, topology: Topology) -> list[MeshConfig]:
    """Meshes over all devices that split the stage's microbatch evenly: tensor from 1 to 16, fsdp all others.

    Above 32 shards also with fsdp 16 and the others on the data axis. One pure FSDP mesh if none splits evenly.
    """
    slice_devices, slices = topology.devices // topology.slices, topology.slices
    microbatch_size = stage.num_rows // stage.grad_accum_steps
    meshes = []
    for tensor in (1, 2, 4, 8, 16):
        shards, remainder = divmod(slice_devices, tensor)
        if remainder or microbatch_size % (shards * slices):
            continue
        meshes.append(MeshConfig(1, shards, tensor, slices))
        if shards > 32:
            meshes.append(MeshConfig(shards // 16, 16, tensor, slices))
    return meshes or [MeshConfig(1, slice_devices, 1, slices)]


def _mesh_config(plan_result: Plan) -> MeshConfig:
    slices, data, fsdp, tensor = plan_result.mesh
    return MeshConfig(data, fsdp, tensor, slices)


def _remat_policy(plan_result: Plan) -> str | None:
    return plan_result.remat if plan_result.remat in REMAT_POLICIES else None
