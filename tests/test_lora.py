# SPDX-License-Identifier: Apache-2.0
"""LoRA as a field of dense layers: which get one, that its dropout is applied, and that nothing else is drawn anew."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from lionjax import params as trees
from lionjax.language.decoder import Decoder, DecoderConfig
from lionjax.language.t5 import T5, T5Config
from lionjax.layers import Dense, LoraConfig

LORA = LoraConfig(2, 4.0, 0.5, ("q", "v"))
DECODER = DecoderConfig(20, 16, 2, 2, 2, 8, 24, lora=LORA)
ENCODER = T5Config(20, 16, 8, 2, 24, 2, 2, dropout=0.0, lora=LORA)
IDS, MASK = np.arange(10).reshape(2, 5), np.ones((2, 5), int)


def read(c, key=None, b: float = 0.1):
    """What a language model makes of a text, its first LoRA halves random and all second ones `b`."""
    module = T5(c) if isinstance(c, T5Config) else Decoder(c)

    def run(module, key):
        x = module.embed(IDS)
        if isinstance(c, T5Config):
            encoded = module.encode(x, MASK, None, key)
            return module.decode(IDS, MASK, encoded, MASK, None, key)
        return module.logits(module(x, MASK, None, key))

    made = meta.unbox(module.init(jax.random.key(0), None, method=run)["params"])
    flat = trees.flatten(made)
    flat |= {path: np.full_like(leaf, b) for path, leaf in flat.items() if path.endswith("lora_b")}
    return module.apply({"params": trees.unflatten(flat)}, key, method=run), set(flat)


@pytest.mark.parametrize("c", [DECODER, ENCODER], ids=["decoder", "t5"])
def test_only_the_layers_that_are_named_get_one(c):
    def having(targets):
        _, paths = read(dataclasses.replace(c, lora=dataclasses.replace(LORA, targets=targets)))
        return {path.split("/")[-2] for path in paths if path.endswith("lora_a")}

    assert having(("q", "v")) == {"q", "v"}
    assert having(("q", "k", "v", "o", "gate", "up", "down")) == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
@pytest.mark.parametrize("c", [DECODER, ENCODER], ids=["decoder", "t5"])
def test_the_dropout_of_every_target_is_drawn_by_the_key_and_off_without_one(c, name):
    c = dataclasses.replace(c, lora=dataclasses.replace(LORA, targets=(name,)))
    one, two = (np.asarray(read(c, jax.random.key(seed))[0]) for seed in (1, 2))
    assert np.abs(one - two).max() > 1e-6
    without = dataclasses.replace(c, lora=dataclasses.replace(c.lora, dropout=0.0))
    np.testing.assert_array_equal(read(c)[0], read(without)[0])
    still = [read(c, key, b=0.0)[0] for key in (None, jax.random.key(1))]  # a LoRA that is still nothing
    np.testing.assert_array_equal(*still)


def test_a_detour_under_dropout_is_right_on_average():
    dense = Dense(8, 4, ("embed", None), lora=dataclasses.replace(LORA, targets=("q",)), name="q")
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    made = meta.unbox(dense.init(jax.random.key(0), x)["params"]) | {"lora_b": np.ones((2, 4), np.float32)}
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(lambda key: dense.apply({"params": made}, x, key))(keys)
    np.testing.assert_allclose(drawn.mean(0), dense.apply({"params": made}, x), atol=0.15)
    assert np.asarray(drawn).std(0).min() > 0.1
