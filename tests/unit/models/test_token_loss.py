# SPDX-License-Identifier: Apache-2.0
"""The loss over the vocabulary in chunks of positions: the same numbers, in less memory."""

import dataclasses

import jax
import leafwise
import numpy as np
import pytest
import small_places
from small_lion import SYSTEM
from text_batches import batch_of

from lionjax.core import params as trees
from lionjax.models.vlm.text_lm import TextLM

LANGUAGES = {"decoder": small_places.DECODER, "T5": SYSTEM.language}
LENGTH = 11


def loss_in_chunks(language, chunk: int):
    """A function params -> (loss, metrics), and parameters and the batch."""
    random = np.random.default_rng(0)
    language = dataclasses.replace(language, adapters=None, dropout=0.0, loss_chunk=chunk)
    texts = [random.integers(3, language.vocab_size, (2, length), np.int32) for length in (5, LENGTH)]
    batch = batch_of(np.zeros((2, 1, 1, 3), np.float32), *((ids, np.ones_like(ids)) for ids in texts))
    batch = dataclasses.replace(batch, loss_mask_BM=random.integers(0, 2, (2, LENGTH)))
    model = TextLM(language)
    return jax.value_and_grad(lambda params: model.loss(params, batch), has_aux=True), model, batch


@pytest.mark.parametrize("name", LANGUAGES)
def test_loss_metrics_and_gradients_in_chunks_are_those_at_once(name):
    at_once, model, batch = loss_in_chunks(LANGUAGES[name], 0)
    params = leafwise.init_leafwise(model.init, jax.random.key(0), batch)
    in_chunks, *_ = loss_in_chunks(LANGUAGES[name], 4)
    (loss, metrics), grads = jax.jit(at_once)(params)
    (chunked, chunked_metrics), chunked_grads = jax.jit(in_chunks)(params)
    np.testing.assert_allclose(chunked, loss, rtol=1e-6)
    assert metrics.keys() == chunked_metrics.keys()
    for key in metrics:
        np.testing.assert_allclose(chunked_metrics[key], metrics[key], rtol=1e-6)
    for path, grad in trees.flatten(grads).items():
        np.testing.assert_allclose(trees.flatten(chunked_grads)[path], grad, atol=1e-6, err_msg=path)
