# SPDX-License-Identifier: Apache-2.0
"""Models that speak, through folders both ways: the same words before, in JAX, and after."""

import json
import random

import jax
import numpy as np
import pytest
import tiny_prefix as tiny
from published_folders import PUBLISHED

from benchmarks.text_t5 import text_batch
from lionjax import convert
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerationConfig
from lionjax.models.vlm.text_lm import TextLM

NEW = 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, beams", [("llama", 3), ("opt", 1), ("gpt2", 1), ("t5", 1), pytest.param("t5", 3, marks=pytest.mark.slow)]
)
def test_language_model_generates_the_same_tokens_in_torch_in_jax_and_after_export(tmp_path, name, beams):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, settings, sizes = PUBLISHED[name]
    model = getattr(transformers, model)
    torch.manual_seed(0)
    theirs = model(getattr(transformers, settings)(**sizes)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.2 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "theirs")
    convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    config, params = convert.load_params(tmp_path / "ours")
    params = jax.tree.map(jax.numpy.asarray, params)
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    again = model.from_pretrained(tmp_path / "back").eval()

    ids = np.random.default_rng(0).integers(3, 50, (2, 6)).astype(np.int32)
    batch = text_batch(ids, np.ones_like(ids))
    start, system = 0 if name == "t5" else None, TextLM(config)
    how = GenerationConfig(NEW, num_beams=beams, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=start)
    mine = np.asarray(generate(system, params, batch, how).ids_BM)
    before = 1 if name == "t5" else ids.shape[1]  # a start token or the prompt, which they give back
    for one in (theirs, again):
        said = one.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.ones(ids.shape),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(mine, said[:, before:].numpy())
    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    inputs |= {"decoder_input_ids": inputs["input_ids"][:, :3]} if name == "t5" else {}
    with torch.no_grad():
        one, other = (m(**inputs).logits for m in (theirs, again))
    assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.SYSTEMS)
def test_vision_language_model_generates_the_same_tokens_in_torch_in_jax_and_after_export(tmp_path, name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    draw = random.Random(5)
    theirs = tiny.theirs(name, draw)
    theirs.save_pretrained(tmp_path / "theirs")
    convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    system, params = convert.load_params(tmp_path / "ours")
    params = jax.tree.map(jax.numpy.asarray, params)
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    batch = tiny.batch_of(system, draw)
    how = GenerationConfig(
        NEW, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=0 if system.is_encoder_decoder else None
    )
    mine = np.asarray(generate(system, params, batch, how).ids_BM)
    asked = tiny.inputs(system, batch, answers=False, left=not system.is_encoder_decoder)
    for one in (theirs, again):
        # No end, so that all of them say as many words.
        one.generation_config.eos_token_id = one.config.text_config.eos_token_id = None
        with torch.no_grad():
            said = one.generate(
                **asked,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(mine, said[:, -NEW:].numpy())
