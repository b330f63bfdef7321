# SPDX-License-Identifier: Apache-2.0
"""What a LION must hold to, whatever its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import leafwise
import numpy as np
import pytest

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import IMAGE_LEVEL, REGION_LEVEL, Batch
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lion import Lion, LionModule
from lionjax.nn.adapters import AdapterConfig

HINT = 3
LION = Lion(
    ViTConfig(28, 7, 16, 4, 2, 24),
    QFormerConfig(16, 3, 2, 24, 3, 2, 16, 40, 16, dropout=0.0),
    AggregatorConfig(3, (2, 0), 16, 2, 24, dropout=0.0, projector_mlp_dim=20),
    T5Config(40, 16, 8, 2, 24, 2, 2, 8, 16, activation="gelu", dropout=0.0, adapters=AdapterConfig(4)),
    soft_prompt_token_id=HINT,
)


def batch_of(rows: int = 4, task=IMAGE_LEVEL) -> Batch:
    rng = np.random.default_rng(0)

    def text(length):
        ids = rng.integers(4, 40, (rows, length)).astype(np.int32)
        mask = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
        return np.where(mask, ids, 0), mask

    prompt, question, target = text(8), text(6), text(5)
    image = rng.normal(size=(rows, 28, 28, 3)).astype(np.float32)
    order = np.arange(rows, dtype=np.int32)
    return Batch(image, *prompt, *question, *target, target[1], np.full(rows, task, np.int32), order)


@pytest.fixture(scope="module")
def params():
    """Random weights, every leaf moved so that nothing starts as a no-op."""
    params = leafwise.init_leafwise(LION.init, jax.random.key(0), batch_of())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0, 0.1, x.shape), x.dtype), jax.device_get(params))


logits_of = jax.jit(LION.logits)
loss_and_grads = jax.jit(jax.value_and_grad(lambda params, batch: LION.loss(params, batch)[0]))


@pytest.mark.slow
def test_a_batch_may_mix_tasks_and_each_row_is_routed_by_its_task(params):
    mixed = np.array([REGION_LEVEL, IMAGE_LEVEL, REGION_LEVEL, IMAGE_LEVEL], np.int32)
    apart = [np.asarray(logits_of(params, batch_of(task=task))) for task in (REGION_LEVEL, IMAGE_LEVEL)]
    together = np.asarray(logits_of(params, dataclasses.replace(batch_of(), task_B=mixed)))
    np.testing.assert_allclose(together, np.where(mixed[:, None, None] == IMAGE_LEVEL, apart[1], apart[0]), atol=1e-5)
    assert np.abs(apart[0] - apart[1]).max() > 1e-2


@pytest.mark.slow
def test_in_a_new_router_each_task_uses_one_adapter(params):
    fresh = leafwise.init_leafwise(LION.init, jax.random.key(0), batch_of())
    flat = trees.flatten(params)
    start = {path: trees.flatten(fresh)[path] if path.endswith("/ratio") else leaf for path, leaf in flat.items()}
    without = {path: leaf * (0 if "/adapter_0/up" in path else 1) for path, leaf in start.items()}
    both, one = (trees.unflatten(tree) for tree in (start, without))
    image, region = batch_of(task=IMAGE_LEVEL), batch_of(task=REGION_LEVEL)
    np.testing.assert_array_equal(logits_of(both, image), logits_of(one, image))
    assert np.abs(np.asarray(logits_of(both, region) - logits_of(one, region))).max() > 1e-3


@pytest.mark.slow
def test_decoding_with_a_cache_equals_reading_the_whole_answer(params):
    batch = batch_of()
    batch = dataclasses.replace(batch, target_mask_BM=np.ones_like(batch.target_mask_BM))
    whole = np.asarray(logits_of(params, batch))
    logits, cache = jax.jit(LION.prefill, static_argnums=2)(params, batch, 5)
    extend = jax.jit(LION.extend)
    for step in range(5):
        np.testing.assert_allclose(logits, whole[:, step], atol=1e-4)
        logits, cache = extend(params, batch.target_BM[:, step], cache)


@pytest.mark.slow
def test_padding_after_a_prompt_changes_nothing(params):
    batch = batch_of()
    noise = np.random.default_rng(1).integers(4, 40, batch.prompt_BL.shape)
    other = dataclasses.replace(
        batch,
        prompt_BL=np.where(batch.prompt_mask_BL, batch.prompt_BL, noise).astype(np.int32),
        question_BL=np.where(batch.question_mask_BL, batch.question_BL, noise[:, :6]).astype(np.int32),
    )
    np.testing.assert_allclose(logits_of(params, batch), logits_of(params, other), atol=1e-6)


@pytest.mark.slow
def test_the_soft_prompt_replaces_its_token_only(params):
    with_hint = dataclasses.replace(batch_of(), prompt_BL=batch_of().prompt_BL.copy())
    with_hint.prompt_BL[2, 0] = HINT
    changed = trees.merge(
        {"soft_prompt": params["soft_prompt"] + 1.0}, {k: v for k, v in params.items() if k != "soft_prompt"}
    )
    moved = np.abs(np.asarray(logits_of(params, with_hint) - logits_of(changed, with_hint))).max((1, 2))
    assert moved[2] > 1e-3 and np.all(moved[[0, 1, 3]] == 0)


@pytest.mark.slow
def test_features_kept_from_the_frozen_vit_give_the_same_loss(params):
    batch = batch_of()
    features = jax.jit(LION.extract_features)(params, batch)
    kept = dataclasses.replace(batch, image_BHWC=None, features=features)
    loss_of = jax.jit(LION.loss)
    np.testing.assert_allclose(loss_of(params, kept)[0], loss_of(params, batch)[0], rtol=1e-6)


@pytest.mark.slow
def test_what_answering_keeps_of_an_image_gives_the_same_first_token(params):
    batch = batch_of()
    features = jax.jit(LION.answer_features)(params, batch)
    assert features["taps"].shape[1] == 1 and features["aggregated"].shape == (4, 17, LION.language.width)
    first_token = jax.jit(lambda params, batch: LION.prefill(params, batch, 0)[0])
    whole, other = first_token(params, batch), dataclasses.replace(batch, image_BHWC=batch.image_BHWC[::-1])
    kept = dataclasses.replace(batch, image_BHWC=None, features=features)
    np.testing.assert_allclose(first_token(params, kept), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(first_token(params, other) - whole).max() > 1e-3, "the image is read"


@pytest.mark.slow
def test_remat_changes_no_gradient(params):
    thrifty = dataclasses.replace(
        LION,
        vision=dataclasses.replace(LION.vision, remat="full"),
        language=dataclasses.replace(LION.language, remat="dots"),
    )
    loss, grads = loss_and_grads(params, batch_of())
    loss2, grads2 = jax.jit(jax.value_and_grad(lambda p, b: thrifty.loss(p, b)[0]))(params, batch_of())
    np.testing.assert_allclose(loss, loss2, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, grads2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_loss_and_gradients_are_the_same_on_every_mesh(params, shape):
    batch = batch_of(8)
    loss, grads = loss_and_grads(params, batch)
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    like = sharding.abstract_params(LION.init, jax.random.key(0), batch, mesh=mesh)
    with sharding.use_mesh(mesh):
        step = jax.jit(jax.value_and_grad(lambda params, batch: LION.loss(params, batch)[0]))
        loss2, grads2 = step(sharding.reshard_like(params, like), sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, grads2)


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_mesh():
    batch = batch_of()
    alone = sharding.init_sharded(LION.init, jax.random.key(7), batch)
    spread = sharding.init_sharded(
        LION.init, jax.random.key(7), batch, mesh=sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((alone, spread)))


@pytest.mark.slow
def test_with_identity_init_scale_image_tokens_start_as_scaled_vit_features():
    aggregator = dataclasses.replace(LION.aggregator, projector_mlp_dim=32)
    lion = dataclasses.replace(LION, aggregator=aggregator, identity_init_scale=2.5, visual_input="AGGREGATOR")
    batch = batch_of()
    params = leafwise.init_leafwise(lion.init, jax.random.key(0), batch)
    said_BPD = np.asarray(jax.jit(lion.extract_features)(params, batch))[:, -1]
    words_BPD = jax.jit(lambda p, b: LionModule(lion).apply({"params": p}, b, None, method=LionModule.embed_image))(
        params, batch
    )
    normed = (said_BPD - said_BPD.mean(-1, keepdims=True)) / said_BPD.std(-1, keepdims=True)
    np.testing.assert_allclose(words_BPD, 2.5 * normed, atol=2e-3)
    with pytest.raises(ValueError, match="identity_init_scale needs vision.width .* equal to language.width"):
        dataclasses.replace(LION, identity_init_scale=2.5)


def test_an_unknown_visual_input_raises_a_one_sentence_error():
    with pytest.raises(ValueError, match="QFROMER.*can be one of ALL"):
        dataclasses.replace(LION, visual_input="QFROMER")
