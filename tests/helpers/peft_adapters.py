# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT itself makes on tiny models of transformers, with random values everywhere."""

import functools
import json
import random

import jax
import numpy as np
import tiny_prefix
from published_folders import PUBLISHED

from lionjax.models.language.decoder import Decoder
from lionjax.models.language.t5 import T5

LANGUAGES = {name: PUBLISHED[name] for name in ("llama", "llama, tied", "opt", "gpt2", "t5")}


def language_model(kind: str):
    """A tiny language model of transformers, every weight moved off zero and one."""
    import torch
    import transformers

    torch.manual_seed(0)
    architecture, config, sizes = LANGUAGES[kind]
    sizes = sizes | {"dropout_rate": 0.0} if kind == "t5" else sizes
    model = getattr(transformers, architecture)(getattr(transformers, config)(**sizes))
    return tiny_prefix.shaken(model)


def vision_language_model(system: str):
    """A tiny LLaVA, BLIP-2 or InstructBLIP of transformers with fixed sizes."""
    return tiny_prefix.theirs(system, random.Random(2))


def with_adapter(model, folder, amount: float = 0.3, **settings):
    """The model in evaluation with a PEFT adapter, whose trainable values are all random; saved in `folder`."""
    import peft
    import torch

    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return model


def change_config(folder, **fields):
    """Change fields of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def language_inputs(kind: str) -> dict:
    """Token ids as arguments of their forward."""
    import torch

    ids = torch.arange(10, 26).reshape(2, 8)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5] + 7} if kind == "t5" else {})


@functools.partial(jax.jit, static_argnums=0)
def decoder_logits(config, params, ids):
    def read(model, ids):
        return model.logits(model(model.embed(ids), jax.numpy.ones_like(ids)))

    return Decoder(config).apply({"params": params}, ids, method=read)


@functools.partial(jax.jit, static_argnums=0)
def t5_logits(config, params, ids, target):
    def read(model, ids, target):
        encoded = model.encode(model.embed(ids), jax.numpy.ones_like(ids))
        return model.decode(target, jax.numpy.ones_like(target), encoded, jax.numpy.ones_like(ids))

    return T5(config).apply({"params": params}, ids, target, method=read)


def our_language_logits(config, params, inputs: dict) -> np.ndarray:
    """Logits of our model for `language_inputs`."""
    arrays = [x.numpy().astype(np.int32) for x in inputs.values()]
    run = t5_logits if len(arrays) == 2 else decoder_logits
    return np.asarray(run(config, params, *arrays))


def their_logits(model, inputs: dict) -> np.ndarray:
    """Logits of theirs."""
    import torch

    with torch.no_grad():
        return model(**inputs).logits.numpy()


def assert_alike(ours, theirs):
    """Within 1e-4 of the largest value."""
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()
