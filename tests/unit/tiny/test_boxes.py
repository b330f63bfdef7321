# SPDX-License-Identifier: Apache-2.0
"""How the word for a place, and the way from and to boxes, are learned around a frozen T5; and what ships of it."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file
from small_backbones import CONFIG

from lionjax.core import params as trees
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import world
from lionjax.models.heads.region import BoxEncoderDecoder, RegionHeadConfig
from lionjax.tiny import boxes
from lionjax.tiny.boxes import BoxHeadsSchedule
from lionjax.tiny.exercises import encode_box, patch_labels
from lionjax.tiny.language import make_scene_model
from lionjax.training.init import resolve_weights_file

PLACES = RegionHeadConfig(trigger_token_id=19, box_token_id=20, box_mlp_dim=16)


@pytest.mark.slow
def test_box_head_training_leaves_the_t5_unchanged():
    model = make_scene_model(CONFIG.language, Processor(ProcessorConfig(56)))
    fields, box = patch_labels(world.sample_scene("train", 0), 4, 56)
    text = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    told = fields[None], encode_box(box)[None], 0.0
    reader = nn.unbox(jax.jit(model.init)(jax.random.key(0), *told, *text, *text)["params"])
    before = jax.tree.map(np.copy, reader)
    schedule = BoxHeadsSchedule(steps=40, batch_size=4, num_scenes=8, learning_rate=1e-2)
    params, word, figures = boxes.train_box_heads(CONFIG, schedule, PLACES, reader)
    assert figures["loss"] > 0 and off(BoxEncoderDecoder(16, 16), params) < 0.4  # 0.55 where they say 0
    table = reader["language"]["embedding"]["table"]
    assert np.abs(np.asarray(table) - word).max(axis=1).min() > 0.01, "the word is none of the old"
    jax.tree.map(np.testing.assert_array_equal, before, reader)


def off(heads: BoxEncoderDecoder, params) -> float:
    """How far a box is from itself on its way through the embedding and back."""
    low = np.random.default_rng(0).uniform(0.2, 0.6, (50, 2))
    box_K4 = np.concatenate([low, low + 0.3], axis=1).astype(np.float32)
    made = heads.apply({"params": params}, box_K4, method="encode")
    again = heads.apply({"params": params}, made, method="decode")
    return float(np.abs(np.asarray(again) - box_K4).mean())


def test_the_shipped_locations_read_a_box_from_its_own_embedding():
    params = trees.unflatten(load_file(resolve_weights_file("shipped:tiny_places.safetensors")))["locations"]
    assert off(BoxEncoderDecoder(128, 256), params) < 0.05
