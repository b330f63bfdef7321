# SPDX-License-Identifier: Apache-2.0
"""What each variant of Lyrics' second stage trains, several images in a row, and regions that are missing."""

import dataclasses
import runpy

import flax.linen as nn
import jax
import numpy as np
import pytest
from paths import CONFIGS

from lionjax.core import params as trees
from lionjax.core.types import Batch, UserError
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import LYRICS_CODE, LYRICS_PAPER, VisualPrefixLMModule
from lionjax.training.step import model_for_stage

TOWER = ViTConfig(14, 7, 12, 1, 2, 20)
BRIDGE = MQFormerConfig(
    12, 2, 2, 20, 5, vision_width=12, vocab_size=30, max_positions=8, num_grounding_queries=3, region_width=8
)
SMALL = dataclasses.replace(
    LYRICS_CODE, vision=TOWER, qformer=BRIDGE, language=DecoderConfig(20, 16, 1, 2, 2, 8, 20), image_token_id=19
)


def rows(*shape) -> Batch:
    """Images (*shape, 14, 14, 3) with four regions each, the last of which is not real."""
    rng, ids = np.random.default_rng(0), np.ones((shape[0], 3), np.int32)
    image = rng.standard_normal((*shape, 14, 14, 3)).astype(np.float32)
    regions = rng.standard_normal((*shape, 4, 8)).astype(np.float32)
    real = np.broadcast_to(np.arange(4) < 3, (*shape, 4))
    row = np.zeros(shape[0], np.int32)
    return Batch(image, *(ids,) * 7, row, row, region_BKD=regions, region_mask_BK=real)


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(SMALL.init, jax.random.key(0), rows(1)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 3, shapes)


def embed(params, batch):
    return VisualPrefixLMModule(SMALL).apply({"params": params}, batch, None, method="embed_image")


@pytest.mark.slow
def test_each_of_several_images_is_read_with_its_own_regions(params):
    batch = rows(2, 2)
    together = embed(params, batch)
    assert together.shape == (2, 2, 5, 16)
    for number in range(2):
        fields = ("image_BHWC", "region_BKD", "region_mask_BK")
        alone = dataclasses.replace(batch, **{name: getattr(batch, name)[:, number] for name in fields})
        np.testing.assert_allclose(embed(params, alone)[:, 0], together[:, number], atol=1e-5)
    swapped = dataclasses.replace(batch, region_BKD=batch.region_BKD[:, ::-1])
    assert np.abs(np.asarray(embed(params, swapped) - together)).max() > 1e-2


def test_an_image_without_regions_is_refused(params):
    with pytest.raises(UserError, match="no region features.*refine the images first"):
        embed(params, dataclasses.replace(rows(2), region_BKD=None))


def test_presets_read_what_their_sources_name():
    assert LYRICS_CODE.info.region_width == LYRICS_PAPER.info.region_width == 260
    assert LYRICS_CODE.info.reads_question and LYRICS_CODE.info.prompt_format == "lyrics"
    assert (LYRICS_CODE.vision.width, LYRICS_PAPER.vision.width) == (1408, 1024)
    assert LYRICS_PAPER.qformer.use_sam and not LYRICS_CODE.qformer.use_sam
    assert LYRICS_CODE.language.vocab_size == 32001


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, parts",
    [
        ("full", {"qformer", "projector"}),
        ("freeze_qformer", {"projector"}),
        ("lora", {f"language/blocks/attention/{x}/lora_{part}" for x in "qkv" for part in "ab"}),
    ],
)
def test_each_variant_of_the_second_stage_trains_what_the_released_code_does(variant, parts):
    experiment = runpy.run_path(str(CONFIGS / "lyrics_13b.py"))["get_config"](variant)
    warm_up, instruct = experiment.stages
    shapes = nn.unbox(jax.eval_shape(experiment.model.init, jax.random.key(0), large(1)))
    trained = trees.flatten(trees.split(shapes, instruct.trainable)[0])
    assert (set(trained) if variant == "lora" else {path.split("/")[0] for path in trained}) == parts
    first = {path.split("/")[0] for path in trees.flatten(trees.split(shapes, warm_up.trainable)[0])}
    assert first == {"qformer", "projector"}
    reads = [model_for_stage(experiment, stage).read_instruction for stage in experiment.stages]
    assert reads == [False, True]


def large(count: int) -> Batch:
    ids, row = np.ones((count, 3), np.int32), np.zeros(count, np.int32)
    return Batch(np.zeros((count, 224, 224, 3), np.float32), *(ids,) * 7, row, row)
