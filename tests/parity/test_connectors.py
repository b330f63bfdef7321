# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl, Kosmos-2 and Frozen: each whole, its values, loss, every gradient and greedy words against torch."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
import tiny_prefix as tiny
from golden import assert_close, folders
from safetensors.numpy import load_file
from small_bridges import kosmos, language, owl, tower, transformers

torch = pytest.importorskip("torch")

from golden_tower import clip_tower
from torch.func import functional_call
from torch.nn.functional import conv2d, layer_norm, linear, scaled_dot_product_attention, silu
from torch_configs import clip_config, llama_config

from lionjax import convert
from lionjax.core import sharding
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors.perceiver import AbstractorConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B, VisualPrefixLM, VisualPrefixLMModule

NEW = 5


def frozen(draw) -> VisualPrefixLM:
    return VisualPrefixLM(
        tower(draw, eps=1e-5),
        language(draw),
        feature_layer=-1,
        keep_class_token=draw.choice([True, False]),
        projector_depth=1,
        num_prefix_tokens=draw.randint(1, 3),
        image_token_id=tiny.IMAGE_TOKEN,
        torch_names="original",
    )


# What torch makes of the same weights, under the names of the originals


def looked(query, key, value, heads):
    """Attention over heads that lie beside each other in the last axis."""
    cut = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*cut).transpose(1, 2).flatten(2)


def owl_sees(w, c: VisualPrefixLM, image):
    """mPLUG-Owl up to its language model, from the description of its code: (B, Q + 1, D)."""
    v, a = c.vision, c.resampler

    def of(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], *of(name), eps)

    x = conv2d(image, w["vision_model.embeddings.patch_embed.weight"], stride=v.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([w["vision_model.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = norm(x + w["vision_model.embeddings.position_embedding"], "vision_model.embeddings.pre_layernorm", v.norm_eps)
    for i in range(v.depth):
        at = f"vision_model.encoder.layers.{i}."
        mixed = linear(norm(x, at + "input_layernorm", v.norm_eps), *of(at + "self_attn.query_key_value"))
        query, key, value = mixed.unflatten(-1, (v.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        own = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + linear(own, *of(at + "self_attn.dense"))
        h = linear(norm(x, at + "post_attention_layernorm", v.norm_eps), *of(at + "mlp.fc1"))
        x = x + linear(h * torch.sigmoid(1.702 * h), *of(at + "mlp.fc2"))
    x = norm(x, "vision_model.post_layernorm", c.vision_norm_eps)
    query = w["query_tokens"].expand(len(x), -1, -1)
    for i in range(a.depth):
        at = f"abstractor.encoder.layers.{i}.crossattention."
        query = norm(query, at + "norm1", 1e-5)
        both = torch.cat([query, norm(x, at + "normk", 1e-5)], 1)
        asked = (linear(s, *of(f"{at}attention.{n}")) for n, s in (("query", query), ("key", both), ("value", both)))
        query = query + linear(looked(*asked, a.num_heads), *of(at + "output.out_proj"))
        h, mlp = norm(query, at + "output.norm2", 1e-5), at + "output.mlp."
        h = norm(silu(linear(h, *of(mlp + "w1"))) * linear(h, *of(mlp + "w3")), mlp + "ffn_ln", 1e-6)
        query = query + linear(h, *of(mlp + "w2"))
    words = linear(query, *of("abstractor.visual_fc"))
    return torch.cat([words, w["abstractor.vit_eos"].expand(len(words), -1, -1)], 1)


def frozen_sees(w, c: VisualPrefixLM, image):
    """transformers' CLIP, the mean of what it saw, and a linear into so many words."""
    v = c.vision
    config = clip_config(v, layer_norm_eps=v.norm_eps, hidden_act="quick_gelu")
    clip, at = transformers.CLIPVisionModel(config), "model.vision_tower.vision_tower.vision_model."
    own = {name.split("vision_model.")[-1]: name for name in clip.state_dict()}
    held = {own[n.removeprefix(at)]: x for n, x in w.items() if n.startswith(at)}
    x = functional_call(clip, held, (image,), {"output_hidden_states": True}, strict=False).hidden_states[-1]
    x = x[:, 0 if c.keep_class_token else 1 :].mean(1)
    x = linear(x, w["model.mm_projector.weight"], w["model.mm_projector.bias"])
    return x.unflatten(-1, (c.num_prefix_tokens, -1))


def llama(c: DecoderConfig):
    return transformers.LlamaForCausalLM(llama_config(c, head_dim=c.head_dim)).eval()


SYSTEMS = {"owl": (owl, owl_sees, "language_model."), "frozen": (frozen, frozen_sees, "")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_model_matches_its_torch_parts_in_logits_gradients_and_greedy_tokens(name):
    make, sees, at = SYSTEMS[name]
    seed = tiny.seed()
    draw = random.Random(seed)
    system = make(draw)
    batch = tiny.batch_of(system, draw, rows=2)
    numbers = np.random.default_rng(seed)
    params = sharding.abstract_params(system.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda leaf: (0.3 * numbers.standard_normal(leaf.shape)).astype(np.float32), params)
    names = convert.state_dict_from_params(system.weight_map(), params)
    w = {name: torch.tensor(value, requires_grad=True) for name, value in names.items()}
    words = sees(w, system, torch.tensor(batch.image_BHWC.transpose(0, 3, 1, 2).copy()))
    model = llama(system.language)
    held = {name: w[at + name] for name in model.state_dict()}
    table, total, rows, prompts = held["model.embed_tokens.weight"], [], [], []
    for row, ids in enumerate(tiny.expanded(system, batch)):
        answer = batch.target_BM[row][batch.target_mask_BM[row] > 0]
        text = table[torch.tensor([0 if t == tiny.IMAGE_TOKEN else t for t in ids])]
        place = ids.index(tiny.IMAGE_TOKEN)
        prompts.append(torch.cat([text[:place], words[row], text[place + words.shape[1] :]])[None])
        x = torch.cat([prompts[-1], table[torch.tensor(answer)][None]], 1)
        logits = functional_call(model, held, (), {"inputs_embeds": x}).logits[0, len(ids) - 1 : -1]
        rows.append(logits.detach().numpy())
        total.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer).long(), reduction="none"))
    value = torch.cat(total).mean()
    value.backward()

    tiny.assert_learns_alike(system, params, batch, rows, value, w.items(), seed)

    said = generate(
        system,
        params,
        batch,
        GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=None),
    )
    for row, x in enumerate(prompts):
        for word in np.asarray(said.ids_BM)[row]:
            with torch.no_grad():
                assert word == functional_call(model, held, (), {"inputs_embeds": x}).logits[0, -1].argmax(), seed
            x = torch.cat([x, table[int(word)][None, None]], 1)


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("mplug_owl"))
def test_vision_tower_and_abstractor_match_mplug_owl(folder):
    c, arrays = json.loads((folder / "config.json").read_text()), np.load(folder / "arrays.npz")
    v, a = c["vision"], c["abstractor"]
    system = dataclasses.replace(
        MPLUG_OWL_7B,
        vision=clip_tower(v, post_layernorm=False),
        resampler=AbstractorConfig(
            a["width"], a["layers"], a["heads"], a["mlp_width"], a["queries"], sub_ln_eps=a["layer_norm_eps"]
        ),
        language=DecoderConfig(8, a["language_width"], 1, 1, 1, a["language_width"], 8),
        vision_norm_eps=v["layer_norm_eps"],
    )
    rows = [row for row in system.weight_map() if not row.torch_keys[0].startswith("language_model.")]
    state = load_file(folder / "weights.safetensors")
    params = convert.params_from_state_dict(rows, state)
    for name, value in convert.state_dict_from_params(rows, params).items():
        np.testing.assert_array_equal(value, state[name], name)
    batch = tiny.batch_of(dataclasses.replace(system, image_token=3), random.Random(0), len(arrays["image"]))
    batch = dataclasses.replace(batch, image_BHWC=arrays["image"].transpose(0, 2, 3, 1))

    def looks(module, batch):
        seen = module.encode_image(batch)
        return module.vision_norm(seen), module.embed_image(batch, None)[:, 0]

    seen, words = VisualPrefixLMModule(system).apply({"params": params}, batch, method=looks)
    assert_close(seen, arrays["vision_output"], "vision")
    assert_close(words, arrays["abstractor_output"], "abstractor")


@pytest.mark.slow
def test_kosmos_2_matches_transformers_in_logits_gradients_and_greedy_tokens():
    seed = tiny.seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    theirs, system = kosmos(draw)
    state = {name: weight.detach().numpy() for name, weight in theirs.state_dict().items()}
    params = convert.params_from_state_dict(system.weight_map(), state)
    batch = tiny.batch_of(system, draw)
    asked = tiny.inputs(system, batch)
    places = asked["input_ids"] == tiny.IMAGE_TOKEN
    out = theirs(image_embeds_position_mask=places, **asked)
    out.loss.backward()

    def loss(params):
        return system.loss(params, batch)[0], system.logits(params, batch)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wanted = tiny.answer_logits(system, batch, out.logits.detach().numpy())
    for row, told in enumerate(wanted):
        assert_close(logits[row, : len(told)], told, f"logits, seed {seed}")
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-4), f"seed {seed}"
    grads = convert.state_dict_from_params(system.weight_map(), jax.tree.map(np.asarray, grads))
    for name, weight in theirs.named_parameters():
        norm = weight.grad.norm().item() if weight.grad is not None else 0.0
        assert np.linalg.norm(grads[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"

    said = generate(
        system,
        params,
        batch,
        GenerationConfig(max_new_tokens=NEW, eos_token_id=2, pad_token_id=0, decoder_start_token_id=None),
    )
    for row, ids in enumerate(tiny.expanded(system, batch)):
        ids = torch.tensor([ids])
        told = theirs.generate(
            pixel_values=asked["pixel_values"][row : row + 1],
            input_ids=ids,
            image_embeds_position_mask=ids == tiny.IMAGE_TOKEN,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        mine = np.asarray(said.ids_BM)[row, : int(said.length_B[row])].tolist()
        # Behind a padding token that was said, transformers counts positions otherwise.
        end = mine.index(0) if 0 in mine else len(mine)
        assert mine[:end] == told[:end], f"seed {seed}, row {row}"
