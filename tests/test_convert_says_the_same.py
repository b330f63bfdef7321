# SPDX-License-Identifier: Apache-2.0
"""A language model through folders both ways: the same words before, in JAX, and after."""

import json

import jax
import numpy as np
import pytest
from test_convert_folders import PUBLISHED
from test_decoder import Text, text_batch

from lionjax import convert
from lionjax.generate import generate
from lionjax.scores import GenerateConfig

NEW = 8


@pytest.mark.parametrize("name, beams", [("llama", 3), ("opt", 1), ("gpt2", 1)])
def test_a_model_says_the_same_words_before_in_jax_and_after(tmp_path, name, beams):
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
    how = GenerateConfig(NEW, beams=beams, eos=-1, pad=0, start=None)
    mine = np.asarray(generate(Text(config), params, batch, how).ids_BM)
    for one in (theirs, again):
        said = one.generate(
            torch.tensor(ids, dtype=torch.long), attention_mask=torch.ones(ids.shape), num_beams=beams,
            do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        np.testing.assert_array_equal(mine, said[:, ids.shape[1] :].numpy())
    with torch.no_grad():
        one, other = (m(torch.tensor(ids, dtype=torch.long)).logits for m in (theirs, again))
    assert torch.equal(one, other)
