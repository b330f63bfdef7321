# SPDX-License-Identifier: Apache-2.0
"""No answer and no score comes from logits that are NaN or infinite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_system import PROMPTS, Toy, batch_of, random_params

from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import VLM, Cache, UserError
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.generate import generate, stream
from lionjax.inference.sampling import GenerationConfig

WAYS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3, "min_length": 3},
    "sampled": {"do_sample": True, "top_k": 4, "top_p": 0.9},
    "beams": {"num_beams": 3},
}
KEY = jax.random.key(0)


def broken(prompt_token: int | None = None, value: float = np.nan):
    """Parameters with a damaged row of the prompt's word table, or of the output's bias."""
    params = random_params(0)
    if prompt_token is None:
        params["bias"][4] = value
    else:
        params["prompt"][prompt_token] = value
    return params


@pytest.mark.parametrize("way", WAYS)
def test_rows_with_non_finite_logits_are_marked_and_the_others_are_unchanged(way):
    config = GenerationConfig(max_new_tokens=6, **WAYS[way])
    batch = batch_of(*PROMPTS)  # token 8 is in the second prompt only
    sound = generate(Toy(), random_params(0), batch, config, KEY)
    found = generate(Toy(), broken(8), batch, config, KEY)
    assert np.asarray(sound.is_finite_B).all()
    np.testing.assert_array_equal(found.is_finite_B, [True, False, True, True])
    np.testing.assert_array_equal(np.asarray(found.ids_BM)[[0, 2, 3]], np.asarray(sound.ids_BM)[[0, 2, 3]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("way", WAYS)
def test_one_non_finite_logit_marks_each_row_that_has_it(way, value):
    config = GenerationConfig(max_new_tokens=6, **WAYS[way])
    assert not np.asarray(generate(Toy(), broken(value=value), batch_of(*PROMPTS), config, KEY).is_finite_B).any()


def test_logits_masked_with_minus_infinity_are_not_marked():
    config = GenerationConfig(max_new_tokens=6)
    for how in (config, dataclasses.replace(config, num_beams=3)):
        assert np.asarray(generate(Toy(), broken(value=-np.inf), batch_of(*PROMPTS), how).is_finite_B).all()


def test_non_finite_logits_in_a_later_step_end_the_loop():
    params = random_params(0)
    params["bias"][1] = -100  # no row ends by itself
    config = GenerationConfig(max_new_tokens=20)
    sound = np.asarray(generate(Toy(), params, batch_of(*PROMPTS), config).ids_BM)
    params["token"][sound[0, 3]] = np.nan  # read in step 4, not in the prompt
    params["token"][0] = 0
    found = generate(Toy(), params, batch_of((3, 4)), config)
    assert not np.asarray(found.is_finite_B).any()
    assert (np.asarray(found.ids_BM)[0, 5:] == config.pad_token_id).sum() >= 14
    tokens = stream(Toy(), params, batch_of((3, 4)), config)
    with pytest.raises(UserError, match="non-finite logits .* for 1 of 1 inputs"):
        list(tokens)


@dataclasses.dataclass(frozen=True)
class Damaged(VLM):
    """Logits and boxes of NaN for every second row."""

    def prefill(self, params, batch, cache_length):
        row_B = jnp.arange(len(batch.prompt_BL))
        logits_BV = jnp.where(row_B[:, None] % 2 == 1, jnp.nan, jnp.zeros(1024).at[1].set(1.0))
        return logits_BV, Cache({"kept": None}, None, jnp.ones((), jnp.int32))

    def extend(self, params, token_B, cache):
        return jnp.zeros((len(token_B), 1024)), cache

    def logits(self, params, batch, key=None):
        row_B = jnp.arange(len(batch.prompt_BL))
        return jnp.where(row_B[:, None, None] % 2 == 1, jnp.nan, jnp.zeros((1, batch.target_BM.shape[1], 1024)))

    def predict_boxes(self, params, batch):
        rows = len(batch.prompt_BL)
        box_BK4 = jnp.where(jnp.arange(rows)[:, None, None] % 2 == 1, jnp.nan, jnp.full((1, 2, 4), 0.5))
        return box_BK4, None, jnp.ones((rows, 2), bool)


@pytest.fixture(scope="module")
def asked():
    processor = Processor(ProcessorConfig(image_size=8, max_prompt_tokens=16, use_tags=False))
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [processor.encode_input(ImageTextInput(image, "What?"), "Red.") for _ in range(2)]
    return InferenceEngine(Damaged(), {}, processor, mesh), rows


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda engine, rows: engine.generate(rows, GenerationConfig(max_new_tokens=2)), "logits"),
        (lambda engine, rows: engine.answer_nll(rows), "losses"),
        (lambda engine, rows: engine.teacher_forced_boxes(rows), "boxes"),
    ],
    ids=["answer", "score", "boxes"],
)
def test_the_engine_refuses_non_finite_logits_when_answering_and_scoring(asked, call, what):
    engine, rows = asked
    assert len(call(engine, rows[:1])) == 1
    with pytest.raises(UserError, match=f"non-finite {what} .* for 1 of 2 inputs"):
        call(engine, rows)
