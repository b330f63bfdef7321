# SPDX-License-Identifier: Apache-2.0
"""Flamingo: its parts against what OpenFlamingo computes, the whole against its rules, its gates and its own cache."""

import dataclasses
import json
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_prefix as tiny
from golden import assert_close, folders
from safetensors.numpy import load_file
from torch_configs import llama_config

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.core.weight_map import with_prefix
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors.perceiver import Resampler, ResamplerConfig, resampler_weight_map
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.flamingo import Flamingo, FlamingoModule
from lionjax.nn.adapters import GatedCrossAttentionBlock, GatedCrossAttentionConfig, gated_cross_attention_weight_map

IMAGE = 40


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("flamingo"))
def test_resampler_and_gated_blocks_match_openflamingo(folder):
    c, arrays = json.loads((folder / "config.json").read_text()), np.load(folder / "arrays.npz")
    p, g = c["perceiver"], c["gated"]
    sizes = ResamplerConfig(
        p["width"], p["depth"], p["heads"], p["head_width"], p["ff_mult"] * p["width"], p["latents"], p["max_frames"]
    )
    looks = GatedCrossAttentionConfig(1, g["visual_width"], g["heads"], g["head_width"], g["ff_mult"] * g["width"])
    rows = (
        *with_prefix("perceiver.", "resampler/", resampler_weight_map(sizes)),
        *(
            row
            for name in ("gated", "gated_all")
            for row in with_prefix(f"{name}.", f"{name}/", gated_cross_attention_weight_map(looks))
        ),
    )
    state = load_file(folder / "weights.safetensors")
    params = convert.params_from_state_dict(rows, state)
    for name, value in convert.state_dict_from_params(rows, params).items():
        np.testing.assert_array_equal(value, state[name], name)
    words = Resampler(sizes).apply({"params": params["resampler"]}, arrays["media_BTFPD"])
    assert_close(words, arrays["resampler_output"], "resampler")

    rows_, media, count = len(words), words.shape[1], words.shape[2]
    source = words.reshape(rows_, media * count, -1)
    time_BL1 = np.cumsum(arrays["media_locations"], axis=1)[..., None]
    time_S = np.arange(media * count) // count + 1
    last_BL1 = np.broadcast_to(time_BL1[:, -1:], time_BL1.shape)
    for what, name, seen, real in (
        ("gated_immediate", "gated", time_BL1 == time_S, time_BL1[..., 0] > 0),
        ("gated_all_previous", "gated_all", time_BL1 >= time_S, np.ones(time_BL1.shape[:2], bool)),
        ("gated_immediate_cached_media", "gated", last_BL1 == time_S, last_BL1[..., 0] > 0),
    ):
        block = GatedCrossAttentionBlock(g["width"], looks)
        made, _ = block.apply({"params": params[name]}, arrays["text_hidden"], (source, seen, real))
        assert_close(made, arrays[what], what)


def small(every: int, rule: str = "immediate", **language) -> Flamingo:
    text = DecoderConfig(
        48,
        16,
        2 * every,
        2,
        2,
        8,
        24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cross_attention=GatedCrossAttentionConfig(every, 8, 2, 4, 20),
    )
    return Flamingo(
        ViTConfig(14, 7, 8, 1, 2, 12),
        ResamplerConfig(8, 1, 2, 4, 12, 3),
        dataclasses.replace(text, **language),
        IMAGE,
        rule,
    )


def batch_of(seed: int = 0, answers=(3, 2)) -> Batch:
    """Two rows with two pictures each; the first has words before its first picture."""
    numbers = np.random.default_rng(seed)
    prompt = np.array([[1, 5, IMAGE, 6, 7, IMAGE, 8, 9], [IMAGE, 10, 11, IMAGE, 12, 0, 0, 0]], np.int32)
    target = numbers.integers(3, IMAGE, (2, 3)).astype(np.int32)
    mask = (np.arange(3) < np.array(answers)[:, None]).astype(np.int32)
    images = numbers.standard_normal((2, 2, 14, 14, 3)).astype(np.float32)
    nothing = np.zeros((2, 1), np.int32)
    rows = np.zeros(2, np.int32)
    return Batch(images, prompt, (prompt > 0).astype(np.int32), nothing, nothing, target, mask, mask, rows, rows)


def weights(system):
    """Random ones throughout, so that the gates stand open."""
    numbers = np.random.default_rng(0)
    shapes = sharding.abstract_params(system.init, jax.random.key(0), batch_of())
    return jax.tree.map(lambda leaf: (0.3 * numbers.standard_normal(leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=[(1, "immediate"), (2, "all_previous")], ids=str)
def made(request):
    system = small(*request.param)
    return system, weights(system)


@pytest.mark.slow
def test_gates_start_at_zero_and_leave_the_language_model_unchanged(made):
    system, params = made
    batch, c = batch_of(), system.language
    first = GatedCrossAttentionBlock(4, GatedCrossAttentionConfig(1, 4, 1, 4, 4))
    media = np.ones((1, 2, 4), np.float32), np.ones((1, 3, 2), bool), np.ones((1, 3), bool)
    begun = trees.flatten(nn.meta.unbox(first.init(jax.random.key(0), np.ones((1, 3, 4), np.float32), media)["params"]))
    assert not begun["gate"].any() and not begun["mlp_gate"].any() and begun["attention/o/kernel"].any()
    flat, every = trees.flatten(params["language"]), c.cross.every
    for name in ("gate", "mlp_gate"):
        flat[f"groups/cross/{name}"] = np.zeros_like(flat[f"groups/cross/{name}"])
    params = params | {"language": trees.unflatten(flat)}
    plain = {path: leaf for path, leaf in flat.items() if not path.startswith("groups/")}
    for path, last in flat.items():
        if path.startswith("groups/block/"):
            name = path.removeprefix("groups/block/")
            parts = [last[:, None]] if every == 1 else [flat[f"groups/before/{name}"], last[:, None]]
            whole = jnp.concatenate(parts, axis=1)
            plain[f"blocks/{name}"] = whole.reshape(-1, *whole.shape[2:])
    alone = Decoder(dataclasses.replace(c, cross_attention=None))
    ids = np.concatenate([batch.prompt_BL, batch.target_BM], axis=1)
    mask = np.concatenate([batch.prompt_mask_BL, batch.target_mask_BM], axis=1)

    def logits(module):
        return module.logits(module(module.embed(ids), mask))

    wanted = alone.apply({"params": trees.unflatten(plain)}, method=logits)
    got = jax.jit(system.logits)(params, batch)
    np.testing.assert_allclose(got[0, 1:], wanted[0, 8:10], atol=1e-5)
    np.testing.assert_allclose(got[0, 0], wanted[0, 7], atol=1e-5)
    np.testing.assert_allclose(got[1, 0], wanted[1, 4], atol=1e-5)


@pytest.mark.slow
def test_a_token_attends_only_to_the_images_that_media_attention_allows(made):
    """By gradients: words before the first picture feel none; by the immediate rule the second
    hides the first. Words that look at each other pass on what they felt; where they do not,
    each feels its own pictures alone.
    """
    system, params = made
    batch = batch_of()
    alone = trees.flatten(params)
    for path, leaf in alone.items():
        if path.endswith("attention/o/kernel") and path.startswith("language/groups/"):
            alone[path] = leaf * ("/cross/" in path)
    alone = trees.unflatten(alone)

    def felt(image, place, params):
        """States at one place of row 0 by pixels of each picture."""

        def states(module, batch):
            mask = batch.prompt_mask_BL.astype(bool)
            media = module.resample_images(batch, batch.prompt_BL, mask)
            return module.language(module.language.embed(batch.prompt_BL, media[0].dtype), mask, None, None, media)

        shown = dataclasses.replace(batch, image_BHWC=image)
        got = FlamingoModule(system).apply({"params": params}, shown, method=states)
        return (got[0] * (jnp.arange(8) == place)[:, None]).sum()

    grad = jax.jit(jax.grad(felt))

    def feels(params) -> dict[int, list[bool]]:
        """Which of the two pictures the word at a place feels."""
        image = jnp.asarray(batch.image_BHWC)
        return {place: (np.abs(grad(image, place, params)[0]).max((1, 2, 3)) > 0).tolist() for place in (1, 2, 4, 5, 7)}

    first, second, both, none = [True, False], [False, True], [True, True], [False, False]
    if system.media_attention == "immediate":
        assert feels(alone) == {1: none, 2: first, 4: first, 5: second, 7: second}
        # A later word feels the first picture by way of the words between.
        assert feels(params) == {1: none, 2: first, 4: first, 5: both, 7: both}
    else:
        # OpenFlamingo's own: a word before all pictures sees them alike.
        assert feels(alone) == {1: both, 2: first, 4: first, 5: both, 7: both}
        assert feels(params) == {1: both, 2: both, 4: both, 5: both, 7: both}


@pytest.mark.slow
def test_cached_decoding_matches_a_full_forward_pass(made):
    """Pictures are looked at once, their keys and values kept."""
    system, params = made
    batch = batch_of()
    how = GenerationConfig(
        max_new_tokens=4, eos_token_id=2, pad_token_id=0, decoder_start_token_id=None, output_logprobs=True
    )
    said = generate(system, params, batch, how)
    ids = np.asarray(said.ids_BM)
    whole = dataclasses.replace(batch, target_BM=ids, target_mask_BM=np.ones_like(ids), loss_mask_BM=np.ones_like(ids))
    logits = np.asarray(jax.jit(system.logits)(params, whole))
    for row, length in enumerate(np.asarray(said.length_B)):
        np.testing.assert_array_equal(logits[row, :length].argmax(-1), ids[row, :length])
        wanted = jax.nn.log_softmax(logits[row, :length])[np.arange(length), ids[row, :length]]
        np.testing.assert_allclose(np.asarray(said.logprob_BM)[row, :length], wanted, atol=1e-4)


@pytest.mark.slow
def test_only_new_embedding_rows_are_trained_and_the_image_token_is_never_generated():
    system = small(1, num_frozen_embeddings=IMAGE, tied=True)
    batch = batch_of()
    params = weights(system)
    grads = jax.jit(jax.grad(lambda p, b: system.loss(p, b)[0]))(params, batch)
    table = np.abs(grads["language"]["embedding"]["table"]).max(1)
    assert not table[:IMAGE].any() and table[IMAGE] > 0
    for name in ("gate", "mlp_gate"):
        assert np.abs(grads["language"]["groups"]["cross"][name]).min() > 0
    shown = dataclasses.replace(batch, target_BM=np.where(np.arange(3) == 1, IMAGE, batch.target_BM))
    _, metrics = jax.jit(system.loss)(params, shown)
    assert metrics["weight"] == 3


@pytest.mark.slow
def test_weights_round_trip_under_openflamingo_names():
    tower = ViTConfig(14, 7, 8, 1, 2, 12, attention_biases="qkvo", patch_bias=False, pre_layernorm=True)
    system = dataclasses.replace(small(2), vision=tower)
    params = weights(system)
    state = convert.state_dict_from_params(system.weight_map(), params)
    assert "lang_encoder.old_decoder_blocks.2.self_attn.q_proj.weight" in state
    assert "lang_encoder.gated_cross_attn_layers.3.attn_gate" in state
    assert "lang_encoder.gated_cross_attn_layers.2.attn_gate" not in state
    back = trees.flatten(convert.params_from_state_dict(system.weight_map(), state))
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(back[path], leaf, path)


def theirs_reads(w, c: Flamingo, ids: list[int], seen_KPD):
    """Logits (L, V) of one row, from the description of OpenFlamingo's code around transformers' LLaMA."""
    import torch
    import transformers
    from torch.nn.functional import gelu, layer_norm, linear

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(at, x, source, heads, mask=None):
        query = linear(x, w[f"{at}.to_q.weight"])
        key, value = linear(source, w[f"{at}.to_kv.weight"]).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in (query, key, value))
        score = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            score = score.masked_fill(~mask, -1e9)
        share = score.softmax(-1)
        if mask is not None and c.media_attention == "immediate":
            share = share * mask.any(-1, keepdim=True)  # a token before all pictures sees nothing, else all alike
        return linear((share @ value).transpose(-3, -2).flatten(-2), w[f"{at}.to_out.weight"])

    def feed(at, x):
        return linear(gelu(linear(norm(x, f"{at}.0"), w[f"{at}.1.weight"])), w[f"{at}.3.weight"])

    words = w["perceiver.latents"].expand(len(seen_KPD), -1, -1)
    for i in range(c.resampler.depth):
        at = f"perceiver.layers.{i}"
        own = norm(words, f"{at}.0.norm_latents")
        both = torch.cat([norm(seen_KPD, f"{at}.0.norm_media"), own], 1)
        words = words + attention(f"{at}.0", own, both, c.resampler.num_heads)
        words = words + feed(f"{at}.1", words)
    media = norm(words, "perceiver.norm").flatten(0, 1)[None]
    time = torch.tensor([token == IMAGE for token in ids]).cumsum(0)[:, None]
    mine = torch.arange(media.shape[1])[None] // c.resampler.num_query_tokens + 1
    mask = (time == mine if c.media_attention == "immediate" else time >= mine)[None]

    d, at = c.language, "lang_encoder."
    model = transformers.LlamaForCausalLM(llama_config(d, head_dim=d.head_dim)).eval()
    for i, layer in enumerate(model.model.layers):
        if (i + 1) % d.cross_attention.every_n_layers:
            continue

        def look(_, args, kwargs, here=f"{at}gated_cross_attn_layers.{i}"):
            x = args[0]
            change = attention(f"{here}.attn", norm(x, f"{here}.attn.norm"), media, d.cross_attention.num_heads, mask)
            x = x + w[f"{here}.attn_gate"].tanh() * change
            return (x + w[f"{here}.ff_gate"].tanh() * feed(f"{here}.ff", x), *args[1:]), kwargs

        layer.register_forward_pre_hook(look, with_kwargs=True)
    held = {name: w[at + name.replace("model.layers.", "old_decoder_blocks.")] for name in model.state_dict()}
    return torch.func.functional_call(model, held, (torch.tensor([ids]),)).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "rule"), [(2, "immediate"), (1, "all_previous")])
def test_flamingo_matches_openflamingos_parts_in_logits_gradients_and_greedy_tokens(every, rule):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seed = tiny.seed()
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    heads, head = draw.choice([2, 3]), draw.choice([4, 6])
    tower = ViTConfig(
        14, 7, draw.randint(6, 12) * 2, 1, 2, 12, attention_biases="qkvo", patch_bias=False, pre_layernorm=True
    )
    system = Flamingo(
        tower,
        ResamplerConfig(tower.width, draw.randint(1, 3), heads, head, draw.randint(12, 20), draw.randint(2, 5)),
        DecoderConfig(
            draw.randint(44, 60),
            4 * head,
            every * draw.randint(1, 2),
            4,
            draw.choice([1, 2, 4]),
            head,
            draw.randint(16, 30),
            cross_attention=GatedCrossAttentionConfig(every, tower.width, heads, head, draw.randint(12, 20)),
        ),
        IMAGE,
        rule,
    )
    batch = batch_of(seed)
    features = numbers.standard_normal((2, 2, 4, tower.width)).astype(np.float32)
    batch = dataclasses.replace(batch, features=features)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(system.init(jax.random.key(0), batch_of())))
    params = jax.tree.map(lambda leaf: (0.3 * numbers.standard_normal(leaf.shape)).astype(np.float32), shapes)
    w = {
        name: torch.tensor(leaf, requires_grad=True)
        for name, leaf in convert.state_dict_from_params(system.weight_map(), params).items()
    }
    total, rows, prompts = [], [], []
    for row in range(2):
        ids = batch.prompt_BL[row][batch.prompt_mask_BL[row] > 0].tolist()
        answer = batch.target_BM[row][batch.target_mask_BM[row] > 0].tolist()
        logits = theirs_reads(w, system, ids + answer, torch.tensor(features[row]))[len(ids) - 1 : -1]
        prompts.append(ids)
        rows.append(logits.detach().numpy())
        total.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    value = torch.cat(total).mean()
    value.backward()

    grads = tiny.assert_learns_alike(system, params, batch, rows, value, w.items(), seed)
    assert any(np.linalg.norm(grads[name]) for name in w if name.endswith("attn_gate"))

    said = generate(
        system,
        params,
        batch,
        GenerationConfig(max_new_tokens=4, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=None),
    )
    for row, ids in enumerate(prompts):
        for word in np.asarray(said.ids_BM)[row]:
            with torch.no_grad():
                assert word == theirs_reads(w, system, ids, torch.tensor(features[row]))[-1].argmax(), f"seed {seed}"
            ids = [*ids, int(word)]


@pytest.mark.slow
def test_mpt_matches_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lionjax.models.language import decoder
    from lionjax.models.language.decoder_weights import mpt_weight_map

    seed = tiny.seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads = 3  # no power of two, whose slopes are those that are easily wrong
    head, layers = draw.choice([4, 6]), draw.randint(1, 3)
    width = heads * head
    config = transformers.MptConfig(
        d_model=width, n_heads=heads, n_layers=layers, vocab_size=50, max_seq_len=32, layer_norm_epsilon=1e-5
    )
    theirs = tiny.shaken(transformers.MptForCausalLM(config))
    c = dataclasses.replace(
        decoder.MPT_7B, vocab=50, width=width, layers=layers, heads=heads, kv_heads=heads, head=head, mlp_dim=4 * width
    )
    state = {name: w.detach().numpy() for name, w in theirs.state_dict().items()}
    params = convert.params_from_state_dict(mpt_weight_map(c), state)
    ids = np.random.default_rng(seed).integers(2, 50, (2, 9))
    out = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids))
    out.loss.backward()

    def loss(params):
        def run(module):
            return module.logits(module(module.embed(ids), np.ones_like(ids)))

        logits = Decoder(c).apply({"params": params}, method=run)
        shares = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(shares, ids[:, 1:, None], -1).mean(), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(logits, out.logits.detach().numpy(), f"logits, seed {seed}")
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-5)
    mine = convert.state_dict_from_params(mpt_weight_map(c), jax.tree.map(np.asarray, grads))
    for name, weight in theirs.named_parameters():
        wanted = weight.grad.norm().item()
        assert np.linalg.norm(mine[name]) == pytest.approx(wanted, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"

    def read(module):
        state_BD, cache = module.prefill(module.embed(ids[:, :6]), np.ones((2, 6)), 3)
        for place in range(6, 9):
            state_BD, cache = module.extend(module.embed(ids[:, place]), cache)
        return module.logits(state_BD)

    assert_close(Decoder(c).apply({"params": params}, method=read), np.asarray(logits[:, -1]), f"cache, seed {seed}")
