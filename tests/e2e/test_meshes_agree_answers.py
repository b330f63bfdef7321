# SPDX-License-Identifier: Apache-2.0
"""Every system, small, on several meshes: the same answers, boxes and masks as on one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import small_lion
import small_places
from mesh_systems import SYSTEMS, compiled_anew, mesh_of, programs_are_let_go  # noqa: F401

from lionjax import planner
from lionjax.core import sharding
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.sampling import GenerationConfig
from lionjax.models.language.t5 import T5Config

pytestmark = pytest.mark.slow

FRACTION = re.compile(r"[01]\.\d{3}")


def answerer(name: str, mesh_name: str) -> InferenceEngine:
    what, number = SYSTEMS[name]
    mesh = mesh_of(mesh_name)
    like = sharding.abstract_params(what.model.init, jax.random.key(0), planner.dummy_batch(what), mesh=mesh)
    make = small_places.talking if getattr(what.model, "sam", None) else small_lion.params_of
    params = sharding.reshard_like(jax.device_get(make(what)), like)  # cut on the host: nothing to compile
    return InferenceEngine(what.model, params, Processor(what.data.processor), mesh)


def said(name: str, mesh_name: str):
    talks = answerer(name, mesh_name)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (8, 40, 40, 3), np.uint8)
    questions = ["What is it?", "Where is the small red circle?", "How many?", "Is there a dog in it?"] * 2
    rows = [talks.processor.encode_input(ImageTextInput(picture, text)) for picture, text in zip(pictures, questions)]
    language = SYSTEMS[name][0].model.language
    how = GenerationConfig(
        8, eos_token_id=language.end_token, decoder_start_token_id=0 if isinstance(language, T5Config) else None
    )
    beams = dataclasses.replace(how, num_beams=2)
    large = [(40, 40)] * 8 if "sam" in rows[0] else None
    return talks.generate(rows, how, image_sizes=large), talks.generate(rows, beams)


def test_another_mesh_retraces_the_program():
    seen = []

    @jax.jit
    def within(x):  # as `generate` is one for all models
        seen.append(sharding.current_mesh())
        return sharding.with_logical_constraint(x, "batch", None)

    for mesh in map(mesh_of, ("one", "data", "data", "all")):

        def whole(x, mesh=mesh):
            with sharding.use_mesh(mesh):
                return within(x)

        jax.jit(whole)(np.zeros((8, 2)))
    assert seen == [mesh_of(name) for name in ("one", "data", "all")]
    assert sharding.current_mesh() is None


@pytest.mark.parametrize(
    "name", ["lion", "llava", "instructblip", "flamingo", "nextchat, words and boxes", "flagship, words and boxes"]
)
def test_answers_boxes_and_masks_do_not_depend_on_the_mesh(name):
    wanted = said(name, "one")
    assert len({answer.text for answer in wanted[0]}) > 1  # it does not say the same whatever it sees
    for mesh in ("fsdp", "all"):
        for alone, here in zip(wanted, said(name, mesh)):
            for one, other in zip(here, alone):
                # A third decimal stands for a number and may turn over at its edge; words may not.
                assert FRACTION.sub("", one.text) == FRACTION.sub("", other.text)
                np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)
                if other.masks is not None:
                    assert (one.masks == other.masks).mean() > 0.999 if other.masks.size else True
