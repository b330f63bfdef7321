# SPDX-License-Identifier: Apache-2.0
"""CLIP's losses over a mesh, its texts from a batch, and the sizes that it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import leafwise
import numpy as np
import pytest

from lionjax.convert.formats import clip as clip_format
from lionjax.convert.formats import detect
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import Batch
from lionjax.models.language.clip_text import ClipTextConfig
from lionjax.models.vision.vit import CLIP_VIT_B32
from lionjax.models.vlm import clip
from lionjax.models.vlm.clip import Clip, batch_texts
from lionjax.models.vlm.visual_prefix import LLAVA_15_7B
from lionjax.nn import losses

VISION = dataclasses.replace(CLIP_VIT_B32, image_size=8, patch_size=4, width=12, depth=1, num_heads=3, mlp_dim=20)
TEXT = ClipTextConfig(8, 1, 2, 16, vocab_size=30, max_positions=9, bos_token_id=None, eos_token_id=1, pad_token_id=0)
TINY = Clip(VISION, TEXT, 6)


def random_batch(count: int, length: int = 7) -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 30, (count, length))
    mask = (np.arange(length) < rng.integers(3, length, count)[:, None]).astype(np.int32)
    ids[np.arange(count), mask.sum(1) - 1] = 1
    row = np.zeros(count, np.int32)
    return Batch(
        rng.standard_normal((count, 8, 8, 3)).astype(np.float32), ids, ids, ids, ids, ids, mask, mask, row, row
    )


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_the_loss_over_a_mesh_is_that_of_the_whole_batch_and_gathers_texts_once(objective):
    model, batch = dataclasses.replace(TINY, objective=objective), random_batch(24)
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    params = leafwise.init_leafwise(model.init, jax.random.key(0), batch)
    expected = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch), has_aux=True))(params)
    with sharding.use_mesh(mesh):
        sharded = sharding.shard_batch(batch, mesh)
        program = jax.jit(jax.value_and_grad(model.loss, has_aux=True)).lower(params, sharded).compile()
        found = program(params, sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected)
    # Of the embeddings (24, 6) only the texts' are brought together, and the images stay where they are.
    gathers = re.findall(r"= f32\[24,6\]\S* all-gather", program.as_text())
    assert len(gathers) == 1


def test_texts_of_a_batch_begin_and_end_as_the_tower_reads_them_also_when_cut():
    ids, mask = np.array([[7, 8, 1, 4], [7, 8, 9, 5]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = dataclasses.replace(random_batch(2), target_BM=ids, target_mask_BM=mask)
    assert batch_texts(TEXT, batch).tolist() == [[7, 8, 1, 0], [7, 8, 9, 1]]
    started = dataclasses.replace(TEXT, bos_token_id=2)
    assert batch_texts(started, batch).tolist() == [[2, 7, 8, 1, 0], [2, 7, 8, 9, 1]]
    padded = dataclasses.replace(TEXT, pooling="last", causal=False, max_positions=6)
    assert batch_texts(padded, batch).tolist() == [[7, 8, 1, 0, 0, 0], [7, 8, 9, 1, 0, 0]]
    with pytest.raises(ValueError, match="the texts have 4 tokens; they may have at most 3"):
        small = dataclasses.replace(TINY, text=dataclasses.replace(TEXT, max_positions=3))
        jax.eval_shape(small.init, jax.random.key(0), batch)


def test_kept_features_of_the_image_tower_give_the_same_loss():
    batch = random_batch(4)
    params = leafwise.init_leafwise(TINY.init, jax.random.key(0), batch)
    kept = dataclasses.replace(batch, features=TINY.extract_features(params, batch), image_BHWC=None)
    assert TINY.loss(params, kept)[0] == pytest.approx(float(TINY.loss(params, batch)[0]), rel=1e-6)


def test_label_smoothing_and_the_limit_of_the_logit_scale():
    logits_BB = jnp.asarray(np.random.default_rng(0).standard_normal((5, 5)))
    probs = jax.nn.log_softmax(logits_BB, axis=1), jax.nn.log_softmax(logits_BB, axis=0)
    smooth = [-(0.8 * jnp.diag(p) + 0.2 * p.mean(axis=axis)).mean() for axis, p in zip((1, 0), probs)]
    assert losses.image_text_contrast(logits_BB, logits_BB.T, 0.2) == pytest.approx(float(sum(smooth)) / 2, rel=1e-5)
    batch, limited = random_batch(4), dataclasses.replace(TINY, max_logit_scale=10.0, init_logit_scale=np.log(50.0))
    params = leafwise.init_leafwise(limited.init, jax.random.key(0), batch)
    same = params | {"logit_scale": jnp.log(10.0)}
    assert limited.loss(params, batch)[0] == pytest.approx(float(TINY.loss(same, batch)[0]), rel=1e-5)
    assert limited.loss(params, batch)[0] != pytest.approx(float(TINY.loss(params, batch)[0]), rel=1e-3)


def test_a_tower_without_class_token_loses_no_patch_in_a_llava():
    tower = dataclasses.replace(VISION, attention_pool=True)
    with pytest.raises(ValueError, match="keep_class_token is False, but a tower with attention_pool has none"):
        dataclasses.replace(LLAVA_15_7B, vision=tower, feature_layer=-1)


def test_an_image_tower_without_projection_has_the_width_of_the_embeddings():
    with pytest.raises(ValueError, match="embed_dim is 6, but an image tower with attention_pool has no projection"):
        Clip(dataclasses.replace(VISION, attention_pool=True), TEXT, 6)


@pytest.mark.parametrize(
    "model, count", [(clip.CLIP_B32, 151_277_313), (clip.CLIP_L14, 427_616_513), (clip.SIGLIP_B16, 203_155_970)]
)
def test_the_released_sizes_have_the_parameters_of_the_release(model, count):
    fmt = detect.format_of_config(model)
    weight_map, shapes = detect.weight_map_and_abstract_params(fmt, model)
    assert trees.count_params(shapes) == count
    assert {path for mapping in weight_map for path in mapping.flax_paths} == trees.flatten(shapes).keys()
    same = dataclasses.replace(fmt.config_from_hf(fmt.config_to_hf(model)), init_logit_scale=model.init_logit_scale)
    assert same == model


def test_the_defaults_of_transformers_are_the_base_models():
    transformers = pytest.importorskip("transformers")
    found = clip_format.CLIP_MODEL.config_from_hf(transformers.CLIPConfig().to_dict())
    scale, pad = found.init_logit_scale, found.text.pad_token_id
    text = dataclasses.replace(clip.CLIP_B32.text, pad_token_id=pad)
    assert found == dataclasses.replace(clip.CLIP_B32, init_logit_scale=scale, text=text)
    found = clip_format.SIGLIP.config_from_hf(transformers.SiglipConfig().to_dict())
    assert found == dataclasses.replace(clip.SIGLIP_B16, init_logit_scale=found.init_logit_scale)
