# SPDX-License-Identifier: Apache-2.0
"""Plans: names of slices, the batches they are made for, what the compiler may and may not exchange, what fits, and the
order in which a search ranks. What needs libtpu is left out where it is not installed."""

import dataclasses
import json
import os
import signal
import tempfile
from pathlib import Path

import breaking_plans
import flax.linen as nn
import jax
import numpy as np
import pytest
import small_lion
import small_places
from paths import CONFIGS, EXPERIMENTS

from lionjax import cli, planner
from lionjax.cli import plan as plan_command
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import VLM, UserError
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.example_rows import RowBatches
from lionjax.data.processor import ProcessorConfig
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.nn import losses
from lionjax.nn.adapters import AdapterConfig
from lionjax.planner import compile_cache as scaling_compiled
from lionjax.planner import hlo_analysis, libtpu, mesh_search, topologies, worker
from lionjax.planner.plans import train_batch
from lionjax.training.init import make_param_specs as init_layout

compiles = pytest.mark.skipif(not topologies.has_libtpu(), reason="libtpu, of the extra tpu, is not installed")

# Names


@pytest.mark.parametrize(
    ("name", "kind", "shape", "chips"),
    [
        ("v5e-16", "v5e", (4, 4), 16),
        ("v5litepod-256", "v5e", (16, 16), 256),
        ("v5e-8", "v5e", (2, 4), 8),
        ("v5e-1", "v5e", (1, 1), 1),
        ("V6E-64", "v6e", (8, 8), 64),
        ("v5p-512", "v5p", (4, 8, 8), 256),
        ("tpu-v5p-32", "v5p", (2, 2, 4), 16),
        ("v4-8", "v4", (2, 2, 1), 4),
        ("v4-32", "v4", (2, 2, 4), 16),
        ("tpu7x-128", "tpu7x", (4, 4, 4), 64),
        ("tpu7x-16", "tpu7x", (2, 2, 2), 8),
        ("v5p:4x4x8", "v5p", (4, 4, 8), 128),
        ("v6e:2x8", "v6e", (2, 8), 16),
    ],
)
def test_a_tpu_slice_is_found_by_its_common_name(name, kind, shape, chips):
    found = topologies.parse_topology(name)
    assert (found.chip.name, found.shape, found.chips) == (kind, shape, chips)
    assert found.devices == chips * (2 if kind == "tpu7x" else 1)
    assert topologies.parse_topology(name, 3).chips == 3 * chips


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5q-16", "did you mean v5"),
        ("v5lightpod-16", "did you mean v5litepod-16?"),
        ("v5e-17", "did you mean v5e-16?"),
        ("v5p-500", "there is no v5p-500 (the number counts cores); did you mean v5p-512?"),
        ("v5p:4x4", "needs 3 sizes"),
        ("v5e:4x0", "as in v5e:4x8"),
        ("pod", "write for example"),
    ],
)
def test_an_unknown_topology_name_is_refused_with_the_closest_one(name, hint, capsys):
    with pytest.raises(UserError, match="."):
        topologies.parse_topology(name)
    assert cli.main(["plan", str(CONFIGS / "tiny_lion.py"), "--topology", name]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


def test_missing_libtpu_is_said_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topologies, "has_libtpu", lambda: False)
    assert cli.main(["plan", str(CONFIGS / "tiny_lion.py"), "--topology", "v5e-16"]) == 2
    assert "pip install 'lionjax[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("64,4", MeshConfig(1, 64, 4)),
        ("2,32,4", MeshConfig(2, 32, 4)),
        ("-1", MeshConfig(1, -1, 1)),
        ("fsdp=64, tensor=4", MeshConfig(-1, 64, 4)),
    ],
)
def test_a_mesh_by_its_sizes_or_its_names(words, made):
    assert plan_command.parse_mesh(words) == made
    assert plan_command.parse_mesh(words, slices=2) == dataclasses.replace(made, slices=2)


@pytest.mark.parametrize("words", ["64x4", "1,2,3,4", "fdsp=4", "fsdp=four"])
def test_invalid_mesh_raises_a_one_sentence_error(words):
    with pytest.raises(UserError, match="is no mesh; write fsdp=4,tensor=2"):
        plan_command.parse_mesh(words)


@pytest.mark.slow
def test_without_a_given_stage_the_one_that_trains_most_is_planned():
    what = small_lion.experiment()
    assert planner.find_stage_index(what, None) == 2
    assert planner.find_stage_index(what, "1") == planner.find_stage_index(what, "first") == 0
    with pytest.raises(UserError, match="the stages are first, second, third"):
        planner.find_stage_index(what, "4")


# What is compiled


def shapes(batch):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), batch)


@pytest.mark.parametrize("name", ["lion", *small_places.SYSTEMS])
def test_a_plan_is_made_for_batches_as_the_pipeline_makes_them(name):
    what = small_lion.experiment() if name == "lion" else small_places.experiment(*small_places.SYSTEMS[name])
    for stage in what.stages:
        stream = pipeline.batches(what.data, stage, 0, stage.batch_size, 0, 1)
        batch = next(stream)
        stream.close()
        assert shapes(planner.dummy_batch(what, stage, stage.batch_size)) == shapes(batch)


@pytest.mark.parametrize("caches", [False, True])
def test_a_plan_of_rows_with_several_examples_has_the_arrays_of_the_pipelines_rows(caches):
    what = small_places.experiment(*small_places.SYSTEMS["nextchat"])
    stage = dataclasses.replace(what.stages[0], batch_size=8, examples_per_row=2, mixture=(("caption", 1.0),))
    data, run = (
        dataclasses.replace(what.data, length_buckets=(300,)),
        dataclasses.replace(what.run, cache_features=caches),
    )
    what = dataclasses.replace(what, data=data, run=run, stages=(stage,))
    params = sharding.abstract_params(what.model.init, jax.random.key(0), planner.dummy_batch(what))
    planned = train_batch(what, stage, what.model, params, sharding.make_mesh(devices=jax.devices()[:1]))
    stream = pipeline.batches(what.data, stage, 0, stage.batch_size, 0, 1)
    rows = next(RowBatches(stream, what.model.info.row_layout, 2, data.length_buckets))
    stream.close()
    changed = ("image_BHWC", "features") if caches else ()
    lengths = ("target_BM", "target_mask_BM", "loss_mask_BM", "target_index_BM")
    for field in dataclasses.fields(rows):
        one, other = getattr(planned, field.name), getattr(rows, field.name)
        if field.name in lengths:
            assert one.shape[0] == other.shape[0] == 4 and other.shape[1] <= 300 >= one.shape[1]
        elif field.name not in changed:
            assert shapes(one) == shapes(other), field.name
    if caches:
        assert planned.image_BHWC is None
        assert planned.features["patches"].shape[:2] == (4, 2)


def test_a_batch_size_that_the_mesh_does_not_divide_gets_the_nearest_mesh_that_divides_it():
    what, pod = small_lion.experiment(), topologies.parse_topology("v5e-16")
    what = dataclasses.replace(what, mesh=MeshConfig(1, -1, 1))
    wide = dataclasses.replace(what.stages[0], batch_size=32)
    assert planner.fit_mesh(what, wide, pod) == (MeshConfig(1, -1, 1), "")
    mesh, why = planner.fit_mesh(what, what.stages[0], pod)  # of 8
    assert mesh == MeshConfig(1, 8, 2) and "--mesh.fsdp 8 --mesh.tensor 2" in why
    mesh, _ = planner.fit_mesh(what, wide, topologies.parse_topology("v5e-16", 4))
    assert mesh == MeshConfig(1, 8, 2, 4)


def test_with_gradient_accumulation_a_mesh_is_planned_for_one_microbatch():
    what, pod = small_lion.experiment(), topologies.parse_topology("v5e-16")
    what = dataclasses.replace(what, mesh=MeshConfig(1, -1, 1))
    stage = dataclasses.replace(what.stages[0], batch_size=32, grad_accum_steps=4)
    mesh, why = planner.fit_mesh(what, stage, pod)
    assert mesh == MeshConfig(1, 8, 2) and why.startswith("a microbatch of 8 examples does not split over")
    wide = dataclasses.replace(stage, batch_size=64)
    assert planner.fit_mesh(what, wide, pod) == (MeshConfig(1, -1, 1), "")


def test_remat_policy_reaches_every_part():
    system = planner.with_remat(small_lion.SYSTEM, "full")
    assert system.vision.remat == system.language.remat == "full"
    assert small_lion.SYSTEM.vision.remat == "none"


# What may be exchanged: a frozen decoder with small adapters, layers scanned, as every system has one

LAYERS, WIDTH, HIDDEN = 6, 256, 1024
SPEAKER = DecoderConfig(512, WIDTH, LAYERS, 8, 8, 32, HIDDEN, adapters=AdapterConfig(8), remat="full")


class SpeakerModule(nn.Module):
    c: "Speaker"

    @nn.compact
    def __call__(self, batch):
        language = Decoder(self.c.language, name="language")
        x_BMD = language.embed(batch.target_BM, self.c.dtype)
        return language.logits(language(x_BMD, batch.target_mask_BM, batch.task_B))


@dataclasses.dataclass(frozen=True)
class Speaker(VLM):
    language: DecoderConfig = SPEAKER
    dtype: str = "bfloat16"

    def init(self, key, batch):
        return SpeakerModule(self).init(key, batch)["params"]

    def loss(self, params, batch, key=None):
        logits_BMV = SpeakerModule(self).apply({"params": params}, batch)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)


def speaking(rows: int = 32, system: Speaker = Speaker(), trainable=("language/blocks/adapters",)) -> Experiment:
    processor = ProcessorConfig(image_size=14, max_prompt_tokens=4, max_question_tokens=4, max_target_tokens=64)
    stage = Stage("speak", 10, trainable, (("caption", 1.0),), batch_size=rows)
    return Experiment("speaker", system, DataConfig(processor=processor), (stage,), mesh=MeshConfig(1, -1, 1))


def exchanges(name: str, mesh: MeshConfig, what: Experiment, slices: int = 1):
    """(the exchanges of an update, trained, frozen parameters as shapes) on a slice."""
    pod = topologies.parse_topology(name, slices)
    grid = sharding.make_mesh(mesh, topologies.topology_devices(pod))
    layout = init_layout(what, planner.dummy_batch(what), grid)
    work = planner.train_step_target(what, 0, layout)
    compiled = work.function.lower(*work.arguments).compile()
    program = hlo_analysis.parse_hlo(compiled.as_text())
    state, frozen, _ = work.arguments
    found = hlo_analysis.collectives(program, pod.devices // slices if slices > 1 else 0)
    return found, trees.flatten(state.trainable), trees.flatten(frozen)


def size(leaf) -> int:
    return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-32", "v5e-16", "v5p-32", "v6e-16"])
def test_a_frozen_backbone_is_gathered_a_layer_at_a_time_and_has_no_gradients(name):
    found, trained, frozen = exchanges(name, MeshConfig(1, -1, 1), speaking())
    gathers = [one for one in found if one.opcode == "all-gather"]
    stacked = {path: size(leaf) for path, leaf in frozen.items() if "/blocks/" in path and leaf.ndim > 2}
    layer = max(stacked.values()) // LAYERS
    assert gathers and max(one.output_bytes for one in gathers) <= layer < min(stacked.values())
    # Forward and backward need each layer's weights once, what is computed again not more than once more.
    needed = sum(stacked.values())
    inside = sum(one.output_bytes * one.count for one in gathers if one.count >= LAYERS)
    assert needed <= inside <= 3.2 * needed
    reduced = sum(one.operand_bytes * one.count for one in found if one.opcode in ("all-reduce", "reduce-scatter"))
    assert 0 < reduced <= 1.5 * sum(map(size, trained.values())) + 2**14
    # Words of a table that is split by width, and the routers' ratios, change hands; no weight does.
    activation = 32 // 16 * 64 * WIDTH * 2
    assert all(one.operand_bytes <= activation for one in found if one.opcode == "all-to-all")


@compiles
@pytest.mark.slow
def test_without_fsdp_nothing_is_gathered_and_with_tensor_only_activations_are_summed():
    found, trained, _ = exchanges("v5e-16", MeshConfig(16, 1, 1), speaking())
    assert {one.opcode for one in found} == {"all-reduce"}
    assert sum(one.operand_bytes * one.count for one in found) <= 1.5 * sum(map(size, trained.values())) + 2**14

    found, _, frozen = exchanges("v5e-16", MeshConfig(4, 1, 4), speaking())
    kernels = [size(leaf) // LAYERS for path, leaf in frozen.items() if "/blocks/mlp/" in path]
    activation = 32 // 4 * 64 * WIDTH * 2
    sums = [
        one for one in found if one.opcode == "all-reduce" and one.group_size == 4 and one.operand_bytes >= activation
    ]
    assert sum(one.count for one in sums) >= 4 * LAYERS - 2  # two a layer, forward and back
    assert not any(one.opcode == "all-gather" and one.output_bytes in kernels for one in found)


@compiles
@pytest.mark.slow
def test_only_gradients_are_exchanged_between_slices():
    found, trained, _ = exchanges("v5e-4", MeshConfig(1, -1, 1, slices=2), speaking(), slices=2)
    far = sum(one.operand_bytes * one.count for one in found if one.cross_slice)
    assert far <= 1.5 * sum(map(size, trained.values())) + 2**14
    assert any(one.opcode == "all-gather" and not one.cross_slice for one in found)


@compiles
def test_slices_may_be_cut_where_the_chips_of_one_do_not_lie_as_the_mesh_does():
    pod = topologies.parse_topology("v5e-256", 2)
    grid = sharding.make_mesh(MeshConfig(1, 32, 8, slices=2), topologies.topology_devices(pod))
    assert tuple(grid.shape.values()) == (2, 1, 32, 8)
    assert all(len({device.slice_index for device in part.flat}) == 1 for part in grid.devices)


# What fits, and how a plan reads


@compiles
@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wide = dataclasses.replace(SPEAKER, width=4096, heads=32, kv_heads=32, head=128, mlp_dim=16384, vocab=2**18)
    what = speaking(8, Speaker(wide), ("language",))
    made = planner.plan(what, topologies.parse_topology("v5e-1"), 0)
    assert not made.fits and made.step_seconds == 0
    assert made.peak_gib is None or made.peak_gib > made.hbm_gib
    assert "DOES NOT FIT" in plan_command.format_plan(made)


@pytest.fixture
def without_libtpu(monkeypatch, tmp_path):
    """Plans for the eight devices of the CPU that stand in for a slice; nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(topologies, "topology_devices", lambda pod: jax.devices()[: pod.devices])
    monkeypatch.setattr(scaling_compiled.metadata, "version", lambda name: f"no {name}")
    return tmp_path


REFUSAL = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in space hbm. Used 69.55G of 15.75G"


@pytest.mark.slow
def test_a_program_that_the_compiler_refuses_for_memory_is_a_plan_that_does_not_fit(without_libtpu, monkeypatch):
    asked = []

    def full(lowered, compiler_options):
        asked.append(compiler_options)
        raise RuntimeError(REFUSAL)

    monkeypatch.setattr(jax.stages.Lowered, "compile", full)
    what, pod = speaking(), topologies.parse_topology("v5e-8")
    made = planner.plan(what, pod, 0)
    assert (made.fits, made.peak_gib, made.hbm_gib) == (False, 69.55, 16)
    assert made.seconds == {} and made.step_seconds == made.examples_per_second == made.mfu == 0
    assert made.mesh == (1, 1, 8, 1) and made.trained > 0 and made.flops > 0
    words = plan_command.format_plan(made)
    assert "DOES NOT FIT, 69.55 of 16 GiB per device" in words and "prediction" not in words
    assert plan_command.to_json(made)["fits"] is False and made.bottleneck == "nothing"
    # It is remembered: the compiler is not asked again for the same program, and is for another.
    assert planner.plan(what, pod, 0) == made and len(asked) == 1
    assert not planner.plan(what, pod, 0, quick=True).fits
    assert asked == [{}, {"exec_time_optimization_effort": -1.0}]


def test_another_error_of_the_compiler_is_no_plan_and_is_not_remembered(without_libtpu, monkeypatch):
    def broken(lowered, compiler_options):
        raise RuntimeError("INTERNAL: a fault of its own")

    monkeypatch.setattr(jax.stages.Lowered, "compile", broken)
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a fault of its own"):
            scaling_compiled.compile_and_analyze(lowered, "v5e-8")
    assert not list(without_libtpu.rglob("*.json"))


@compiles
@pytest.mark.slow
def test_a_plan_counts_what_is_trained_predicts_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    what, pod = speaking(), topologies.parse_topology("v5e-4")
    made = planner.plan(what, pod, 0)
    whole = trees.flatten(init_layout(what, planner.dummy_batch(what), sharding.make_mesh()).frozen)
    assert made.fits and made.frozen == sum(int(np.prod(leaf.shape)) for leaf in whole.values())
    assert made.trained == LAYERS * (2 * (2 * WIDTH * 8 + 8 + WIDTH + 1) + 2 * 2 * WIDTH)
    assert made.mesh == (1, 1, 4, 1) and 0 < made.peak_gib < 1
    # A frozen kernel: a product forward, one back, and one more because the layer is computed again.
    kernels = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN) + WIDTH * 512
    assert 2 * 2 * kernels * 32 * 64 < made.needed_flops < 1.2 * 2 * 2 * kernels * 32 * 64
    assert made.flops > 1.3 * made.needed_flops
    assert made.step_seconds == max(made.seconds.values()) and 0 < made.mfu < 1

    def never(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    assert planner.plan(what, pod, 0) == made
    words = plan_command.format_plan(made)
    assert "prediction" in words and "fits" in words and f"{made.trained:,} trained" in words
    assert json.loads(json.dumps(plan_command.to_json(made)))["dominates"] == made.bottleneck


@compiles
@pytest.mark.slow
def test_generation_can_be_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    what = small_lion.experiment()
    made = planner.plan(what, topologies.parse_topology("v5e-4"), 2, MeshConfig(2, 1, 2), generation=True)
    assert made.what == "generation" and made.fits and made.trained == 0
    assert made.rows == 32 and made.flops > 0


def test_time_with_overlap_adds_only_the_collectives_that_stand_alone():
    made = faked(lambda *_: 1.0)(speaking(), None, 0, MeshConfig(1, 16, 1), None, False)
    terms = {"products": 1.0, "memory": 0.5, "links": 1.2, "network": 0.0}
    assert dataclasses.replace(made, seconds=terms).overlap_step_seconds == 1.2  # all links hidden, and they bound it
    mixed = dataclasses.replace(made, seconds=terms, exposed_seconds=0.4)
    assert mixed.overlap_step_seconds == pytest.approx(1.4)  # 0.8 of the links are hidden behind products
    assert mixed.step_seconds == 1.2 and mixed.overlap_mfu == pytest.approx(mixed.mfu * 1.2 / 1.4)
    assert dataclasses.replace(made, seconds={}).overlap_step_seconds == 0


def faked(seconds):
    """A stand-in for `scaling.plan`, which compiles nothing: `seconds` of a mesh, a policy and rows; None: no room."""

    def plan(experiment, topology, number, mesh, remat, quick):
        rows = experiment.stages[number].batch_size
        took = seconds(mesh, remat, rows)
        return planner.Plan(
            config="a",
            what="b",
            topology="c",
            devices=16,
            mesh=mesh.shape(16),
            rows=rows,
            fits=took is not None,
            peak_gib=1.0,
            hbm_gib=16,
            trained=1,
            frozen=1,
            flops=1.0,
            needed_flops=1.0,
            seconds={} if took is None else {"products": took},
            collectives={},
            compile_seconds=1.0,
            peak_tflops=1.0,
            remat=remat or "as configured",
        )

    return plan


@pytest.mark.parametrize(
    ("fits", "peak", "said"),
    [
        (True, 12.5, ": fits, 12.50 of 16 GiB"),
        (True, None, ": fits, unknown of 16 GiB"),
        (False, 69.55, ": DOES NOT FIT, 69.55 of 16 GiB"),
        (False, None, ": DOES NOT FIT, unknown of 16 GiB"),
    ],
)
def test_the_verdict_of_a_plan_is_whether_it_fits_and_not_whether_its_peak_is_known(fits, peak, said):
    seconds = (lambda *_: 1.0) if fits else (lambda *_: None)
    made = faked(seconds)(speaking(), None, 0, MeshConfig(1, 16, 1), None, False)
    made = dataclasses.replace(made, peak_gib=peak)
    assert said in plan_command.format_plan(made)
    assert ("  fits " if fits else "  does not fit ") in plan_command.format_plan_line(made)


def test_mesh_search_continues_from_the_best_and_ranks_meshes_that_fit():
    def seconds(mesh, remat, rows):
        if remat == "none" or rows > 64:
            return None
        return rows**0.9 * (2 if remat == "full" else 1) * (1 + abs(mesh.tensor - 2))

    found = list(mesh_search.search_plans(speaking(32), topologies.parse_topology("v5e-16"), 0, plan_fn=faked(seconds)))
    found.sort(key=lambda one: (one.fits, one.examples_per_second), reverse=True)
    best = found[0]
    assert best.mesh == (1, 1, 8, 2) and best.rows == 64 and best.remat in ("dots", "as configured")
    assert not found[-1].fits and len(found) == len({(one.mesh, one.remat, one.rows) for one in found})
    words = plan_command.format_ranking(found).splitlines()
    assert "fsdp 8" in words[1] and "does not fit" in words[-1]


def test_mesh_search_ends_if_nothing_fits():
    make = faked(lambda *_: None)
    found = list(mesh_search.search_plans(speaking(32), topologies.parse_topology("v5e-16"), 0, plan_fn=make))
    assert found and not any(one.fits for one in found)


# The page


def test_every_full_size_config_is_planned_for_four_slices():
    names = {name for name in EXPERIMENTS if not name.startswith("tiny")}
    lines = (CONFIGS.parent / "docs" / "plans.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    planned = {(row[0], row[2]) for row in rows if len(row) == 18}
    pods = ("v5e-16", "v5e-256", "v5p-512", "2xv5e-256")
    lacking = {(name, pod) for name in names for pod in pods} - planned
    assert not lacking, f"python -m benchmarks.plans --missing makes them: {sorted(lacking)}"


# A compiler that breaks off


@pytest.fixture
def breaking(monkeypatch, tmp_path):
    """The command, with a compiler that ends its process for some meshes."""
    monkeypatch.setattr(topologies, "require_libtpu", lambda: None)
    monkeypatch.setattr(worker.PlanWorker.__init__, "__defaults__", (breaking_plans.work,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_compiler_crash_is_one_sentence_with_the_path_of_its_output(breaking, capsys):
    assert cli.main(["plan", str(CONFIGS / "tiny_lion.py"), "--topology", "v5e-16"]) == 2
    said = capsys.readouterr()
    assert "the compiler crashed (SIGSEGV)" in said.err and said.err.count("\n") == 1
    (words,) = breaking.glob("lionjax-plan-*.log")
    assert str(words) in said.err and "STACK OVERFLOW" in words.read_text() and not said.out


@pytest.mark.slow
def test_mesh_search_lists_a_mesh_whose_compilation_crashes_and_continues(breaking, capsys, caplog):
    words = ["plan", str(CONFIGS / "tiny_lion.py"), "--topology", "v5e-16", "--search"]
    assert cli.main([*words, "--stages.2.batch_size", "64"]) == 0
    said = capsys.readouterr()
    ranked = said.out.splitlines()
    (broken,) = (line for line in ranked if "crashed" in line)
    assert "--mesh.fsdp 8 --mesh.tensor 2" in broken and broken in said.err
    assert sum(" fits " in line for line in ranked) >= 4  # also those that came after it
    assert not any("tensor 4" in line for line in ranked)  # refused with a sentence, as ever
    assert "no such mesh" in caplog.text


@pytest.mark.slow
def test_other_errors_of_the_compile_process_are_raised_here(breaking, capsys):
    words = ["plan", str(CONFIGS / "tiny_lion.py"), "--topology", "v5e-16", "--mesh", "4,4,1"]
    assert cli.main(words) == 1
    assert "ValueError: of libtpu" in capsys.readouterr().err
    assert not list(breaking.glob("*.log"))


def test_a_killed_compiler_is_reported_as_out_of_memory():
    assert "ran out of memory" in worker.crash_message(-signal.SIGKILL, Path("a.log"))
    assert "(exit code 134), its output is in a.log" in worker.crash_message(134, Path("a.log"))


def test_the_compilers_threads_get_a_deeper_stack_unless_one_is_given(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=b")
    for _ in range(2):
        libtpu.enlarge_thread_stack()
        assert os.environ["LIBTPU_INIT_ARGS"] == f"--xla_a=b --{libtpu.THREAD_STACK_FLAG}=1048576"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{libtpu.THREAD_STACK_FLAG}=7")
    libtpu.enlarge_thread_stack()
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--{libtpu.THREAD_STACK_FLAG}=7"


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in space hbm. Used 69.55G of 15.75G",
        "RESOURCE_EXHAUSTED: this program needs 69.55G, exceeds available HBM (15.75G)",
    ],
)
def test_the_memory_of_a_refused_program_is_parsed_from_the_compilers_message(text):
    assert scaling_compiled.is_out_of_memory(Exception(text))
    assert scaling_compiled.requested_bytes(text) == 69.55 * 2**30
    assert scaling_compiled.requested_bytes("RESOURCE_EXHAUSTED") is None
