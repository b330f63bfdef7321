# SPDX-License-Identifier: Apache-2.0
"""Candidates behind one prompt have the losses that each has as an answer of its own."""

import jax
import numpy as np
import pytest
import small_lion
from mesh_systems import LLAVA, scenes

from lionjax.core import sharding
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.inference import candidates
from lionjax.inference.engine import InferenceEngine

pytestmark = pytest.mark.slow
CHOICES = [["red", "a small blue circle"], ["yes", "no", "two green stars and a ring"], ["red"]]


@pytest.mark.parametrize("what", [scenes(LLAVA, ("projector",)), small_lion.experiment()], ids=["LLaVA", "LION"])
def test_candidates_behind_one_prompt_have_the_losses_of_single_answers(what, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    engine = InferenceEngine(what.model, small_lion.params_of(what), Processor(what.data.processor), mesh)
    images = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)
    groups = [
        [engine.processor.encode_input(ImageTextInput(image, f"What is it{'?' * k}"), text) for text in texts]
        for k, (image, texts) in enumerate(zip(images, CHOICES))
    ]
    found = engine.candidate_nll(groups)
    wanted = engine.answer_nll([row for group in groups for row in group])
    assert [len(nats_K) for nats_K in found] == [2, 3, 1]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-4)
    assert np.ptp(wanted) > 1
    before = candidates.candidate_nll._cache_size()
    engine.candidate_nll(groups)
    assert candidates.candidate_nll._cache_size() == before
