# SPDX-License-Identifier: Apache-2.0
"""Plans of answering: the programs of `inference.session`, compiled for a TPU topology, and the tokens/s they bound.

Three programs run in turn: features of an admission's images, reading its prompts into free slots, and one token of all
slots. Their times at the published peak rates are added, because they do not overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.sharding import MeshConfig
from lionjax.inference import answer_mesh, slots
from lionjax.inference.answer_request import SessionSizes
from lionjax.inference.image_pool import pool_images
from lionjax.inference.sampling import GenerationConfig
from lionjax.inference.slots import Admission
from lionjax.nn import kv_cache
from lionjax.planner import hlo_analysis, topologies
from lionjax.planner.compile_cache import compile_and_analyze
from lionjax.planner.plans import QUICK_COMPILER_OPTIONS, abstract_batch, cast_specs, dummy_batch, roofline_seconds
from lionjax.planner.topologies import GIB, Topology
from lionjax.training import step as stages
from lionjax.training.init import make_param_specs

ANSWERS = "answers"
USABLE_MEMORY = 0.95  # of a chip's
PROMPT_TOKENS = 128  # of text, as in evaluation, where the config allows as many


@dataclasses.dataclass(frozen=True)
class AnswerPlan:
    """Bounds of answering on one topology.

    `programs`: {"images", "admission", "token": seconds at the published peak rates}; `terms`: their resources;
    `peak_gib`: the largest of the programs'. `tokens`: new tokens of each answer; `prompt_tokens`: of text.
    """

    config: str
    topology: str
    devices: int
    mesh: tuple[int, int, int, int]
    num_slots: int
    admission_rows: int
    prompt_tokens: int
    tokens: int
    fits: bool
    peak_gib: float | None
    hbm_gib: float
    programs: Mapping[str, float]
    terms: Mapping[str, Mapping[str, float]]
    compile_seconds: float
    quick: bool = False

    @property
    def seconds_per_answer(self) -> float:
        """Of the whole slice: its share of an admission, and of the steps that its slot shares with the others."""
        admission = self.programs["images"] + self.programs["admission"]
        return admission / self.admission_rows + self.tokens * self.programs["token"] / self.num_slots

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second over all devices, images and prompts counted."""
        return self.tokens / self.seconds_per_answer if self.fits else 0.0


def plan_answers(
    experiment: Experiment,
    topology: Topology,
    mesh: MeshConfig | None = None,
    num_slots: int | None = None,
    admission_rows: int | None = None,
    quick: bool = False,
) -> AnswerPlan:
    """Compile the programs of answering with a config's model for a topology; returns their AnswerPlan.

    `mesh`: default `answer_mesh.choose_mesh`. `num_slots`, `admission_rows`: over the whole slice; default by the
    memory. Raises UserError if libtpu is missing or the model does not fit.
    """
    processor, chip = experiment.data.processor, topology.chip
    lengths = (min(processor.max_prompt_tokens, PROMPT_TOKENS), processor.max_question_tokens)
    model = stages.model_for_stage(experiment, experiment.stages[-1])
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    size = 2 * trees.count_params(_params_like(experiment, one_device))
    if mesh is None:
        local = topology.devices // topology.hosts
        mesh = answer_mesh.choose_mesh(size, local, topology.hosts, int(chip.hbm_gib * GIB))
        local_share = topology.devices // (mesh.data * mesh.tensor)
        mesh = dataclasses.replace(mesh, data=mesh.data * local_share)
    device_mesh = sharding.make_mesh(mesh, topologies.topology_devices(topology))
    params = _params_like(experiment, device_mesh)
    generation = GenerationConfig(
        max_new_tokens=experiment.generation.max_new_tokens or processor.max_target_tokens,
        eos_token_id=model.info.end_token,
        decoder_start_token_id=0 if processor.reader == "encoder" else None,
    )
    batch = _batch(experiment, lengths, 2)
    free = USABLE_MEMORY * chip.hbm_gib * GIB - size / device_mesh.shape["tensor"]
    one_slot = answer_mesh.slot_bytes(model, params, batch, generation)
    sizes = answer_mesh.session_sizes(device_mesh, lengths, one_slot, int(free))
    sizes = dataclasses.replace(
        sizes, num_slots=num_slots or sizes.num_slots, admission_rows=admission_rows or sizes.admission_rows
    )
    programs = _programs(model, params, experiment, device_mesh, generation, sizes)
    options = QUICK_COMPILER_OPTIONS if quick else {}
    seconds, terms, peaks, compiled, fits = {}, {}, [], 0.0, True
    for name, (traced, rows) in programs.items():
        flops = hlo_analysis.jaxpr_flops(traced.jaxpr.jaxpr, 1)
        analysis = compile_and_analyze(traced.lower(), str(topology), 0, options)
        fits, compiled = fits and analysis["fits"], compiled + analysis["seconds"]
        peaks.append(analysis["peak"] or 0)
        shards = np.gcd(rows, device_mesh.size // device_mesh.shape["tensor"]) * device_mesh.shape["tensor"]
        terms[name] = roofline_seconds(chip, flops / shards, analysis)
        seconds[name] = max(terms[name].values())
    return AnswerPlan(
        config=experiment.name,
        topology=str(topology),
        devices=topology.devices,
        mesh=tuple(device_mesh.shape[axis] for axis in sharding.MESH_AXES),
        num_slots=sizes.num_slots,
        admission_rows=sizes.admission_rows,
        prompt_tokens=lengths[0],
        tokens=generation.max_new_tokens,
        fits=fits,
        peak_gib=max(peaks) / GIB,
        hbm_gib=chip.hbm_gib,
        programs=seconds,
        terms=terms,
        compile_seconds=compiled,
        quick=quick,
    )


def run_answer_job(job) -> AnswerPlan:
    """`plan_answers` with the fields of a `worker.Job`, for a worker process."""
    return plan_answers(config.from_json(job.experiment_json), job.topology, job.mesh, quick=job.quick)


def _params_like(experiment: Experiment, mesh: Mesh):
    """ShapeDtypeStructs of all parameters in bfloat16."""
    specs = make_param_specs(experiment, dummy_batch(experiment), mesh)
    return cast_specs(trees.merge(specs.frozen, specs.trainable), "bfloat16")


def _batch(experiment: Experiment, lengths: tuple[int, int], rows: int):
    """A batch of zeros with prompts and questions of these lengths, without targets."""
    batch = dummy_batch(experiment, batch_size=rows)
    prompt, question = (np.zeros((rows, length), np.int32) for length in lengths)
    one = np.zeros((rows, 1), np.int32)
    return dataclasses.replace(
        batch,
        prompt_BL=prompt,
        prompt_mask_BL=prompt,
        question_BL=question,
        question_mask_BL=question,
        target_BM=one,
        target_mask_BM=one,
        loss_mask_BM=one,
        sam_image_BHWC=None,
        masks_BKHW=None,
        masks_mask_BK=None,
    )


def _programs(
    model, params, experiment: Experiment, mesh: Mesh, generation: GenerationConfig, sizes: SessionSizes
) -> dict:
    """{name: (traced program, its rows)} of a session."""
    rows, num_slots = sizes.admission_rows, sizes.num_slots
    lengths = (sizes.prompt_length, sizes.question_length)
    batch = abstract_batch(_batch(experiment, lengths, 2), rows, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def spec(shape, dtype, sharding_=replicated):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_)

    def traced(function, *arguments, donated=()):
        def in_mesh(*arguments):
            with sharding.use_mesh(mesh):
                return function(*arguments)

        return jax.jit(in_mesh, donate_argnums=donated).trace(*arguments)

    features = jax.eval_shape(model.answer_features, params, batch)
    pool_size = 1 + pool_images(rows, features)
    pool = jax.tree.map(lambda leaf: spec((pool_size, *leaf.shape[1:]), leaf.dtype), features)
    row_spec = abstract_batch(np.zeros(2, np.int32), rows, mesh)
    groups = mesh.size // mesh.shape["tensor"]
    slot_GR = abstract_batch(np.zeros((2, rows // groups), np.int32), groups, mesh)
    without_images = dataclasses.replace(batch, image_BHWC=None)
    admission = Admission(without_images, slot_GR, row_spec, row_spec, None)

    def admit(params, all_slots, admission, pool):
        return slots.admit(model, params, all_slots, admission, pool, generation)

    def decode(params, all_slots):  # the body of the loop of `slots.decode`
        logits_BV, cache = model.extend(params, all_slots.rows.token_B, all_slots.cache)
        rows = slots.append_token(all_slots.rows, logits_BV, generation)
        return slots.Slots(kv_cache.constrain_cache(cache), rows)

    def init(params, admission, pool):
        return slots.init_slots(model, params, admission, pool, generation, num_slots)

    def encode(params, batch, pool, place_B):
        return slots.encode_images(model, params, batch, pool, place_B)

    with sharding.use_mesh(mesh):
        shapes = jax.eval_shape(init, params, admission, pool)
    cache_specs = kv_cache.cache_shardings(shapes.cache, mesh)
    cache = jax.tree.map(lambda leaf, where: spec(leaf.shape, leaf.dtype, where), shapes.cache, cache_specs)
    all_rows = jax.tree.map(lambda leaf: abstract_batch(leaf, num_slots, mesh), shapes.rows)
    all_slots = slots.Slots(cache, all_rows)
    return {
        "images": (traced(encode, params, batch, pool, spec((rows,), jnp.int32), donated=(2,)), rows),
        "admission": (traced(admit, params, all_slots, admission, pool, donated=(1,)), rows),
        "token": (traced(decode, params, all_slots, donated=(1,)), num_slots),
    }
