# SPDX-License-Identifier: Apache-2.0
"""Folders of LLaVA, BLIP-2 and InstructBLIP: every spelling of their names comes in, and what goes out others load."""

import dataclasses
import json
import random
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_prefix as tiny
from lavis_names import as_lavis
from safetensors.numpy import load_file, save_file
from weight_files import as_torch, assert_same

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.convert.mapping.plan import plan_state_dict
from lionjax.core import params as trees
from lionjax.core.types import UserError

BF16 = ml_dtypes.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.SYSTEMS)
def test_a_model_round_trips_loads_without_missing_keys_and_gives_the_same_logits(tmp_path, name):
    seed = tiny.seed()
    draw = random.Random(seed)
    model = tiny.theirs(name, draw).to(random.Random(seed).choice([torch.float32, torch.bfloat16]))
    model.save_pretrained(tmp_path / "theirs")
    coverage = convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    assert not coverage.ignored and not coverage.nan_tensors, f"seed {seed}"
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch", shard_bytes=20_000)
    # Both are read from files, because reading keeps some parts in float32 whatever the dtype.
    back, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True, dtype=model.dtype)
    model = type(model).from_pretrained(tmp_path / "theirs", dtype=model.dtype)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (seed, info)
    one, other = model.state_dict(), back.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), f"seed {seed}"
    system, params = convert.load_params(tmp_path / "ours")
    asked = tiny.inputs(system, tiny.batch_of(system, draw))
    asked["pixel_values"] = asked["pixel_values"].to(model.dtype)
    with torch.no_grad():
        assert torch.equal(model(**asked).logits, back.eval()(**asked).logits), f"seed {seed}"
    for known in (True, False):  # with our own config beside the weights, and by config.json alone
        again, twice = convert.from_torch(tmp_path / "back")
        assert again == system, f"seed {seed}"
        assert_same(trees.flatten(twice), trees.flatten(params))
        if known:
            (tmp_path / "back" / detect.CONFIG_FILE).unlink()


@pytest.mark.slow
def test_a_blip2_with_a_trained_tower_is_converted_without_key_biases(tmp_path):
    model = tiny.theirs("blip2_opt", random.Random(5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                third = len(parameter) // 3
                parameter[third : 2 * third] = torch.randn(third)
    model.save_pretrained(tmp_path / "theirs")
    report = convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    layers = model.config.vision_config.num_hidden_layers
    assert len(report.ignored) == layers and "biases on keys, which change no output" in str(report)
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    back = type(model).from_pretrained(tmp_path / "back", dtype=model.dtype).eval()
    name = next(name for name in model.state_dict() if name.endswith("layers.0.self_attn.qkv.bias"))
    assert not back.state_dict()[name].equal(model.state_dict()[name])
    system, _ = convert.load_params(tmp_path / "ours")
    asked = tiny.inputs(system, tiny.batch_of(system, random.Random(5)))
    with torch.no_grad():
        torch.testing.assert_close(back(**asked).logits, model(**asked).logits, atol=1e-5, rtol=1e-5)


def renamed(folder, into, spell):
    """A copy of a folder whose tensors are called otherwise."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    save_file({spell(name): tensor for name, tensor in tensors.items()}, into / "model.safetensors")
    return into


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder of a LLaVA in bfloat16, with the names that this version of transformers writes."""
    folder = tmp_path_factory.mktemp("llava") / "saved"
    model = tiny.theirs("llava", random.Random(3)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder, model


def test_all_key_prefixes_of_llava_give_the_same_parameters(llava, tmp_path):
    saved, model = llava
    config, params = convert.from_torch(saved)
    names = load_file(saved / "model.safetensors").keys()
    assert any(name.startswith("vision_tower.embeddings.") for name in names), "of version 5"
    hub = renamed(
        saved, tmp_path / "hub", lambda n: re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n)
    )
    memory = tmp_path / "memory"
    shutil.copytree(saved, memory)
    in_memory = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.startswith("model.language_model.layers.") for name in in_memory)
    (memory / "model.safetensors").unlink()
    torch.save(in_memory, memory / "pytorch_model.bin")
    wrapped = [
        renamed(saved, tmp_path / prefix, lambda n, p=prefix: p + n) for prefix in ("module.", "model._orig_mod.")
    ]
    lightning = tmp_path / "lightning"
    shutil.copytree(memory, lightning)
    state = {f"model.{name}": tensor for name, tensor in in_memory.items()}
    torch.save({"state_dict": state, "epoch": 1}, lightning / "pytorch_model.bin")
    for folder in (hub, memory, *wrapped, lightning):
        again, twice = convert.from_torch(folder)
        assert again == config
        assert_same(trees.flatten(twice), trees.flatten(params))


def test_one_tensor_under_two_key_prefixes_is_refused(llava, tmp_path):
    saved, _ = llava
    folder = renamed(saved, tmp_path / "twice", lambda name: name)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="are the same parameter under different names"):
        convert.from_torch(folder)


def as_llavas_own(state: dict) -> dict:
    """Tensors of transformers' LLaVA, as version 5 saves them, under LLaVA's own names."""
    tower = "model.vision_tower.vision_tower.vision_model."
    pairs = (
        (r"^vision_tower\.(vision_model\.)?", tower),
        (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^language_model\.", ""),
    )
    made = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        made[name] = tensor
    return made


def test_a_llava_under_its_original_names_round_trips(llava, tmp_path):
    saved, _ = llava
    config, params = convert.from_torch(saved)
    own = dataclasses.replace(config, names="original", image_token=-200)
    convert.to_torch(own, params, tmp_path / "own")
    names = load_file(tmp_path / "own" / "model.safetensors")
    assert {"model.mm_projector.2.bias", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"} <= names.keys()
    assert_same(names, as_llavas_own(load_file(saved / "model.safetensors")))
    settings = json.loads((tmp_path / "own" / "config.json").read_text())
    assert settings["mm_projector_type"] == "mlp2x_gelu" and "text_config" not in settings
    (tmp_path / "own" / detect.CONFIG_FILE).unlink()
    again, twice = convert.from_torch(tmp_path / "own")
    assert again == own
    assert_same(trees.flatten(twice), trees.flatten(params))
    # The first releases hold no tower; CLIP lies in a folder of its own.
    tower = "model.vision_tower.vision_tower."
    clip = {name.removeprefix(tower): w for name, w in names.items() if name.startswith(tower)}
    save_file({n: w for n, w in names.items() if not n.startswith(tower)}, tmp_path / "own" / "model.safetensors")
    with pytest.raises(UserError, match="has 0 subfolders with a vision tower"):
        convert.from_torch(tmp_path / "own")
    (tmp_path / "own" / "clip").mkdir()
    save_file(clip, tmp_path / "own" / "clip" / "model.safetensors")
    (tmp_path / "own" / "clip" / "config.json").write_text('{"model_type": "clip_vision_model"}')
    assert_same(trees.flatten(convert.from_torch(tmp_path / "own")[1]), trees.flatten(params))


def test_a_llava_that_transformers_cannot_hold_is_refused_in_its_format(llava, tmp_path):
    config, params = convert.from_torch(llava[0])
    with pytest.raises(UserError, match="image_token_id is -200; .* or set the model's torch_names to 'original'"):
        convert.to_torch(dataclasses.replace(config, image_token=-200), params, tmp_path / "out")
    with pytest.raises(ValueError, match="projector_depth is 1 .* set torch_names to 'original'"):
        dataclasses.replace(config, projector_depth=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias false"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\]; it must be an integer"),
        ({"text_config": {"model_type": "mamba"}}, "text_config.model_type 'mamba'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type 'siglip_vision_model'"),
        ({"text_config": {"rms_eps": 1}}, "the field text_config.rms_eps 1, which lionjax does not know for a llama"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 in its config.json; only '-"),
        ({"vision_feature_layer": 0}, "vision_feature_layer 0"),
    ],
)
def test_settings_that_lionjax_does_not_compute_are_refused(llava, tmp_path, change, problem):
    folder = shutil.copytree(llava[0], tmp_path / "other")
    settings = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=problem):
        convert.from_torch(folder)


LAVIS = [("blip2_opt", "opt"), ("blip2_vicuna", "llama"), ("instructblip_t5", "t5"), ("instructblip_vicuna", "llm")]


@pytest.mark.parametrize("name, word", LAVIS)
def test_a_lavis_checkpoint_is_combined_with_its_vision_tower_and_language_model(tmp_path, monkeypatch, name, word):
    from lionjax.models.connectors import qformer
    from lionjax.models.vision import vit

    model = tiny.theirs(name, random.Random(5))
    model.save_pretrained(tmp_path / "theirs")
    config, params = convert.from_torch(tmp_path / "theirs")
    monkeypatch.setattr(vit, "EVA_VIT_G", config.vision)
    monkeypatch.setattr(qformer, "QFormerConfig", lambda: config.qformer)
    state = as_lavis(load_file(tmp_path / "theirs" / "model.safetensors"), word)
    folder = tmp_path / "lavis"
    folder.mkdir()
    model.language_model.save_pretrained(folder / "language")
    eva = {n.removeprefix("visual_encoder."): w for n, w in state.items() if n.startswith("visual_encoder.")}
    trained = {n: w for n, w in state.items() if not n.startswith(("visual_encoder.", f"{word}_model."))}
    trained["Qformer.bert.embeddings.position_ids"] = np.arange(config.qformer.positions)[None]
    torch.save(as_torch(torch, eva), folder / "eva_vit_g.pth")
    torch.save({"model": as_torch(torch, trained), "optimizer": {"step": 3}}, folder / "blip2_trained.pth")
    made, twice = convert.from_torch(folder)
    assert made.names == "original" and made.vision_norm_eps == 1e-5 and made.language == config.language
    assert_same(trees.flatten(twice), trees.flatten(params))
    monkeypatch.undo()
    convert.to_torch(made, twice, tmp_path / "back")
    names = load_file(tmp_path / "back" / "model.safetensors")
    own = {n: w for n, w in names.items() if n not in state}
    assert not state.keys() - names.keys() and all(names[n].tobytes() == w.tobytes() for n, w in state.items())
    assert all(n.endswith(("position_ids", "embed_tokens.weight", "lm_head.weight")) for n in own), sorted(own)
    assert_same(trees.flatten(convert.from_torch(tmp_path / "back")[1]), trees.flatten(params))
    (folder / "eva_vit_g.pth").unlink()
    with pytest.raises(UserError, match="needs the parts of a BLIP-2 or InstructBLIP"):
        convert.from_torch(folder)


def test_a_minigpt4_checkpoint_is_combined_with_its_blip2(tmp_path, monkeypatch):
    from lionjax.models.connectors import qformer
    from lionjax.models.vision import vit

    model = tiny.theirs("blip2_vicuna", random.Random(5))
    model.save_pretrained(tmp_path / "theirs")
    config, params = convert.from_torch(tmp_path / "theirs")
    monkeypatch.setattr(vit, "EVA_VIT_G", config.vision)
    monkeypatch.setattr(qformer, "QFormerConfig", lambda: config.qformer)
    state = as_lavis(load_file(tmp_path / "theirs" / "model.safetensors"), "llama")
    folder = tmp_path / "parts"
    folder.mkdir()
    model.language_model.save_pretrained(folder / "vicuna")
    built = {n: w for n, w in state.items() if not n.startswith(("llama_model.", "llama_proj."))}
    built |= {"t5_proj.weight": np.ones((3, 4), np.float32)}
    own = {n: w for n, w in state.items() if n.startswith("llama_proj.")} | {"query_tokens": state["query_tokens"]}
    torch.save({"model": as_torch(torch, built)}, folder / "blip2_pretrained_flant5xxl.pth")
    torch.save({"model": as_torch(torch, own)}, folder / "pretrained_minigpt4_7b.pth")
    coverage = convert.convert(folder, tmp_path / "ours", "jax")
    assert coverage.ignored == {
        "t5_proj.weight": "of another language model",
        "query_tokens": "pretrained_minigpt4_7b.pth has its own",
    }
    torch.save({"model": as_torch(torch, built)}, folder / "blip2_another.pth")
    with pytest.raises(UserError, match="no config.json with a model_type"):
        convert.from_torch(folder)
    monkeypatch.undo()
    assert_same(trees.flatten(convert.load_params(tmp_path / "ours")[1]), trees.flatten(params))


def test_non_finite_key_biases_are_refused(tmp_path):
    model = tiny.theirs("blip2_opt", random.Random(5))
    with torch.no_grad():
        bias = model.vision_model.encoder.layers[1].self_attn.qkv.bias
        bias[len(bias) // 2] = torch.inf
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="layers.1.self_attn.qkv.bias.*must be finite"):
        convert.from_torch(tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_padding_rows_are_zero_never_generated_and_never_exported(tmp_path, tied):
    from lionjax.models.language.decoder import Decoder, DecoderConfig
    from lionjax.models.vlm import visual_prefix_weights

    plain = DecoderConfig(
        vocab_size=51, width=16, depth=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=20, tie_embeddings=tied
    )
    wide = dataclasses.replace(plain, pad_vocab_to_multiple_of=64)
    numbers = np.random.default_rng(0)
    kind = detect.format_of_config(plain)
    state = {
        name: numbers.standard_normal(tensor.shape).astype(BF16)
        for name, tensor in plan_state_dict(
            kind.weight_map(plain), trees.flatten(kind.abstract_params(plain))
        ).output_specs.items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else state["lm_head.weight"]
    one, other = (
        convert.params_from_state_dict(visual_prefix_weights.language_weight_map(c), state) for c in (plain, wide)
    )
    assert other["embedding"]["table"].shape == (64, 16) and not other["embedding"]["table"][51:].any()
    assert_same(convert.state_dict_from_params(visual_prefix_weights.language_weight_map(wide), other), state)
    ids = np.array([[3, 50, 7]])

    def run(c, params):
        return Decoder(c).apply({"params": params}, ids, method=lambda m, x: m.logits(m(m.embed(x), x > 0)))

    one, other = (jax.tree.map(lambda w: w.astype(np.float32), params) for params in (one, other))
    few, many = run(plain, one), run(wide, other)
    # Products of unequal widths are summed in another order on some processors.
    np.testing.assert_allclose(few, many[..., :51], rtol=1e-5, atol=1e-5)
    assert many.shape[-1] == 64 and (many[..., 51:] < -1e29).all()
    grads = jax.grad(lambda params: jax.nn.log_softmax(run(wide, params))[..., 5].sum())(other)
    assert not np.asarray(grads["embedding"]["table"])[51:].any()
