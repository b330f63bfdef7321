# SPDX-License-Identifier: Apache-2.0
"""LoRA as a field of dense layers: which get one, and that its dropout is applied in every one of them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from lionjax.core import params as trees
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config
from lionjax.nn.lora import LoraConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
LORA = LoraConfig(2, 4.0, 0.5, TARGETS)
MODELS = {
    "decoder": DecoderConfig(20, 16, 2, 2, 2, 8, 24, lora=LORA),
    "t5": T5Config(20, 16, 8, 2, 24, 2, 2, dropout=0.0, lora=LORA),
}
IDS, MASK = np.arange(10).reshape(2, 5), np.ones((2, 5), int)


def reader(c):
    """(module, how it reads a text with a key)."""

    def run(module, key):
        x = module.embed(IDS)
        if isinstance(c, T5Config):
            encoded = module.encode(x, MASK, None, key)
            return module.decode(IDS, MASK, encoded, MASK, None, key)
        return module.logits(module(x, MASK, None, key))

    return (T5 if isinstance(c, T5Config) else Decoder)(c), run


def having(c) -> set[str]:
    module, run = reader(c)
    made = jax.eval_shape(lambda: meta.unbox(module.init(jax.random.key(0), None, method=run)["params"]))
    return {path.split("/")[-2] for path in trees.flatten(made) if path.endswith("lora_a")}


@pytest.mark.parametrize("name", MODELS)
def test_lora_is_added_only_to_the_named_layers(name):
    c = MODELS[name]
    assert having(c) == set(TARGETS)
    assert having(dataclasses.replace(c, lora=dataclasses.replace(LORA, targets=("q", "v")))) == {"q", "v"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_dropout_of_every_target_is_drawn_by_the_key_and_is_off_without_one(name):
    module, run = reader(MODELS[name])
    made = jax.jit(lambda key: meta.unbox(module.init(key, None, method=run)["params"]))(jax.random.key(0))
    read = jax.jit(lambda params, key: module.apply({"params": params}, key, method=run))
    flat, keys = trees.flatten(made), [jax.random.key(seed) for seed in (1, 2)]

    def opened(target):
        """The parameters with the detours of one target open, and all others as they begin."""
        return trees.unflatten(
            {
                path: np.full_like(leaf, 0.3 * (path.split("/")[-2] == target)) if path.endswith("lora_b") else leaf
                for path, leaf in flat.items()
            }
        )

    np.testing.assert_array_equal(*(read(opened(None), key) for key in keys))
    for target in TARGETS:
        one, two = (np.asarray(read(opened(target), key)) for key in keys)
        assert np.abs(one - two).max() > 1e-6, target
        np.testing.assert_array_equal(one, read(opened(target), keys[0]))
    sure = read(opened("q"), None)
    np.testing.assert_allclose(sure, read(opened("q"), None))
    assert np.abs(np.asarray(sure) - read(opened("q"), keys[0])).max() > 1e-6
