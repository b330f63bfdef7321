# SPDX-License-Identifier: Apache-2.0
"""Plans: the train step or generation of a config, compiled ahead of time for a TPU topology, with a roofline estimate.

Nothing is allocated or executed. Peak memory is the compiler's figure. Times are predictions: the program's FLOPs and
bytes over the chip's published peak rates.
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
from lionjax.core.types import VLM, Batch, PackedText, Params, UserError
from lionjax.data.processor_config import ProcessorConfig
from lionjax.data.scenes.tasks import MASK_TASKS
from lionjax.inference.engine import BATCH_SIZE_BUCKETS
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerationConfig
from lionjax.planner import hlo_analysis, row_shapes, topologies
from lionjax.planner.compile_cache import compile_and_analyze
from lionjax.planner.topologies import GIB, Chip, Topology
from lionjax.training import step as stages
from lionjax.training.init import ParamSpecs, make_param_specs
from lionjax.training.optimizer import abstract_opt_state, make_optimizer

GENERATION = "generation"
QUICK_COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0}  # in -1..1; JAX's default is 0
ROOFLINE_TERMS = ("products", "memory", "links", "network")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, cost and predicted time of one compiled program on one topology.

    `what`: a stage's name, or "generation". `mesh`: devices along slice, data, fsdp, tensor. `rows`: global batch size.
    `peak_gib`, `hbm_gib`: used and available memory per device; `peak_gib` is None if the compiler does not report it.
    `trained`, `frozen`: numbers of parameters. `flops`: of one run, over all devices; `needed_flops`: without
    rematerialization. `seconds`: {term of ROOFLINE_TERMS: seconds at the published peak rate}. `exposed_seconds`: the
    part of links and network in collectives that no other instruction overlaps. `collectives`: {opcode: [count, bytes
    sent per device, bytes of the largest output]}. `broke_off`: the compiler crashed; only the settings are valid.
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
    remat: str = "as configured"
    quick: bool = False
    notes: tuple[str, ...] = ()
    broke_off: bool = False
    exposed_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of one run: the largest roofline term, with the others fully overlapped."""
        return max(self.seconds.values(), default=0.0)

    @property
    def overlap_step_seconds(self) -> float:
        """Predicted seconds of one run with the program's own overlap: synchronous collectives are added.

        Asynchronous collectives are hidden behind computation, which is bound by products or memory.
        """
        hidden = {"links": self.seconds.get("links", 0.0) + self.seconds.get("network", 0.0) - self.exposed_seconds}
        return max((self.seconds | hidden | {"network": 0.0}).values()) + self.exposed_seconds if self.seconds else 0.0

    @property
    def examples_per_second(self) -> float:
        """Predicted examples per second over all devices."""
        return self.rows / self.step_seconds if self.step_seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """The term of ROOFLINE_TERMS that bounds `step_seconds`."""
        return max(self.seconds, key=self.seconds.get, default="nothing")

    @property
    def mfu(self) -> float:
        """Predicted model FLOPs utilization: `needed_flops` over the peak FLOPs of all devices in `step_seconds`."""
        return self._utilization(self.step_seconds)

    @property
    def overlap_mfu(self) -> float:
        """As `mfu`, in `overlap_step_seconds`."""
        return self._utilization(self.overlap_step_seconds)

    def _utilization(self, seconds: float) -> float:
        peak_flops = self.devices * self.peak_tflops * 1e12 * seconds
        return self.needed_flops / peak_flops if peak_flops else 0.0


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """A jitted function and the ShapeDtypeStructs to compile it for.

    `while_trip_count`: number of iterations to assume for while loops (the decode loop).
    """

    function: object
    arguments: tuple
    num_trainable: int
    num_frozen: int
    while_trip_count: int = 1


def find_stage_index(experiment: Experiment, name: str | None) -> int:
    """Index of a stage given by name or by number from 1; None: the stage that trains the most parameters.

    Raises UserError for an unknown stage.
    """
    names = [stage.name for stage in experiment.stages]
    if name is None:
        specs = make_param_specs(experiment, dummy_batch(experiment), sharding.make_mesh(devices=jax.devices()[:1]))
        counts = [trees.count_params(trees.split(specs.trainable, stage.trainable)[0]) for stage in experiment.stages]
        return max(range(len(counts)), key=lambda index: (counts[index], index))
    if name in names:
        return names.index(name)
    if name.isdigit() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise UserError(f"there is no stage {name!r}; the stages are {', '.join(names)} (or 1 to {len(names)})")


def dummy_batch(experiment: Experiment, stage: Stage | None = None, batch_size: int = 2) -> Batch:
    """A batch of zeros with the shapes of the pipeline's batches for a stage; None: for parameter initialization."""
    processor = experiment.data.processor
    prompt = np.zeros((batch_size, processor.max_prompt_tokens), np.int32)
    question = np.zeros((batch_size, processor.max_question_tokens), np.int32)
    target, row = np.zeros((batch_size, processor.max_target_tokens), np.int32), np.zeros(batch_size, np.int32)
    images_axis = (processor.max_images,) if processor.max_images > 1 else ()
    image = np.zeros((batch_size, *images_axis, *(processor.image_size,) * 2, 3), np.float32)
    batch = Batch(image, prompt, prompt, question, question, target, target, target, row, row)
    if stage is not None:
        batch = dataclasses.replace(batch, dataset_B=row)
    if processor.region_width:
        shape = (batch_size, *images_axis, processor.max_regions)
        regions = np.zeros((*shape, processor.region_width), np.float32)
        batch = dataclasses.replace(batch, region_BKD=regions, region_mask_BK=np.zeros(shape, bool))
    if processor.packing is not None:
        packed = np.zeros((batch_size, processor.packing.length), np.int32)
        batch = dataclasses.replace(batch, packed=PackedText(*(packed,) * len(dataclasses.fields(PackedText))))
    if processor.slots is not None:
        batch = dataclasses.replace(batch, **_slot_fields(processor, batch_size))
    max_boxes, sam_size = processor.max_boxes, (processor.sam_image_size,) * 2
    if max_boxes:
        boxes, valid = np.zeros((batch_size, max_boxes, 4), np.float32), np.zeros((batch_size, max_boxes), np.int32)
        batch = dataclasses.replace(batch, boxes_BK4=boxes, boxes_mask_BK=valid)
    if not processor.sam_image_size or (stage and not set(MASK_TASKS) & set(dict(stage.mixture))):
        return batch
    sam_image = np.zeros((batch_size, *sam_size, 3), np.float32)
    masks = np.zeros((batch_size, max_boxes, *sam_size), bool)
    size = np.zeros((batch_size, 2), np.int32) if processor.sam_padding == "corner" else None
    fields = {"masks_BKHW": masks, "masks_mask_BK": valid, "sam_image_BHWC": sam_image, "sam_size_B2": size}
    return dataclasses.replace(batch, **fields)


def _slot_fields(processor: ProcessorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """The fields of a `Batch` for slots of states and objects, zeros."""
    slots, fields = processor.slots, {}
    if slots.max_states:
        fields["state_BKS"] = np.zeros((batch_size, slots.max_states, slots.state_width), np.float32)
    if slots.max_objects:
        side = (processor.image_size,) * 2
        fields["object_mask_BKHW"] = np.zeros((batch_size, slots.max_objects, *side), bool)
    return fields


def abstract_batch(batch: Batch, batch_size: int, mesh: Mesh) -> Batch:
    """ShapeDtypeStructs of a batch with `batch_size` rows, sharded over a mesh as by `sharding.shard_batch`."""

    def abstract_leaf(x):
        shape = (batch_size, *x.shape[1:])
        spec = sharding.partition_spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch")
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(abstract_leaf, batch)


def cast_specs(tree, dtype: str):
    """The ShapeDtypeStructs of `tree`, floating-point leaves with `dtype`."""

    def cast_leaf(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(cast_leaf, tree)


def train_batch(experiment: Experiment, stage: Stage, model: VLM, params: Params, mesh: Mesh) -> Batch:
    """ShapeDtypeStructs of a stage's batches, with cached features if they are kept, in rows of several examples."""
    if stage.examples_per_row == 1:
        batch = abstract_batch(dummy_batch(experiment, stage), stage.batch_size, mesh)
        if not experiment.run.cache_features:
            return batch
        features = abstract_batch(jax.eval_shape(model.extract_features, params, batch), stage.batch_size, mesh)
        return dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)
    batch = dummy_batch(experiment, stage, stage.examples_per_row)
    if experiment.run.cache_features:
        shapes = jax.eval_shape(model.extract_features, params, batch)
        features = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        batch = dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)
    row = row_shapes.packed_row(batch, model.info.row_layout, stage, experiment.data.length_buckets)
    return abstract_batch(row, stage.num_rows, mesh)


def train_step_target(experiment: Experiment, stage_index: int, specs: ParamSpecs) -> CompileTarget:
    """The train step of a stage, as `training.loop` compiles it."""
    stage, mesh, run = experiment.stages[stage_index], specs.mesh, experiment.run
    trainable, idle = trees.split(specs.trainable, stage.trainable)
    frozen = trees.merge(specs.frozen, cast_specs(idle, run.frozen_dtype))
    tx = make_optimizer(stage, trainable, specs.layer_axes)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    state = stages.TrainState(step, trainable, abstract_opt_state(tx, trainable, mesh))
    model = stages.model_for_stage(experiment, stage)
    batch = train_batch(experiment, stage, model, trees.merge(trainable, frozen), mesh)
    train_step = stages.make_train_step(model, stage, tx, jax.random.key(0), state, mesh, [])
    return CompileTarget(train_step, (state, frozen, batch), trees.count_params(trainable), trees.count_params(frozen))


def generation_target(experiment: Experiment, stage_index: int, specs: ParamSpecs, batch_size: int) -> CompileTarget:
    """Generation for `batch_size` prompts with the experiment's defaults and a stage's model."""
    stage, defaults, mesh = experiment.stages[stage_index], experiment.generation, specs.mesh
    batch = dataclasses.replace(
        dummy_batch(experiment, stage), sam_image_BHWC=None, masks_BKHW=None, masks_mask_BK=None
    )
    batch = abstract_batch(batch, batch_size, mesh)
    config = GenerationConfig(
        max_new_tokens=defaults.max_new_tokens or experiment.data.processor.max_target_tokens,
        num_beams=defaults.num_beams,
        length_penalty=defaults.length_penalty,
        repetition_penalty=defaults.repetition_penalty,
        eos_token_id=experiment.model.info.end_token,
        decoder_start_token_id=0 if experiment.data.processor.reader == "encoder" else None,
    )
    params = trees.merge(specs.frozen, specs.trainable)
    model = stages.model_for_stage(experiment, stage)

    def generate_batch(params, batch):
        with sharding.use_mesh(mesh):
            return generate(model, params, batch, config)

    num_params, decode_steps = trees.count_params(params), config.max_new_tokens - 1
    return CompileTarget(jax.jit(generate_batch), (params, batch), 0, num_params, decode_steps)


def fit_mesh(experiment: Experiment, stage: Stage, topology: Topology) -> tuple[MeshConfig, str]:
    """(mesh, note): the config's mesh if it splits the stage's microbatch evenly, with an empty note.

    Else the mesh with the most fsdp devices that does, all others on the tensor axis, and a note with the reason.
    """
    config_mesh = dataclasses.replace(experiment.mesh, slices=topology.slices)
    slices, data, fsdp, _ = config_mesh.shape(topology.devices)
    batch_size = stage.num_rows // stage.grad_accum_steps
    if batch_size % (slices * data * fsdp) == 0:
        return config_mesh, ""
    devices = topology.devices // slices
    shards = max((n for n in range(1, devices + 1) if devices % n == 0 and batch_size % (n * slices) == 0), default=1)
    note = (
        f"a microbatch of {batch_size} examples does not split over the {slices * data * fsdp} batch shards of the "
        f"config's mesh; planned for --mesh.fsdp {shards} --mesh.tensor {devices // shards}"
    )
    return MeshConfig(1, shards, devices // shards, slices), note


def with_remat(config, policy: str):
    """The config with `remat` set to a policy of `layers.REMAT_POLICIES` in all its parts."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "remat":
            changes[field.name] = policy
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_remat(value, policy)
    return dataclasses.replace(config, **changes)


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
    """Compile the train step of a stage, or generation with its model, for a topology; returns its Plan.

    `mesh`: default `fit_mesh`. `remat`: default the config's policies. `compiler_options`: XLA options. `quick`:
    compile in a third of the time, to a slower program that uses about as much memory. A program that needs more memory
    than a device has gives a Plan with `fits` False. Raises UserError if libtpu is missing or the mesh does not match
    the topology.
    """
    stage, note = experiment.stages[stage_index], ""
    if mesh is None:
        mesh, note = fit_mesh(experiment, stage, topology)
    if remat is not None:
        experiment = dataclasses.replace(experiment, model=with_remat(experiment.model, remat))
    device_mesh = sharding.make_mesh(mesh, topologies.topology_devices(topology))
    specs = make_param_specs(experiment, dummy_batch(experiment), device_mesh)
    batch_size = BATCH_SIZE_BUCKETS[-1] * topology.hosts if generation else stage.batch_size
    if generation:
        target = generation_target(experiment, stage_index, specs, batch_size)
    else:
        target = train_step_target(experiment, stage_index, specs)
    traced = target.function.trace(*target.arguments)
    flops = needed_flops = hlo_analysis.jaxpr_flops(traced.jaxpr.jaxpr, target.while_trip_count)
    if not generation:
        no_remat = dataclasses.replace(experiment, model=with_remat(experiment.model, "none"))
        no_remat_target = train_step_target(no_remat, stage_index, specs)
        no_remat_trace = no_remat_target.function.trace(*no_remat_target.arguments)
        needed_flops = hlo_analysis.jaxpr_flops(no_remat_trace.jaxpr.jaxpr)
    slice_devices = topology.devices // topology.slices if topology.slices > 1 else 0
    options = dict(compiler_options or {}) | (QUICK_COMPILER_OPTIONS if quick else {})
    analysis = compile_and_analyze(traced.lower(), str(topology), slice_devices, options)
    chip = topology.chip
    shards = _num_batch_shards(batch_size if generation else stage.num_rows // stage.grad_accum_steps, device_mesh)
    seconds, exposed = {}, 0.0
    if analysis["fits"]:
        seconds = roofline_seconds(chip, flops / (shards * device_mesh.shape["tensor"]), analysis)
        links, network = chip.ici_gb_per_s * 1e9, chip.dcn_gb_per_s * 1e9
        exposed = analysis["near_exposed"] / links + analysis["far_exposed"] / network
    return Plan(
        config=experiment.name,
        what=GENERATION if generation else stage.name,
        topology=str(topology),
        devices=topology.devices,
        mesh=tuple(device_mesh.shape[axis] for axis in sharding.MESH_AXES),
        rows=batch_size,
        fits=analysis["fits"],
        peak_gib=None if analysis["peak"] is None else analysis["peak"] / GIB,
        hbm_gib=chip.hbm_gib,
        trained=target.num_trainable,
        frozen=target.num_frozen,
        flops=flops,
        needed_flops=needed_flops,
        seconds=seconds,
        collectives=analysis["collectives"],
        compile_seconds=analysis["seconds"],
        peak_tflops=chip.peak_tflops,
        remat=remat or "as configured",
        quick=quick,
        notes=(note,) if note else (),
        exposed_seconds=exposed,
    )


def roofline_seconds(chip: Chip, flops: float, analysis: Mapping) -> dict[str, float]:
    """{term of ROOFLINE_TERMS: seconds} at the chip's published peak rates.

    `flops`: per device. `analysis`: bytes per device, see `compile_and_analyze`.
    """
    return {
        "products": flops / (chip.peak_tflops * 1e12),
        "memory": analysis["traffic"] / (chip.hbm_gb_per_s * 1e9),
        "links": analysis["near"] / (chip.ici_gb_per_s * 1e9),
        "network": analysis["far"] / (chip.dcn_gb_per_s * 1e9),
    }


def _num_batch_shards(batch_size: int, mesh: Mesh) -> int:
    """Number of shards that a batch of this size is split into on the mesh."""
    axes = sharding.partition_spec(("batch",), (batch_size,), mesh, "batch")[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
