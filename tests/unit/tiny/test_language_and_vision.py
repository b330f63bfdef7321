# SPDX-License-Identifier: Apache-2.0
"""How the small frozen backbones are made, at sizes that take seconds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from paths import CONFIGS
from safetensors.numpy import load_file
from small_backbones import CONFIG

from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.data import processor as processors
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import world
from lionjax.inference.loading import dummy_batch
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViT
from lionjax.tiny.exercises import NUM_DIGIT_POSITIONS, encode_box, patch_labels
from lionjax.tiny.language import (
    copy_attention_init,
    digit_loss_weight,
    digit_token_ids,
    make_language_batch,
    make_scene_model,
    run_language_schedule,
)
from lionjax.tiny.schedules import LanguageSchedule
from lionjax.tiny.vision import align_vision
from lionjax.training.init import init_params, resolve_weights_file
from lionjax.training.init import make_param_specs as init_layout


@pytest.fixture(scope="module")
def reader():
    """The T5 under training, its parameters, and what it is told of a scene."""
    processor = Processor(ProcessorConfig(56))
    model = make_scene_model(CONFIG.language, processor)
    fields, box = patch_labels(world.sample_scene("train", 0), 4, 56)
    told = fields[None], encode_box(box)[None]
    text = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *told, 0.0, *text, *text)["params"])
    return model, params, told, digit_token_ids(processor)


@pytest.mark.slow
def test_each_object_is_described_once_and_each_decimal_has_its_own_token(reader):
    model, params, (fields, code), digits = reader
    assert digits.shape == (NUM_DIGIT_POSITIONS, 10) and len(np.unique(digits)) == digits.size
    tell = jax.jit(lambda code: model.apply({"params": params}, fields, code, method=model.embed_objects))
    moved = np.abs(np.asarray(tell(code) - tell(code[:, ::-1]))).max(-1)
    assert (moved[fields[..., 4] == 2] > 0).any() and (moved[fields[..., 4] != 2] == 0).all()


def test_third_decimals_hardly_count_and_first_ones_count_most(reader):
    *_, digits = reader
    target = np.array(Processor(ProcessorConfig(56)).prompt.encode_target("[0.123,0.456,0.789,0.321]"))[None]
    weight = np.asarray(digit_loss_weight(target, digits))[0]
    np.testing.assert_allclose(weight, [*([1, 2, 1, 0.15] * 4), 1, 1], rtol=1e-6)


@pytest.mark.slow
def test_alignment_moves_vit_features_toward_the_word_embeddings_of_each_patch(reader):
    _, params, *_ = reader
    image = np.zeros((1, 56, 56, 3), np.float32)
    vision = nn.unbox(ViT(CONFIG.vision).init(jax.random.key(0), image)["params"])
    stats = processors.CLIP_MEAN, processors.CLIP_STD
    hardly = dataclasses.replace(CONFIG, align_steps=2)
    far, near = (align_vision(c, *stats, vision, params)[1] for c in (hardly, CONFIG))
    for name, error in near.items():  # 2 where nothing is known, 0 where all is
        assert error < 0.95 * far[name], (near, far)


@pytest.mark.slow
def test_embeddings_that_a_vit_is_aligned_with_can_be_frozen_in_further_t5_training(reader):
    model, params, *_ = reader
    processor, rng = Processor(ProcessorConfig(56)), np.random.default_rng(0)
    made = [world.sample_scene("train", index) for index in range(4)]
    told = [patch_labels(scene, 4, 56) for scene in made]
    batch = functools.partial(make_language_batch, CONFIG, made, told, rng, processor)
    schedule = LanguageSchedule(3, 1e-2, tag_fraction=0.0, text_fraction=0.0, freeze_embeddings=True)
    one_length = lambda how, group, rows: batch(how, "short", rows)  # noqa: E731 compiled once
    learned = run_language_schedule(
        CONFIG, schedule, model, jax.tree.map(np.copy, params), one_length, rng, eval_fn=None
    )
    told_before, told_after = (
        np.asarray(model.apply({"params": p}, *reader[2], method=model.embed_objects)) for p in (params, learned)
    )
    np.testing.assert_array_equal(told_after, told_before)
    before, after = params["language"], learned["language"]
    assert (np.asarray(after["head"]["kernel"]) != np.asarray(before["head"]["kernel"])).any()


@pytest.mark.slow
def test_a_decoder_gets_the_inputs_of_the_t5_and_keeps_its_embeddings(reader):
    told_of, params, (fields, code), _ = reader
    sizes = DecoderConfig(1024, 16, 1, 2, 2, 8, 24, tie_embeddings=True, eos_token_id=1)
    c = dataclasses.replace(CONFIG, language=sizes)
    processor = Processor(ProcessorConfig(56, reader="decoder"))
    model, rng = make_scene_model(sizes, processor), np.random.default_rng(0)
    made = [world.sample_scene("train", index) for index in range(4)]
    told = [patch_labels(scene, 4, 56) for scene in made]
    batch = functools.partial(make_language_batch, c, made, told, rng, processor)
    fresh = nn.unbox(jax.jit(model.init)(jax.random.key(0), *batch("things", "short", 2))["params"])
    language = copy_attention_init(fresh["language"], sizes) | {"embedding": params["language"]["embedding"]}
    begun = {"language": language, "code": params["code"], "roles": params["roles"]}
    mine = model.apply({"params": begun}, fields, code, method=model.embed_objects)
    np.testing.assert_array_equal(mine, told_of.apply({"params": params}, fields, code, method=told_of.embed_objects))

    fixed = batch("things", "short", 8)
    *_, target, mask = fixed

    @jax.jit
    def wrong(params):
        logits = model.apply({"params": params}, *fixed)
        return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(target, 1024)).sum(-1)[mask].mean()

    before, words = float(wrong(begun)), np.array(language["embedding"]["table"])
    schedule = LanguageSchedule(60, 2e-2, tag_fraction=0.0, text_fraction=0.0, freeze_embeddings=True)
    learned = run_language_schedule(c, schedule, model, begun, lambda *_: fixed, rng, eval_fn=None)
    np.testing.assert_array_equal(learned["language"]["embedding"]["table"], words)
    assert float(wrong(learned)) < 0.5 * before
    # What stands behind a word cannot be known at it.
    other = (*fixed[:-2], np.where(np.arange(target.shape[1]) == target.shape[1] - 1, 7, target), mask)
    one, two = (np.asarray(model.apply({"params": learned}, *rows)) for rows in (fixed, other))
    np.testing.assert_array_equal(one[:, :-1], two[:, :-1])


@pytest.mark.slow
def test_the_shipped_decoder_is_small_and_stands_between_a_flamingos_looks_with_the_t5s_words():
    assert (resolve_weights_file("shipped:tiny_decoder.safetensors")).stat().st_size < 1_000_000
    what = config.load(CONFIGS / "tiny_flamingo.py")
    batch = dummy_batch(Processor(what.data.processor))
    layout = init_layout(what, batch, sharding.make_mesh(devices=jax.devices()[:1]))
    never = trees.flatten(init_params(what, batch, layout)[0])
    held = load_file(resolve_weights_file("shipped:tiny_decoder.safetensors"))
    words = load_file(resolve_weights_file("shipped:tiny_t5.safetensors"))["language/embedding/table"]
    for path, leaf in never.items():
        if path.startswith("language/"):
            name = path.replace("groups/block/", "blocks/")
            wanted = words if "embedding" in path else held.pop(name)
            np.testing.assert_array_equal(leaf, wanted.astype(np.float32), path)
    assert not held
