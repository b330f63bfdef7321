# SPDX-License-Identifier: Apache-2.0
"""A plan: the real update of a real config, compiled for a pod that is not there, and what its program says.

Nothing is allocated and nothing runs. Memory is what the compiler reserves, and it refuses what does not fit. Times are
predictions: bytes and products of the program over what the chip's maker publishes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import Batch, UserError
from lionjax.inference.engine import BATCH_SIZE_BUCKETS
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerationConfig
from lionjax.planner import hlo_analysis, topologies
from lionjax.planner.compile_cache import compile_and_analyze
from lionjax.planner.topologies import GIB, Chip, Topology
from lionjax.training import step as stages
from lionjax.training.init import ParamSpecs
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.optimizer import abstract_opt_state, make_optimizer

GENERATION = "generation"
QUICK_COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0}  # of -1..1; JAX's default is 0
ROOFLINE_TERMS = ("products", "memory", "links", "network")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one compiled program on one pod.

    `what`: a stage's name, or "generation". `mesh`: devices along slice, data, fsdp, tensor. `rows`: examples of an
    update over all devices. `peak_gib` and `hbm_gib` are of one device; the first is None where the compiler did not
    say. `flops` are those of one run over all devices; `needed_flops` without what is computed twice to save memory.
    `seconds`: what each of `LIMITS` takes at the published peak. `collectives`: {kind: [how many, bytes a device
    sends, bytes of the largest array that comes out]}. `broke_off`: the compiler did, and nothing else is known.
    """

    config: str
    what: str
    topology: str
    devices: int
    mesh: tuple[int, int, int, int]
    rows: int
    fits: bool
    peak_gib: float | None
    hbm_gib: float
    trained: int
    frozen: int
    flops: float
    needed_flops: float
    seconds: Mapping[str, float]
    collectives: Mapping[str, tuple[int, float, float]]
    compile_seconds: float
    peak_tflops: float
    remat: str = "as the config says"
    quick: bool = False
    notes: tuple[str, ...] = ()
    broke_off: bool = False

    @property
    def step_seconds(self) -> float:
        """Predicted: the slowest of all, the others hidden behind it."""
        return max(self.seconds.values(), default=0.0)

    @property
    def examples_per_second(self) -> float:
        """Predicted rows a second."""
        return self.rows / self.step_seconds if self.step_seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """Which of `LIMITS` that is."""
        return max(self.seconds, key=self.seconds.get, default="nothing")

    @property
    def mfu(self) -> float:
        """Predicted share of the chips' peak that is spent on what the model needs (MFU)."""
        most = self.devices * self.peak_tflops * 1e12 * self.step_seconds
        return self.needed_flops / most if most else 0.0


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """A function to compile and the shapes to compile it for; `turns` of a loop whose end is not known before."""

    function: object
    arguments: tuple
    num_trainable: int
    num_frozen: int
    while_trip_count: int = 1


# What is planned


def find_stage_index(experiment: Experiment, name: str | None) -> int:
    """Which stage is meant: by number from 1 on, by name, or (None) the one that trains most. Raises UserError."""
    names = [stage.name for stage in experiment.stages]
    if name is None:
        layout = init_layout(experiment, dummy_batch(experiment), sharding.make_mesh(devices=jax.devices()[:1]))
        counts = [trees.count_params(trees.split(layout.trainable, stage.trainable)[0]) for stage in experiment.stages]
        return max(range(len(counts)), key=lambda number: (counts[number], number))
    if name in names:
        return names.index(name)
    if name.isdigit() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise UserError(f"there is no stage {name!r}; there are {', '.join(names)}, or 1 to {len(names)}")


def dummy_batch(experiment: Experiment, stage: Stage | None = None, batch_size: int = 2) -> Batch:
    """A batch of zeros as the pipeline makes it for a stage; None: one for all stages, of which shapes follow."""
    processor = experiment.data.processor
    text = [np.zeros((batch_size, n), np.int32) for n in (processor.prompt_length, processor.max_question_tokens)]
    target, row = np.zeros((batch_size, processor.max_target_tokens), np.int32), np.zeros(batch_size, np.int32)
    several = (processor.pictures,) if processor.pictures > 1 else ()
    image = np.zeros((batch_size, *several, *(processor.image_size,) * 2, 3), np.float32)
    batch = Batch(image, text[0], text[0], text[1], text[1], target, target, target, row, row)
    if stage is not None:
        batch = dataclasses.replace(batch, dataset_B=row)
    count, sides = processor.boxes, (processor.sam_image_size,) * 2
    if count:
        box, real = np.zeros((batch_size, count, 4), np.float32), np.zeros((batch_size, count), np.int32)
        batch = dataclasses.replace(batch, boxes_BK4=box, boxes_mask_BK=real)
    if not processor.sam_image_size or (stage and "res" not in dict(stage.mixture)):
        return batch
    large, mask = np.zeros((batch_size, *sides, 3), np.float32), np.zeros((batch_size, count, *sides), bool)
    return dataclasses.replace(batch, masks_BKHW=mask, masks_mask_BK=real, sam_image_BHWC=large)


def abstract_batch(batch: Batch, batch_size: int, mesh: Mesh) -> Batch:
    """Shapes of a batch of so many rows, laid over a mesh as `sharding.put_batch` lays it."""

    def one(x):
        shape = (batch_size, *x.shape[1:])
        where = sharding.partition_spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch")
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, where))

    return jax.tree.map(one, batch)


def cast_specs(tree, dtype: str):
    """Shapes of a tree whose floating leaves are held in another dtype."""

    def one(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(one, tree)


def train_step_target(experiment: Experiment, stage_index: int, specs: ParamSpecs) -> CompileTarget:
    """The update of a stage, as `training.loop` compiles it."""
    stage, mesh, run = experiment.stages[stage_index], specs.mesh, experiment.run
    trainable, idle = trees.split(specs.trainable, stage.trainable)
    frozen = trees.merge(specs.frozen, cast_specs(idle, run.frozen_dtype))
    rule = make_optimizer(stage, trainable, specs.layer_axes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
    state = stages.TrainState(step, trainable, abstract_opt_state(rule, trainable, mesh))
    system = stages.model_for_stage(experiment, stage)
    batch = abstract_batch(dummy_batch(experiment, stage), stage.batch_size, mesh)
    if run.cache_features:
        seen = jax.eval_shape(system.extract_features, trees.merge(trainable, frozen), batch)
        batch = dataclasses.replace(
            batch, features=abstract_batch(seen, stage.batch_size, mesh), image_BHWC=None, sam_image_BHWC=None
        )
    key = jax.random.key(0)
    update = stages.make_train_step(system, stage, rule, key, state, mesh, [])
    return CompileTarget(update, (state, frozen, batch), trees.count_params(trainable), trees.count_params(frozen))


def generation_target(experiment: Experiment, stage_index: int, specs: ParamSpecs, batch_size: int) -> CompileTarget:
    """Answers to so many prompts, as the model gives them after a stage."""
    stage, answer, mesh = experiment.stages[stage_index], experiment.generation, specs.mesh
    batch = dataclasses.replace(
        dummy_batch(experiment, stage), sam_image_BHWC=None, masks_BKHW=None, masks_mask_BK=None
    )
    batch = abstract_batch(batch, batch_size, mesh)
    end = experiment.model.info.end_token
    how = GenerationConfig(
        max_new_tokens=answer.max_new_tokens or experiment.data.processor.max_target_tokens,
        num_beams=answer.num_beams,
        length_penalty=answer.length_penalty,
        repetition_penalty=answer.repetition_penalty,
        eos_token_id=end,
        decoder_start_token_id=0 if experiment.data.processor.reader == "encoder" else None,
    )
    whole = trees.merge(specs.frozen, specs.trainable)
    system = stages.model_for_stage(experiment, stage)

    def answers(params, batch):
        with sharding.use_mesh(mesh):
            return generate(system, params, batch, how)

    turns = how.max_new_tokens - 1
    return CompileTarget(jax.jit(answers), (whole, batch), 0, trees.count_params(whole), turns)


# Meshes and policies


def fit_mesh(experiment: Experiment, stage: Stage, topology: Topology) -> tuple[MeshConfig, str]:
    """The config's own mesh where it splits the stage's batch over all of the pod; else the nearest, and why."""
    own = dataclasses.replace(experiment.mesh, slices=topology.slices)
    slices, data, fsdp, _ = own.shape(topology.devices)
    rows = stage.batch_size // stage.grad_accum_steps
    if rows % (slices * data * fsdp) == 0:
        return own, ""
    each = topology.devices // slices
    parts = max((n for n in range(1, each + 1) if each % n == 0 and rows % (n * slices) == 0), default=1)
    why = (
        f"{rows} rows do not divide over the config's mesh of {slices * data * fsdp} parts, so each would be computed "
        f"many times; planned for --mesh.fsdp {parts} --mesh.tensor {each // parts}"
    )
    return MeshConfig(1, parts, each // parts, slices), why


def with_remat(config, policy: str):
    """A config whose parts all remember as a policy of `layers.REMAT` says, for their backward pass."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "remat":
            changes[field.name] = policy
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_remat(value, policy)
    return dataclasses.replace(config, **changes)


# Compiling


def plan(
    experiment: Experiment,
    topology: Topology,
    stage_index: int,
    mesh: MeshConfig | None = None,
    remat: str | None = None,
    generation: bool = False,
    compiler_options: Mapping[str, str] | None = None,
    quick: bool = False,
) -> Plan:
    """Compile the update of a stage (or the generation behind it) for a pod, and read what came out.

    `options`: flags of the compiler. `quick`: it spends a third of the time, on a slower program that holds about as
    much. Raises UserError where libtpu is missing or the mesh does not fit the pod; a
    program that needs more memory than there is makes a plan that does not fit.
    """
    stage, note = experiment.stages[stage_index], ""
    if mesh is None:
        mesh, note = fit_mesh(experiment, stage, topology)
    if remat is not None:
        experiment = dataclasses.replace(experiment, system=with_remat(experiment.model, remat))
    grid = sharding.make_mesh(mesh, topologies.topology_devices(topology))
    layout = init_layout(experiment, dummy_batch(experiment), grid)
    rows = BATCH_SIZE_BUCKETS[-1] * topology.hosts if generation else stage.batch_size
    if generation:
        work = generation_target(experiment, stage_index, layout, rows)
    else:
        work = train_step_target(experiment, stage_index, layout)
    traced = work.function.trace(*work.arguments)
    flops = needed = hlo_analysis.jaxpr_flops(traced.jaxpr.jaxpr, work.while_trip_count)
    if not generation:
        plain = dataclasses.replace(experiment, model=with_remat(experiment.model, "none"))
        once = train_step_target(plain, stage_index, layout)
        needed = hlo_analysis.jaxpr_flops(once.function.trace(*once.arguments).jaxpr.jaxpr)
    across = topology.devices // topology.slices if topology.slices > 1 else 0
    given = dict(compiler_options or {}) | (QUICK_COMPILER_OPTIONS if quick else {})
    seen = compile_and_analyze(traced.lower(), str(topology), across, given)
    chip, parts = topology.chip, _num_batch_shards(rows // (1 if generation else stage.grad_accum_steps), grid)
    seconds = {}
    if seen["fits"]:
        seconds = roofline_seconds(chip, flops / (parts * grid.shape["tensor"]), seen)
    return Plan(
        config=experiment.name,
        what=GENERATION if generation else stage.name,
        topology=str(topology),
        devices=topology.devices,
        mesh=tuple(grid.shape[axis] for axis in sharding.MESH_AXES),
        rows=rows,
        fits=seen["fits"],
        peak_gib=None if seen["peak"] is None else seen["peak"] / GIB,
        hbm_gib=chip.hbm_gib,
        trained=work.num_trainable,
        frozen=work.num_frozen,
        flops=flops,
        needed_flops=needed,
        seconds=seconds,
        collectives=seen["collectives"],
        compile_seconds=seen["seconds"],
        peak_tflops=chip.peak_tflops,
        remat=remat or "as the config says",
        quick=quick,
        notes=(note,) if note else (),
    )


def roofline_seconds(chip: Chip, flops: float, analysis: Mapping) -> dict[str, float]:
    """Seconds that each of `LIMITS` takes at a chip's published peak, for its part of the products and bytes."""
    return {
        "products": flops / (chip.peak_tflops * 1e12),
        "memory": analysis["traffic"] / (chip.hbm_gb_per_s * 1e9),
        "links": analysis["near"] / (chip.ici_gb_per_s * 1e9),
        "network": analysis["far"] / (chip.dcn_gb_per_s * 1e9),
    }


def _num_batch_shards(batch_size: int, mesh: Mesh) -> int:
    """Over how many devices a batch is really split."""
    axes = sharding.partition_spec(("batch",), (batch_size,), mesh, "batch")[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
