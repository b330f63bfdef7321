# SPDX-License-Identifier: Apache-2.0
"""Attention by kernels beside the plain formula: values and gradients, who is chosen, what a build may lack."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.nn import flash_attention
from lionjax.nn.attention import (
    AttentionMask,
    causal_mask,
    dot_product_attention,
    key_padding_mask,
    segmented_attention,
    segmented_causal_mask,
)
from lionjax.planner import hlo_analysis, topologies

SCALE = 0.3


def drawn(rows=2, queries=160, keys=160, heads=4, kv_heads=4, head=16, dtype=jnp.float32):
    random = np.random.default_rng(0)

    def of(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    real_BS = np.arange(keys) < np.linspace(keys // 2, keys, rows).astype(int)[:, None]
    real_BS[:, keys // 4 : keys // 3] = False  # also in the middle, as between a prompt and an answer
    return (
        of(rows, queries, heads, head),
        of(rows, keys, kv_heads, head),
        of(rows, keys, kv_heads, head),
        jnp.asarray(real_BS),
    )


def written_out(query_BLNH, key_BSNH, value_BSNH, mask=None, bias=None, scale=SCALE):
    """The formula in numpy's words, a head at a time."""
    groups, heads = query_BLNH.shape[2] // key_BSNH.shape[2], []
    for n in range(query_BLNH.shape[2]):
        score_BLS = scale * query_BLNH[:, :, n] @ key_BSNH[:, :, n // groups].swapaxes(1, 2)
        shape = (len(query_BLNH), query_BLNH.shape[2], *score_BLS.shape[1:])
        if bias is not None:
            score_BLS = score_BLS + jnp.broadcast_to(bias, shape)[:, n]
        if mask is not None:
            score_BLS = jnp.where(jnp.broadcast_to(mask, shape)[:, n], score_BLS, -jnp.inf)
        share_BLS = jnp.exp(score_BLS - score_BLS.max(axis=-1, keepdims=True))
        share_BLS = share_BLS / share_BLS.sum(axis=-1, keepdims=True)
        heads.append(share_BLS @ value_BSNH[:, :, n // groups])
    return jnp.stack(heads, axis=2)


def values_and_gradients(function, query, key, value):
    weight = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

    def total(*given):
        return (function(*given) * weight).sum()

    return jax.jit(lambda *x: (function(*x), *jax.grad(total, (0, 1, 2))(*x)))(query, key, value)


def assert_same(function, other, given, tolerance=2e-5):
    for one, another in zip(values_and_gradients(function, *given), values_and_gradients(other, *given)):
        np.testing.assert_allclose(one, another, tolerance, tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["all", "keys", "causal", "causal keys", "bias", "free"])
def test_plain_attention_equals_the_formula_for_every_mask_and_for_grouped_queries(kind, kv_heads):
    *given, real_BS = drawn(queries=12, keys=12, kv_heads=kv_heads)
    before = np.tril(np.ones((12, 12), bool))[None, None]
    keys = np.asarray(real_BS)[:, None, None, :]
    free = jnp.asarray(np.random.default_rng(1).random((2, 1, 12, 12)) < 0.7)
    bias = jnp.cos(jnp.arange(4 * 12 * 12.0)).reshape(1, 4, 12, 12)
    ours, theirs, added = {
        "all": (None, None, None),
        "keys": (key_padding_mask(real_BS), keys, None),
        "causal": (causal_mask(), before, None),
        "causal keys": (causal_mask(real_BS), before & keys, None),
        "bias": (key_padding_mask(real_BS), keys, bias),
        "free": (free, free, None),
    }[kind]
    assert_same(
        lambda *x: dot_product_attention(*x, ours, added, SCALE), lambda *x: written_out(*x, theirs, added), given
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv_heads", "queries", "keys"),
    [("causal keys", 4, 160, 160), ("causal keys", 2, 128, 128), ("keys", 2, 130, 200), ("all", 4, 100, 130)],
)
def test_splash_attention_equals_the_formula_at_lengths_that_blocks_do_not_divide(kind, kv_heads, queries, keys):
    *given, real_BS = drawn(queries=queries, keys=keys, kv_heads=kv_heads)
    mask = AttentionMask(real_BS if "keys" in kind else None, causal="causal" in kind)
    assert_same(
        lambda *x: flash_attention.splash_attention(*x, mask.key_valid_BS, mask.causal, SCALE, interpret=True),
        lambda *x: written_out(*x, mask.to_dense(queries)),
        given,
        2e-4,
    )


@pytest.mark.parametrize("kernel", ["formula", pytest.param("splash", marks=pytest.mark.slow)])
def test_segments_attend_to_themselves_alone(kernel):
    *given, _ = drawn(queries=140, keys=140, kv_heads=2)
    segment_BL = jnp.asarray(np.sort(np.random.default_rng(2).integers(1, 4, (2, 140)), axis=1))
    segment_BL = segment_BL.at[:, 130:].set(0)  # padding
    is_same = np.asarray(segment_BL)[:, :, None] == np.asarray(segment_BL)[:, None]
    mask = np.tril(np.ones((140, 140), bool))[None, None] & is_same[:, None]

    def ours(*x):
        if kernel == "formula":
            return dot_product_attention(*x, segmented_causal_mask(segment_BL), None, SCALE)
        return flash_attention.splash_attention(*x, segment_BL, True, SCALE, interpret=True, segmented=True)

    assert_same(ours, lambda *x: written_out(*x, mask), given, 2e-4)


@pytest.mark.slow
def test_attention_over_key_pieces_with_an_empty_one_equals_the_formula():
    *given, real_BS = drawn(queries=3, keys=12, kv_heads=2)
    query, key, value = given
    cuts = [slice(0, 7), slice(7, 7), slice(7, 12)]
    parts = [(key[:, cut].swapaxes(1, 2), value[:, cut].swapaxes(1, 2)) for cut in cuts]
    made = segmented_attention(query, parts, key_padding_mask(real_BS), None, SCALE)
    np.testing.assert_allclose(made, written_out(*given, real_BS[:, None, None, :]), 1e-5, 1e-5)


def test_each_device_computes_its_own_rows_and_heads():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    *given, real_BS = drawn(rows=4, queries=12, keys=12, kv_heads=2)

    def function(q, k, v, keys_BS):
        assert q.shape == (1, 12, 2, 16)
        assert k.shape == (1, 12, 1, 16)
        return flash_attention.reference_attention(q, k, v, keys_BS[:, None, None, :], None, SCALE)

    assert_same(
        lambda *x: flash_attention.shard_attention(function, mesh, *x, real_BS),
        lambda *x: written_out(*x, real_BS[:, None, None, :]),
        given,
    )


def test_attention_kernel_follows_device_dtype_and_length():
    def choice(platform, length, dtype, causal=True, keys=None):
        query, key, *_ = drawn(1, length, keys or length, dtype=dtype)
        return flash_attention.select_backend(platform, query, key, causal)

    assert choice("cpu", 1024, jnp.bfloat16) == "xla"
    assert choice("gpu", 1024, jnp.bfloat16) == choice("gpu", 256, jnp.float16) == "cudnn"
    assert choice("tpu", 1024, jnp.bfloat16) == "splash"
    assert choice("tpu", 1024, jnp.float16) == choice("gpu", 1024, jnp.float32) == "xla"
    assert choice("gpu", 1, jnp.bfloat16, False, 1024) == "xla", "a word that is generated"
    assert choice("tpu", 600, jnp.bfloat16, True, 1200) == "xla", "who is ahead is not known"
    assert choice("tpu", 600, jnp.bfloat16, False, 1200) == "splash"


def on_a_gpu(monkeypatch, kernel):
    monkeypatch.setattr(flash_attention, "select_backend", lambda *_: "cudnn")
    if kernel is not None:
        monkeypatch.setattr(flash_attention, "cudnn_attention", kernel)
    flash_attention.cudnn_attention_works.cache_clear()
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_without_cudnn_a_warning_is_logged_once_and_the_formula_is_used(monkeypatch, caplog):
    on_a_gpu(monkeypatch, None)
    *given, real_BS = drawn(queries=12, keys=12, dtype=jnp.bfloat16)
    with caplog.at_level(logging.WARNING):
        made = [
            jax.jit(lambda *x: dot_product_attention(*x, key_padding_mask(real_BS), None, SCALE))(*given)
            for _ in range(2)
        ]
    expected = flash_attention.reference_attention(*given, real_BS[:, None, None, :], None, SCALE)
    np.testing.assert_array_equal(made[0], expected)
    assert [r.message for r in caplog.records if "cuDNN attention is off" in r.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_kernel_with_wrong_results_is_not_used(monkeypatch, caplog):
    def wrong(query, key, value, keys_BS, causal, scale):
        return flash_attention.reference_attention(query, key, value, None, None, scale)  # forgets the mask

    on_a_gpu(monkeypatch, wrong)
    *given, real_BS = drawn(queries=12, keys=12)
    made = dot_product_attention(*given, key_padding_mask(real_BS), None, SCALE)
    np.testing.assert_allclose(made, written_out(*given, real_BS[:, None, None, :]), 1e-5, 1e-5)
    assert "relative error" in caplog.text


def test_a_kernel_with_correct_results_is_used_in_a_compiled_layer(monkeypatch):
    used = []

    def right(query, key, value, keys_BS, causal, scale):
        used.append(causal)
        mask = flash_attention.dense_mask(keys_BS, causal, query.shape[1])
        return flash_attention.reference_attention(query, key, value, mask, None, scale)

    on_a_gpu(monkeypatch, right)
    *given, real_BS = drawn(queries=12, keys=12)
    made = jax.jit(lambda *x: dot_product_attention(*x, causal_mask(real_BS), None, SCALE))(*given)
    mask = causal_mask(real_BS).to_dense(12)
    np.testing.assert_allclose(made, written_out(*given, mask), 1e-5, 1e-5)
    before = len(used)
    dot_product_attention(*given, causal_mask(real_BS), jnp.zeros((1, 4, 12, 12)), SCALE)
    dot_product_attention(*given, causal_mask(real_BS), None, SCALE, 0.1, jax.random.key(0))
    assert before and len(used) == before, "biases and dropout are not the kernel's"


def test_the_flops_of_a_kernel_are_counted_as_often_as_it_runs():
    *given, real_BS = drawn(queries=256, keys=256)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))

    def ours(*x):
        return flash_attention.shard_attention(
            lambda q, k, v, keys: flash_attention.splash_attention(q, k, v, keys, False, SCALE), mesh, *x, real_BS
        )

    plain = jax.make_jaxpr(lambda *x: flash_attention.reference_attention(*x))(*given)
    assert hlo_analysis.jaxpr_flops(jax.make_jaxpr(ours)(*given).jaxpr) == hlo_analysis.jaxpr_flops(plain.jaxpr)


@pytest.mark.skipif(not topologies.has_libtpu(), reason="libtpu, of the extra tpu, is not installed")
@pytest.mark.parametrize(("head", "kv_heads"), [(64, 8), (88, 8), (128, 2)])
def test_splash_attention_and_its_gradient_compile_for_a_pod(head, kv_heads):
    mesh = sharding.make_mesh(MeshConfig(1, 4, 4), topologies.topology_devices(topologies.parse_topology("v5e-16")))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=over)

    query, keys = array((4, 700, 8, head)), array((4, 700, kv_heads, head))

    def total(query, key, value, real_BS):
        with sharding.use_mesh(mesh):
            return dot_product_attention(query, key, value, causal_mask(real_BS)).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(query, keys, keys, array((4, 700), bool))
    made = traced.lower().compile()
    assert made.as_text().count("tpu_custom_call") >= 3, "the kernel forth and two back"
    assert "8,700,700" not in made.as_text(), "nowhere are all scores held"


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_over_key_pieces_shared_by_beams_equals_attention_over_their_concatenation(kv_heads):
    """Three prompts of two beams: the first piece has a row a prompt, the others a row a beam."""
    random = np.random.default_rng(kv_heads)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    pieces = [
        (draw(rows, kv_heads, length, 4), draw(rows, kv_heads, length, 4)) for rows, length in ((3, 5), (6, 2), (6, 1))
    ]
    query, bias = draw(6, 1, 6, 4), draw(6, 6, 1, 8)
    real = jnp.asarray(random.random((6, 8)) < 0.6).at[:, -1].set(True)
    together = [
        jnp.concatenate([jnp.repeat(piece[n], 6 // len(piece[n]), axis=0) for piece in pieces], axis=2).swapaxes(1, 2)
        for n in range(2)
    ]
    for given in (None, bias):
        wanted = dot_product_attention(query, *together, key_padding_mask(real), given, 0.5)
        found = segmented_attention(query, pieces, key_padding_mask(real), given, 0.5)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
