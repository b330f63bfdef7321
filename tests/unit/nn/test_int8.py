# SPDX-License-Identifier: Apache-2.0
"""Int8 weights: each output channel has its own scale, and a model's logits move little."""

import dataclasses

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_places
from small_t5 import TINY
from toy_system import Toy, random_params

from benchmarks.text_t5 import random_prompts, text_batch
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.inference import answer_mesh
from lionjax.inference.int8 import quantize_language
from lionjax.models.vlm.text_lm import TextLM
from lionjax.nn.int8 import Int8Matrix, quantize


def test_a_rounded_matrix_is_within_half_a_step_of_each_channel():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(40, 3, 5)).astype(np.float32) * np.logspace(-3, 3, 5, dtype=np.float32)
    kernel[:, 1, 2] = 0
    for axes in ((0,), (0, 1)):
        matrix = quantize(kernel, axes)
        step = np.abs(kernel).max(axis=axes, keepdims=True) / 127
        assert matrix.values.dtype == jnp.int8 and (np.abs(matrix.astype(np.float32) - kernel) <= step * 0.5001).all()
    merged = quantize(kernel, (0, 1)).reshape(-1, 5)
    np.testing.assert_array_equal(merged.astype(np.float32), quantize(kernel, (0, 1)).astype(np.float32).reshape(-1, 5))


@pytest.mark.parametrize("language", [TINY, small_places.DECODER], ids=["T5", "decoder"])
def test_the_language_model_reads_int8_matrices_and_its_logits_move_little(language):
    model = TextLM(language)
    batch = text_batch(*random_prompts(0, language.vocab_size, (5, 9)))
    target = (batch.prompt_BL, batch.prompt_mask_BL, batch.prompt_mask_BL)
    batch = dataclasses.replace(batch, **dict(zip(("target_BM", "target_mask_BM", "loss_mask_BM"), target)))
    batch = dataclasses.replace(batch, task_B=np.zeros(2, np.int32))
    params = linen.unbox(jax.jit(model.init)(jax.random.key(0), batch))
    rounded = quantize_language(model, params, batch)
    matrices = [leaf for leaf in trees.flatten(rounded).values() if isinstance(leaf, Int8Matrix)]
    assert len(matrices) > 5
    one, other = (np.asarray(model.prefill(given, batch, 0)[0]) for given in (params, rounded))
    assert 0 < np.abs(one - other).max() < 0.05 * np.abs(one).max()
    assert answer_mesh.model_digest(model, params) != answer_mesh.model_digest(model, rounded)


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(UserError, match="no language model"):

        class Plain(Toy):
            def init(self, key, batch):
                return random_params(0)

        quantize_language(Plain(), random_params(0), None)
