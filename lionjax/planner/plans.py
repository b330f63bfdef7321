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
from lionjax.inference.engine import ROWS
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerateConfig
from lionjax.planner import hlo_analysis, topologies
from lionjax.planner.compile_cache import compiled
from lionjax.planner.topologies import GIB, Chip, Topology
from lionjax.training import step as stages
from lionjax.training.init import Layout
from lionjax.training.init import layout as init_layout
from lionjax.training.optimizer import abstract_optimiser, optimizer

GENERATION = "generation"
QUICK = {"exec_time_optimization_effort": -1.0}  # of -1..1; JAX's default is 0
LIMITS = ("products", "memory", "links", "network")


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
    def speed(self) -> float:
        """Predicted rows a second."""
        return self.rows / self.step_seconds if self.step_seconds else 0.0

    @property
    def dominates(self) -> str:
        """Which of `LIMITS` that is."""
        return max(self.seconds, key=self.seconds.get, default="nothing")

    @property
    def utilisation(self) -> float:
        """Predicted share of the chips' peak that is spent on what the model needs (MFU)."""
        most = self.devices * self.peak_tflops * 1e12 * self.step_seconds
        return self.needed_flops / most if most else 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A function to compile and the shapes to compile it for; `turns` of a loop whose end is not known before."""

    function: object
    arguments: tuple
    trained: int
    frozen: int
    turns: int = 1


# What is planned


def stage_number(experiment: Experiment, text: str | None) -> int:
    """Which stage is meant: by number from 1 on, by name, or (None) the one that trains most. Raises UserError."""
    names = [stage.name for stage in experiment.stages]
    if text is None:
        layout = init_layout(experiment, blank(experiment), sharding.make_mesh(devices=jax.devices()[:1]))
        counts = [trees.count(trees.split(layout.learned, stage.trainable)[0]) for stage in experiment.stages]
        return max(range(len(counts)), key=lambda number: (counts[number], number))
    if text in names:
        return names.index(text)
    if text.isdigit() and 1 <= int(text) <= len(names):
        return int(text) - 1
    raise UserError(f"there is no stage {text!r}; there are {', '.join(names)}, or 1 to {len(names)}")


def blank(experiment: Experiment, stage: Stage | None = None, rows: int = 2) -> Batch:
    """A batch of zeros as the pipeline makes it for a stage; None: one for all stages, of which shapes follow."""
    processor = experiment.data.processor
    text = [np.zeros((rows, n), np.int32) for n in (processor.prompt_length, processor.question_length)]
    target, row = np.zeros((rows, processor.target_length), np.int32), np.zeros(rows, np.int32)
    several = (processor.pictures,) if processor.pictures > 1 else ()
    image = np.zeros((rows, *several, *(processor.image_size,) * 2, 3), np.float32)
    batch = Batch(image, text[0], text[0], text[1], text[1], target, target, target, row, row)
    if stage is not None:
        batch = dataclasses.replace(batch, part_B=row)
    count, sides = processor.boxes, (processor.sam_size,) * 2
    if count:
        box, real = np.zeros((rows, count, 4), np.float32), np.zeros((rows, count), np.int32)
        batch = dataclasses.replace(batch, boxes_BK4=box, boxes_mask_BK=real)
    if not processor.sam_size or (stage and "res" not in dict(stage.mixture)):
        return batch
    large, mask = np.zeros((rows, *sides, 3), np.float32), np.zeros((rows, count, *sides), bool)
    return dataclasses.replace(batch, masks_BKHW=mask, masks_mask_BK=real, sam_image_BHWC=large)


def spread(batch: Batch, rows: int, mesh: Mesh) -> Batch:
    """Shapes of a batch of so many rows, laid over a mesh as `sharding.put_batch` lays it."""

    def one(x):
        shape = (rows, *x.shape[1:])
        where = sharding.spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch")
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, where))

    return jax.tree.map(one, batch)


def cast(tree, dtype: str):
    """Shapes of a tree whose floating leaves are held in another dtype."""

    def one(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(one, tree)


def training(experiment: Experiment, number: int, layout: Layout) -> Work:
    """The update of a stage, as `training.loop` compiles it."""
    stage, mesh, run = experiment.stages[number], layout.mesh, experiment.run
    trainable, idle = trees.split(layout.learned, stage.trainable)
    frozen = trees.merge(layout.never, cast(idle, run.frozen_dtype))
    rule = optimizer(stage, trainable, layout.layer_axes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
    state = stages.State(step, trainable, abstract_optimiser(rule, trainable, mesh))
    system = stages.system_of(experiment, stage)
    batch = spread(blank(experiment, stage), stage.batch_size, mesh)
    if run.cache_features:
        seen = jax.eval_shape(system.extract_features, trees.merge(trainable, frozen), batch)
        batch = dataclasses.replace(
            batch, features=spread(seen, stage.batch_size, mesh), image_BHWC=None, sam_image_BHWC=None
        )
    key = jax.random.key(0)
    update = stages.make_step(system, stage, rule, key, state, mesh, [])
    return Work(update, (state, frozen, batch), trees.count(trainable), trees.count(frozen))


def generating(experiment: Experiment, number: int, layout: Layout, rows: int) -> Work:
    """Answers to so many prompts, as the model gives them after a stage."""
    stage, answer, mesh = experiment.stages[number], experiment.answer, layout.mesh
    batch = dataclasses.replace(blank(experiment, stage), sam_image_BHWC=None, masks_BKHW=None, masks_mask_BK=None)
    batch = spread(batch, rows, mesh)
    end = experiment.system.info.end_token
    how = GenerateConfig(
        max_new_tokens=answer.max_new_tokens or experiment.data.processor.target_length,
        beams=answer.beams,
        length_penalty=answer.length_penalty,
        repetition_penalty=answer.repetition_penalty,
        eos=end,
        start=0 if experiment.data.processor.reader == "encoder" else None,
    )
    whole = trees.merge(layout.never, layout.learned)
    system = stages.system_of(experiment, stage)

    def answers(params, batch):
        with sharding.use(mesh):
            return generate(system, params, batch, how)

    turns = how.max_new_tokens - 1
    return Work(jax.jit(answers), (whole, batch), 0, trees.count(whole), turns)


# Meshes and policies


def mesh_for(experiment: Experiment, stage: Stage, topology: Topology) -> tuple[MeshConfig, str]:
    """The config's own mesh where it splits the stage's batch over all of the pod; else the nearest, and why."""
    own = dataclasses.replace(experiment.mesh, slices=topology.slices)
    slices, data, fsdp, _ = own.shape(topology.devices)
    rows = stage.batch_size // stage.accumulate
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
    number: int,
    mesh: MeshConfig | None = None,
    remat: str | None = None,
    generation: bool = False,
    options: Mapping[str, str] | None = None,
    quick: bool = False,
) -> Plan:
    """Compile the update of a stage (or the generation behind it) for a pod, and read what came out.

    `options`: flags of the compiler. `quick`: it spends a third of the time, on a slower program that holds about as
    much. Raises UserError where libtpu is missing or the mesh does not fit the pod; a
    program that needs more memory than there is makes a plan that does not fit.
    """
    stage, note = experiment.stages[number], ""
    if mesh is None:
        mesh, note = mesh_for(experiment, stage, topology)
    if remat is not None:
        experiment = dataclasses.replace(experiment, system=with_remat(experiment.system, remat))
    grid = sharding.make_mesh(mesh, topologies.devices(topology))
    layout = init_layout(experiment, blank(experiment), grid)
    rows = ROWS[-1] * topology.hosts if generation else stage.batch_size
    if generation:
        work = generating(experiment, number, layout, rows)
    else:
        work = training(experiment, number, layout)
    traced = work.function.trace(*work.arguments)
    flops = needed = hlo_analysis.products(traced.jaxpr.jaxpr, work.turns)
    if not generation:
        plain = dataclasses.replace(experiment, system=with_remat(experiment.system, "none"))
        once = training(plain, number, layout)
        needed = hlo_analysis.products(once.function.trace(*once.arguments).jaxpr.jaxpr)
    across = topology.devices // topology.slices if topology.slices > 1 else 0
    given = dict(options or {}) | (QUICK if quick else {})
    seen = compiled(traced.lower(), str(topology), across, given)
    chip, parts = topology.chip, _parts(rows // (1 if generation else stage.accumulate), grid)
    seconds = {}
    if seen["fits"]:
        seconds = predicted(chip, flops / (parts * grid.shape["tensor"]), seen)
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
        trained=work.trained,
        frozen=work.frozen,
        flops=flops,
        needed_flops=needed,
        seconds=seconds,
        collectives=seen["collectives"],
        compile_seconds=seen["seconds"],
        peak_tflops=chip.tflops,
        remat=remat or "as the config says",
        quick=quick,
        notes=(note,) if note else (),
    )


def predicted(chip: Chip, flops: float, seen: Mapping) -> dict[str, float]:
    """Seconds that each of `LIMITS` takes at a chip's published peak, for its part of the products and bytes."""
    return {
        "products": flops / (chip.tflops * 1e12),
        "memory": seen["traffic"] / (chip.memory * 1e9),
        "links": seen["near"] / (chip.links * 1e9),
        "network": seen["far"] / (chip.network * 1e9),
    }


def _parts(rows: int, mesh: Mesh) -> int:
    """Over how many devices a batch is really split."""
    axes = sharding.spec(("batch",), (rows,), mesh, "batch")[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
