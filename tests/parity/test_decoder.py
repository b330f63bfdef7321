# SPDX-License-Identifier: Apache-2.0
"""The causal decoder in its three settings against transformers: logits, cached reading, greedy words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from torch_configs import block_sizes, llama_config

from benchmarks.text_t5 import text_batch
from lionjax import convert
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.language import decoder, decoder_weights
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.vlm.text_lm import TextLM
from lionjax.nn.adapters import AdapterConfig, RoutedAdapters
from lionjax.nn.attention import causal_mask
from lionjax.nn.layers import GatedMLP, RMSNorm, dropout
from lionjax.nn.positions import alibi_bias

SIZES = {"vocab_size": 50, "width": 24, "depth": 3, "num_heads": 4, "head_dim": 6, "mlp_dim": 40, "eos_token_id": 3}
LLAMA = DecoderConfig(num_kv_heads=2, rope_theta=500.0, **SIZES)
TIED = dataclasses.replace(LLAMA, num_kv_heads=4, tie_embeddings=True)
OPT = dataclasses.replace(decoder.OPT_2_7B, num_kv_heads=4, max_positions=34, **SIZES)
GPT2 = dataclasses.replace(decoder.GPT2, num_kv_heads=4, max_positions=32, **SIZES)
SETTINGS = {"llama": LLAMA, "tied": TIED, "opt": OPT, "gpt2": GPT2}
ROWS = {
    "llama": decoder_weights.llama_weight_map,
    "tied": decoder_weights.llama_weight_map,
    "opt": decoder_weights.opt_weight_map,
    "gpt2": decoder_weights.gpt2_weight_map,
}
NEW = 8


def prompts(lengths, vocab, side="right"):
    """Random prompts of unequal lengths with padding on one side: ids and mask."""
    most, random = max(lengths), np.random.default_rng(1)
    ids_BL, mask_BL = np.zeros((len(lengths), most), np.int32), np.zeros((len(lengths), most), np.int32)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(most - length, most)
        ids_BL[row, where], mask_BL[row, where] = random.integers(4, vocab, length), 1
    return ids_BL, mask_BL


def noisy(params):
    """Parameters that are nowhere zero or one, so that every one of them counts."""
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(3)
    return tree.unflatten([leaf + 0.2 * random.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def torch_twin(name: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = SETTINGS[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": c.eos_token_id}
    torch.manual_seed(0)
    if name in ("llama", "tied"):
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        config = llama_config(c, tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, **ids)
        model = transformers.LlamaForCausalLM(config)
    elif name == "opt":
        positions = c.max_positions - c.position_offset
        sizes = block_sizes(c) | {"vocab_size": c.vocab_size, "ffn_dim": c.mlp_dim}
        config = transformers.OPTConfig(max_position_embeddings=positions, **sizes, **ids)
        model = transformers.OPTForCausalLM(config)
    else:
        sizes = {"n_embd": c.width, "n_inner": c.mlp_dim, "n_layer": c.depth, "n_head": c.num_heads}
        config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.max_positions, **sizes, **ids)
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # as they begin, biases are zero, norms say nothing and one word follows itself
        for name, weight in model.named_parameters():
            weight += 0.2 * torch.randn_like(weight)
            weight *= 0.3 if "embed_tokens" in name or "wte" in name else 1
    return model.eval()


@pytest.fixture(scope="module", params=SETTINGS)
def twins(request):
    theirs, c = torch_twin(request.param), SETTINGS[request.param]
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, c, convert.params_from_state_dict(ROWS[request.param](c), state), ROWS[request.param](c), state


def test_decoder_logits_match_transformers(twins):
    import torch

    theirs, c, params, rows, state = twins
    ids_BL, mask_BL = prompts((9, 5, 1), c.vocab)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids_BL).long(), attention_mask=torch.from_numpy(mask_BL)).logits.numpy()

    def read(model, ids, mask):
        return model.logits(model(model.embed(ids), mask))

    made = jax.jit(lambda i, m: Decoder(c).apply({"params": params}, i, m, method=read))(ids_BL, mask_BL)
    np.testing.assert_allclose(np.asarray(made)[mask_BL == 1], wanted[mask_BL == 1], atol=2e-5)
    back = convert.state_dict_from_params(rows, params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.slow
def test_greedy_decoding_of_unequal_prompts_matches_transformers(twins):
    import torch

    theirs, c, params, *_ = twins
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=c.end_token, pad_token_id=0, decoder_start_token_id=None)
    made = generate(TextLM(c), params, text_batch(*prompts((9, 5, 2), c.vocab)), config)
    ids_BL, mask_BL = prompts((9, 5, 2), c.vocab, side="left")  # as generate of theirs wants them
    wanted = theirs.generate(
        torch.from_numpy(ids_BL).long(), attention_mask=torch.from_numpy(mask_BL), max_new_tokens=NEW, do_sample=False
    )[:, ids_BL.shape[1] :]
    np.testing.assert_array_equal(np.asarray(made.ids_BM)[:, : wanted.shape[1]], wanted)
    assert len(np.unique(wanted)) >= 4, "a model that repeats one word shows little"


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_max_new_tokens_may_be_one(twins, beams):
    _, c, params, *_ = twins
    batch = text_batch(*prompts((5, 2), c.vocab))
    one, two = (
        GenerationConfig(max_new_tokens=n, num_beams=k, eos_token_id=c.end_token, pad_token_id=0)
        for n, k in ((1, beams), (2, 1))
    )
    short, longer = (generate(TextLM(c), params, batch, config) for config in (one, two))
    np.testing.assert_array_equal(short.ids_BM, longer.ids_BM[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left", "hole"])
def test_cached_decoding_matches_a_full_forward_pass_for_any_padding(side):
    c = dataclasses.replace(LLAMA, adapters=AdapterConfig(4, 2, 2))
    ids_BL, mask_BL = prompts((6, 3, 4), c.vocab_size, "left" if side == "left" else "right")
    if side == "hole":
        mask_BL[0, 2:4] = 0
    more_BM = np.random.default_rng(2).integers(4, c.vocab_size, (3, 3)).astype(np.int32)
    task_B = np.array([0, 1, 1], np.int32)

    def whole(model, ids_BL, mask_BL):
        return model.logits(model(model.embed(ids_BL), mask_BL, task_B))

    def stepwise(model):
        state_BD, cache = model.prefill(model.embed(ids_BL), mask_BL, 3, task_B)
        said = [model.logits(state_BD)]
        for m in range(3):
            state_BD, cache = model.extend(model.embed(more_BM[:, m]), cache)
            said.append(model.logits(state_BD))
        return jnp.stack(said, axis=1)

    long_BL = np.concatenate([ids_BL, more_BM], axis=1)
    long_mask_BL = np.concatenate([mask_BL, np.ones_like(more_BM)], axis=1)
    start = functools.partial(Decoder(c).init, method=whole)
    params = sharding.init_sharded(lambda key: start(key, long_BL, long_mask_BL)["params"], jax.random.key(0))
    params = noisy(params)

    @jax.jit
    def both(params):
        read = functools.partial(Decoder(c).apply, {"params": params})
        return read(long_BL, long_mask_BL, method=whole), read(method=stepwise)

    at_once, one_by_one = both(params)
    np.testing.assert_allclose(one_by_one[:, 1:], at_once[:, -3:], atol=2e-5)
    for row in range(3):
        place = np.flatnonzero(mask_BL[row])[-1]
        np.testing.assert_allclose(one_by_one[row, 0], at_once[row, place], atol=2e-5)


def test_adapters_run_in_parallel_to_the_feed_forward_on_its_input():
    """One block by hand, whose attention adds nothing: x + feed-forward(norm x) + adapters(x)."""
    c = dataclasses.replace(LLAMA, adapters=AdapterConfig(4, 2, 2))
    x_BLD = np.random.default_rng(0).standard_normal((2, 3, c.width)).astype(np.float32)
    task_B, layer = np.array([0, 1], np.int32), (None, None)
    given = x_BLD, layer, causal_mask(np.ones((2, 3), np.int32)), None, None, task_B
    shapes = nn.unbox(jax.eval_shape(decoder.Block(c).init, jax.random.key(0), *given))["params"]
    params = noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    params["attention"]["o"]["kernel"] *= 0

    @jax.jit
    def whole_and_parts(params):
        def part(module, name, *inputs):
            return module.apply({"params": params[name]}, *inputs)

        whole, _ = decoder.Block(c).apply({"params": params}, *given)
        normed = part(RMSNorm(c.width, c.norm_eps), "norm2", x_BLD)
        fed = part(GatedMLP(c.width, c.mlp_dim, c.activation), "mlp", normed, 0.0, None)
        return whole, fed, part(RoutedAdapters(c.width, c.adapters), "adapters", x_BLD, task_B)

    got, fed, adapted = map(np.asarray, whole_and_parts(params))
    for change in (fed, adapted):
        assert np.abs(change).max() > 0.01, "a change of nothing shows nothing"
    np.testing.assert_allclose(got, x_BLD + fed + adapted, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_and_scales_the_rest_up(rate):
    x = np.ones((100, 200), np.float32)
    made = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert np.mean(made == 0) == pytest.approx(rate, abs=0.012)
    np.testing.assert_allclose(made[made != 0], 1 / (1 - rate), rtol=1e-6)
    assert made.mean() == pytest.approx(1, abs=0.05)
    assert dropout(x.astype(jnp.bfloat16), rate, jax.random.key(0)).dtype == jnp.bfloat16
    assert dropout(x, rate, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def slopes(heads: int) -> np.ndarray:
    """What a head's score grows by from one place to the next."""
    bias_BN1S = np.asarray(alibi_bias(np.arange(3)[None], heads))
    assert bias_BN1S.shape == (1, heads, 1, 3) and not bias_BN1S[..., 0].any()
    steps = np.diff(bias_BN1S[0, :, 0], axis=-1)
    np.testing.assert_allclose(steps[:, 0], steps[:, 1], rtol=1e-6)
    return steps[:, 0]


@pytest.mark.parametrize(
    ("heads", "powers"), [(1, [8]), (2, [4, 8]), (3, [4, 8, 2]), (4, [2, 4, 6, 8]), (5, [2, 4, 6, 8, 1])]
)
def test_alibi_slopes_of_few_heads_by_hand(heads, powers):
    np.testing.assert_allclose(slopes(heads), 2.0 ** -np.array(powers, np.float32), rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 20, 32])
def test_alibi_slopes_are_those_of_mpt_and_bloom_in_transformers(heads):
    torch = pytest.importorskip("torch")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    from_end = mpt.build_mpt_alibi_tensor(heads, 3).numpy().reshape(heads, 3)
    np.testing.assert_allclose(slopes(heads), from_end[:, 2] - from_end[:, 1], rtol=1e-6)
    alibi = bloom.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32).numpy()
    np.testing.assert_allclose(slopes(heads), alibi.reshape(heads, 3)[:, 1], rtol=1e-6)


def test_a_text_longer_than_the_learned_positions_is_refused():
    x_BLD, mask_BL = jnp.zeros((1, 31, GPT2.width)), jnp.ones((1, 31))
    start = functools.partial(Decoder(GPT2).init, jax.random.key(0), x_BLD, mask_BL)
    jax.eval_shape(lambda: start(1, method="prefill"))
    with pytest.raises(UserError, match="33 tokens do not fit the 32 learned positions"):
        jax.eval_shape(lambda: start(2, method="prefill"))
