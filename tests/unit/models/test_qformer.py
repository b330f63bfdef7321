# SPDX-License-Identifier: Apache-2.0
"""The Q-Former refuses more text than it has learned positions."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lionjax.core.types import UserError
from lionjax.models.connectors.qformer import QFormer, QFormerConfig

SIZES = {"width": 12, "depth": 2, "num_heads": 2, "mlp_dim": 20, "num_query_tokens": 3, "vocab_size": 40}


def test_a_question_longer_than_the_learned_positions_is_refused():
    config = dataclasses.replace(QFormerConfig(), **SIZES, use_text_input=True, max_positions=16)
    source, texts = jnp.zeros((1, 4, config.vision_width)), {n: jnp.ones((1, n), jnp.int32) for n in (16, 17)}
    init = QFormer(config).init
    jax.eval_shape(init, jax.random.key(0), source, texts[16], texts[16])
    with pytest.raises(UserError, match="17 tokens do not fit the 16 learned positions"):
        jax.eval_shape(init, jax.random.key(0), source, texts[17], texts[17])
