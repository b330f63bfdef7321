# SPDX-License-Identifier: Apache-2.0
"""How the small frozen backbones are made, at sizes that take seconds."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from lionjax.data import processors, scenes
from lionjax.data.processors import Processor, ProcessorConfig
from lionjax.data.told import PLACES, box_code, patch_facts
from lionjax.language.t5 import T5Config
from lionjax.training import backbones
from lionjax.training.backbones import BackbonesConfig, Reader
from lionjax.vision.vit import ViT, ViTConfig

CONFIG = BackbonesConfig(
    vision=ViTConfig(image=56, patch=14, width=16, depth=2, heads=2, hidden=32),
    language=T5Config(vocab=1024, width=16, head=8, heads=2, hidden=24, encoder_layers=1, decoder_layers=1),
    scenes=24,
    vision_batch=8,
    align_steps=60,
    align_rate=5e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def reader():
    """The T5 under training, its parameters, and what it is told of a scene."""
    processor = Processor(ProcessorConfig(56))
    digits = backbones.digit_ids(processor)
    model = Reader(CONFIG.language, backbones.word_ids(processor), tuple(map(int, digits.flat)))
    fields, box = patch_facts(scenes.sample("train", 0), 4, 56)
    told = fields[None], box_code(box)[None]
    text = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *told, *text, *text)["params"])
    return model, params, told, digits


def test_a_thing_is_told_once_and_every_decimal_has_a_word_of_its_own(reader):
    model, params, (fields, code), digits = reader
    assert digits.shape == (PLACES, 10) and len(np.unique(digits)) == digits.size
    tell = jax.jit(lambda code: model.apply({"params": params}, fields, code, method=model.tell))
    moved = np.abs(np.asarray(tell(code) - tell(code[:, ::-1]))).max(-1)
    assert (moved[fields[..., 4] == 2] > 0).any() and (moved[fields[..., 4] != 2] == 0).all()


def test_third_decimals_hardly_count_and_first_ones_count_most(reader):
    *_, digits = reader
    target = np.array(Processor(ProcessorConfig(56)).target("[0.123,0.456,0.789,0.321]"))[None]
    weight = np.asarray(backbones.decimal_weight(target, digits))[0]
    np.testing.assert_allclose(weight, [*([1, 2, 1, 0.15] * 4), 1, 1], rtol=1e-6)


def test_alignment_brings_a_vits_features_near_the_words_of_each_patch(reader):
    _, params, *_ = reader
    image = np.zeros((1, 56, 56, 3), np.float32)
    vision = nn.unbox(ViT(CONFIG.vision).init(jax.random.key(0), image)["params"])
    stats = processors.CLIP_MEAN, processors.CLIP_STD
    hardly = dataclasses.replace(CONFIG, align_steps=2)
    far, near = (backbones.align_vision(c, *stats, vision, params)[1] for c in (hardly, CONFIG))
    for name, error in near.items():  # 2 where nothing is known, 0 where all is
        assert error < 0.95 * far[name], (near, far)
