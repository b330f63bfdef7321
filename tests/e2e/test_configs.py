# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/, at full size, without allocating anything."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from paths import CONFIGS, EXPERIMENTS

from lionjax import convert
from lionjax.convert.formats import peft as loras
from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.types import Batch, PackedText
from lionjax.training import step

LARGE = 2**20


def example(experiment, rows: int = 2) -> Batch:
    """A batch of the config's own shapes; only its shapes and dtypes are read."""
    processor, side = experiment.data.processor, experiment.data.processor.image_size
    text = [np.zeros((rows, n), np.int32) for n in (processor.prompt_length, processor.max_question_tokens)]
    target, row = np.zeros((rows, processor.max_target_tokens), np.int32), np.zeros(rows, np.int32)
    image = np.zeros((rows, side, side, 3), np.float32)
    batch = Batch(image, text[0], text[0], text[1], text[1], target, target, target, row, row)
    if processor.region_width:
        regions = np.zeros((rows, 3, processor.region_width), np.float32)
        batch = dataclasses.replace(batch, region_BKD=regions, region_mask_BK=regions[..., 0] == 0)
    if processor.slots is not None:
        slots = processor.slots
        return dataclasses.replace(
            batch,
            state_BKS=np.zeros((rows, slots.max_states, slots.state_width), np.float32),
            object_mask_BKHW=np.zeros((rows, slots.max_objects, side, side), bool),
        )
    if processor.packing is not None:
        ids = np.zeros((rows, processor.packing.length), np.int32)
        return dataclasses.replace(batch, packed=PackedText(*(ids,) * 6))
    if processor.detects_phrases:
        boxes = np.zeros((rows, processor.max_boxes, 4), np.float32)
        tokens = np.zeros((rows, processor.max_boxes, processor.max_question_tokens), bool)
        return dataclasses.replace(batch, boxes_BK4=boxes, boxes_mask_BK=boxes[..., 0], box_tokens_BKL=tokens)
    if getattr(experiment.system, "sam", None) is None:
        return batch
    boxes, large = experiment.data.processor.boxes, (experiment.system.sam.image,) * 2
    return dataclasses.replace(
        batch,
        boxes_BK4=np.zeros((rows, boxes, 4), np.float32),
        boxes_mask_BK=np.zeros((rows, boxes), np.int32),
        masks_BKHW=np.zeros((rows, boxes, *large), bool),
        sam_image_BHWC=np.zeros((rows, *large, 3), np.float32),
    )


@functools.cache
def traced(name: str):
    """(experiment, its parameters' shapes with their logical axes), traced once for all tests."""
    experiment = config.load(CONFIGS / f"{name}.py")
    return experiment, jax.eval_shape(experiment.system.init, jax.random.key(0), example(experiment))


def config_parameter(name: str):
    """A config as a parameter; all but one are slow to trace."""
    return pytest.param(name, marks=() if name == "tiny_lion" else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(config_parameter, EXPERIMENTS))
def experiment_and_boxed(request):
    return traced(request.param)


@pytest.fixture(scope="module")
def experiment(experiment_and_boxed):
    return experiment_and_boxed[0]


@pytest.fixture(scope="module")
def whole(experiment_and_boxed):
    return sharding.unbox_specs(experiment_and_boxed[1])


def test_config_builds_and_every_stage_pattern_matches_a_parameter(experiment, whole):
    known = []  # stages of one system have one loss
    step.validate_stages(experiment.stages, whole)
    for stage in experiment.stages:
        trainable, frozen = trees.split(whole, stage.trainable)
        assert trees.count_params(trainable)
        assert trees.count_params(frozen) or not experiment.weights  # from scratch everything may train
        system = step.model_for_stage(experiment, stage)
        if system in known:
            continue
        known.append(system)
        loss, _ = jax.eval_shape(system.loss, whole, example(experiment), None)
        assert loss.shape == () and loss.dtype == np.float32


def test_the_weight_table_covers_every_leaf_and_makes_no_other(experiment, whole):
    rows = experiment.system.weight_map()
    rows = (*rows, *loras.lora_weight_map(rows, whole))
    tensors = convert.plan_state_dict(rows, trees.flatten(whole)).output_specs
    plan = convert.plan_params(rows, tensors, expected=whole)
    want = {path: leaf.shape for path, leaf in trees.flatten(whole).items()}
    assert {path: form.shape for path, form in plan.output_specs.items()} == want
    assert {path for piece in plan.mapped_tensors for path in piece.mapping.flax_paths} == want.keys()


def test_every_large_weight_is_split_over_the_mesh(experiment_and_boxed):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    specs = sharding.unbox_specs(experiment_and_boxed[1], mesh)
    whole = [
        path
        for path, leaf in trees.flatten(specs).items()
        if np.prod(leaf.shape) > LARGE and leaf.sharding.is_fully_replicated
    ]
    assert not whole


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wanted"), [("lion_flant5xl", 281_570_400), ("lion_flant5xxl", 320_439_392)])
def test_lion_trains_as_many_parameters_as_the_release(name, wanted):
    experiment, boxed = traced(name)
    trainable, _ = trees.split(sharding.unbox_specs(boxed), experiment.stages[-1].trainable)
    assert trees.count_params(trainable) == wanted


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_task_of_a_mixture_names_a_source_that_the_config_has(name):
    what = config.load(CONFIGS / f"{name}.py")
    sources = {source.name for source in what.data.sources}
    asked = {task.rpartition("/")[0] for stage in what.stages for task, _ in stage.mixture}
    assert asked - {""} <= sources
