# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of the Q-Former and the limit of its learned positions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import leafwise
import numpy as np
import pytest

from lionjax.core.types import UserError
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.nn.attention import Attention, copying_inits

SIZES = {"width": 12, "depth": 2, "num_heads": 2, "mlp_dim": 20, "num_query_tokens": 3, "vocab_size": 40}


def test_a_question_longer_than_the_learned_positions_is_refused():
    config = dataclasses.replace(QFormerConfig(), **SIZES, use_text_input=True, max_positions=16)
    source, texts = jnp.zeros((1, 4, config.vision_width)), {n: jnp.ones((1, n), jnp.int32) for n in (16, 17)}
    init = QFormer(config).init
    jax.eval_shape(init, jax.random.key(0), source, texts[16], texts[16])
    with pytest.raises(UserError, match="17 tokens do not fit the 16 learned positions"):
        jax.eval_shape(init, jax.random.key(0), source, texts[17], texts[17])


def test_decoding_embeds_text_from_a_traced_position():
    config = dataclasses.replace(QFormerConfig(), **SIZES, use_text_input=True, max_positions=16)
    module, ids = QFormer(config), jnp.ones((1, 2), jnp.int32)
    params = leafwise.init_leafwise(module.init, jax.random.key(0), jnp.zeros((1, 4, config.vision_width)), ids, ids)
    embed = functools.partial(module.apply, params, method=QFormer.embed_text)
    whole = embed(jnp.ones((1, 4), jnp.int32), "float32")
    made = jax.jit(lambda offset: embed(ids, "float32", offset + jnp.arange(2)))(2)
    np.testing.assert_allclose(made, whole[:, 2:], atol=1e-6)


def test_attention_that_starts_by_copying_gives_the_source_vector_that_resembles_its_query():
    source_1SD = 4 * jnp.eye(8)[None, [1, 4, 6]]
    attention = Attention(8, 2, 4, kernel_inits=copying_inits(40.0))
    query_1QD = source_1SD[:, [2, 0]] + 0.3
    params = attention.init(jax.random.key(0), query_1QD, source_1SD)
    np.testing.assert_allclose(attention.apply(params, query_1QD, source_1SD), source_1SD[:, [2, 0]], atol=0.1)


def test_the_attention_of_a_qformer_starts_by_copying_where_its_config_says_so():
    config = dataclasses.replace(QFormerConfig(), **SIZES, vision_width=12, use_text_input=False)
    assert config.copy_sharpness is None
    init = jax.jit(QFormer(dataclasses.replace(config, copy_sharpness=0.5)).init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, 4, 12))))["params"]
    attention = params["groups"]["block_0"]["cross_attention"]
    q_DD, k_DD = (attention[name]["kernel"][0].reshape(12, 12) for name in "qk")
    np.testing.assert_allclose(q_DD @ k_DD.T, 0.5 * np.eye(12), atol=1e-5)


def test_attention_to_regions_starts_by_choosing_among_them_and_keeps_their_scale():
    c = MQFormerConfig(64, 1, 1, 8, 5, 1, vision_width=64, vocab_size=9, num_grounding_queries=3, region_width=40)
    stds = {}
    for sharpness in (None, 1.0, 20.0):
        model = QFormer(dataclasses.replace(c, copy_sharpness=sharpness))
        arguments = jax.random.key(0), jnp.zeros((1, 2, 64)), None, None, None, (jnp.zeros((1, 2, 40)), None)
        params = nn.unbox(jax.jit(model.init)(*arguments))["params"]["groups"]["block_0"]["region_attention"]
        stds[sharpness] = [float(jnp.std(params[name]["kernel"])) for name in "qkvo"]
    np.testing.assert_allclose(stds[None], 0.02, rtol=0.1)
    np.testing.assert_allclose(stds[1.0], 1 / 8, rtol=0.1)
    np.testing.assert_allclose(stds[20.0], [20**0.5 / 8, 20**0.5 / 8, 1 / 8, 1 / 8], rtol=0.1)
