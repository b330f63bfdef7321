# SPDX-License-Identifier: Apache-2.0
"""Weights that are published in parts: LLaVA's deltas and projectors, and a BLIP-2 around OpenAI's CLIP."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from published_folders import LLAMA
from safetensors.numpy import load_file, save_file
from small_lora import random_params
from weight_files import as_torch, assert_same

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import cli, convert
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.connectors import qformer
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import vit
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.blip2_stage1 import Blip2Stage1
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

CLIP = dataclasses.replace(vit.CLIP_VIT_L, image_size=14, patch_size=7, width=16, depth=3, num_heads=2, mlp_dim=32)
TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaMA of half precision, as a folder."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": False}))
    theirs.to(torch.float16).save_pretrained(folder)
    return folder


def llava(base, words: int) -> tuple[VisualPrefixLM, dict, dict]:
    """(config, params, torch tensors) of a LLaVA on that LLaMA with so many new words; in half precision."""
    language = dataclasses.replace(convert.from_torch(base)[0], vocab=LLAMA["vocab_size"] + words)
    config = VisualPrefixLM(
        CLIP,
        language,
        feature_layer=-2,
        projector_depth=1,
        image_token_id=-200,
        prepend_image=False,
        torch_names="original",
    )
    params = random_params(config, np.float16)
    state = convert.state_dict_from_params(config.weight_map(), params)
    return config, params, state


def write(folder, config, state: dict, name: str) -> None:
    """LLaVA's config.json, a weight file, and CLIP's folder where the state has no tower."""
    whole = folder.with_name(folder.name + "_whole")
    convert.to_torch(config, convert.params_from_state_dict(config.weight_map(), state), whole)
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    torch.save(as_torch(torch, {n: w for n, w in state.items() if not n.startswith(TOWER)}), folder / name)
    (folder / "clip").mkdir()
    clip = {n.removeprefix(TOWER): w for n, w in state.items() if n.startswith(TOWER)}
    save_file(clip, folder / "clip" / "model.safetensors")
    (folder / "clip" / "config.json").write_text('{"model_type": "clip_vision_model"}')


@pytest.mark.parametrize("words", [0, 3])
def test_a_delta_is_added_to_its_base_as_pytorch_adds_it(base, tmp_path, words):
    config, _, state = llava(base, words)
    write(tmp_path / "llava-7b-delta-v0", config, state, "pytorch_model.bin")
    with pytest.raises(UserError, match="looks like a delta of a LLaMA by its name; give the LLaMA as --base"):
        convert.convert(tmp_path / "llava-7b-delta-v0", tmp_path / "ours", "jax")
    paths = [str(tmp_path / "llava-7b-delta-v0"), str(tmp_path / "ours")]
    cli.main(["convert", *paths, "--to", "jax", "--base", str(base)])
    made, params = convert.load_params(tmp_path / "ours")
    assert made == config
    want = as_torch(torch, state)
    for name, tensor in as_torch(torch, load_file(base / "model.safetensors")).items():
        want[name][: len(tensor)] += tensor  # LLaVA's own script
    assert_same(convert.state_dict_from_params(config.weight_map(), params), {n: w.numpy() for n, w in want.items()})
    if words:
        table = params["language"]["embedding"]["table"][-words:]
        np.testing.assert_array_equal(table, state["model.embed_tokens.weight"][-words:])


def test_tensors_that_are_not_a_delta_of_the_base_are_refused_by_name(base, tmp_path):
    config, _, state = llava(base, 0)
    write(tmp_path / "mine", config, state, "pytorch_model.bin")
    other = load_file(base / "model.safetensors")
    other["model.layers.9.mlp.up_proj.weight"] = other.pop("model.layers.1.mlp.up_proj.weight")
    other["model.norm.weight"] = other["model.norm.weight"][:3, None]
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    with pytest.raises(UserError) as told:
        convert.convert(tmp_path / "mine", tmp_path / "ours", "jax", base=tmp_path / "other")
    for text in (
        "base has no tensor 'model.layers.1.mlp.up_proj.weight'",
        "delta has no tensor 'model.layers.9.mlp.up_proj.weight'",
        "'model.norm.weight' is (24,) in the delta and (3, 1) in the base",
    ):
        assert text in str(told.value)
    with pytest.raises(UserError, match="work with --to jax only"):
        convert.convert(tmp_path / "mine", tmp_path / "ours", "torch", base=base)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("words, whole", [(0, False), (2, False), (2, True)])
def test_a_projector_file_is_combined_with_the_llama_and_clip_beside_it(base, tmp_path, words, whole):
    config, params, state = llava(base, words)
    llama = load_file(base / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    mean = llama[head].mean(0, dtype=np.float32).astype(np.float16)
    state |= {n: w for n, w in llama.items() if n not in (table, head)}
    new = state[table][len(llama[table]) :]
    state[table] = np.concatenate([llama[table], new])
    state[head] = np.concatenate([llama[head], np.tile(mean, (words, 1))])
    write(tmp_path / "pretrained", config, state, "unused.bin")
    (tmp_path / "pretrained" / "unused.bin").unlink()
    trained = {n: w for n, w in state.items() if "mm_projector" in n}
    trained |= {table: state[table] if whole else new} if words else {}
    torch.save(as_torch(torch, trained), tmp_path / "pretrained" / "mm_projector.bin")
    with pytest.raises(UserError, match="0 subfolders with a language model; put the folder of its llama"):
        convert.from_torch(tmp_path / "pretrained")
    (tmp_path / "pretrained" / "vicuna").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "pretrained" / "vicuna" / file).write_bytes((base / file).read_bytes())
    made, params = convert.from_torch(tmp_path / "pretrained")
    assert made == config
    assert_same(convert.state_dict_from_params(config.weight_map(), params), state)


@pytest.mark.slow
def test_a_blip2_with_openai_clip_is_converted_without_the_last_block(tmp_path, monkeypatch):
    t5 = T5Config(40, 24, 6, 4, 20, 2, 2, 8, activation="gelu")
    bridge = qformer.QFormerConfig(16, 2, 2, 24, 4, 2, 1024, 30, 12, use_text_input=False)
    clip = dataclasses.replace(CLIP, width=1024, heads=16, mlp_dim=8, depth=2)
    monkeypatch.setattr(vit, "CLIP_VIT_L", dataclasses.replace(clip, depth=3))
    monkeypatch.setattr(qformer, "QFormerConfig", lambda: bridge)
    config = VisualPrefixLM(
        dataclasses.replace(clip, post_layernorm=False),
        t5,
        bridge,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=1e-5,
        projector_depth=1,
        image_token_id=None,
        torch_names="original",
    )
    params = random_params(config, ml_dtypes.bfloat16)
    state = convert.state_dict_from_params(config.weight_map(), params)
    folder = tmp_path / "parts"
    folder.mkdir()
    tower = {n.removeprefix("visual_encoder."): w for n, w in state.items() if n.startswith("visual_encoder.")}
    # The file holds a last block, a norm and a matrix that nothing runs.
    last = {n.replace(".1.", ".23."): w for n, w in tower.items() if ".resblocks.1." in n}
    norms = {f"ln_post.{x}": tower[f"ln_pre.{x}"] for x in ("weight", "bias")}
    torch.save(as_torch(torch, tower | last | norms | {"proj": np.ones((3, 2), np.float32)}), folder / "clip_vit_L.pth")
    trained = {n: w for n, w in state.items() if not n.startswith(("visual_encoder.", "t5_model."))}
    torch.save({"model": as_torch(torch, trained)}, folder / "blip2_pretrained_flant5xl_vitL.pth")
    plain = dataclasses.replace(t5, activation="gelu_tanh")
    convert.to_torch(plain, params["language"], folder / "t5")
    coverage = convert.convert(folder, tmp_path / "ours", "jax")
    assert set(coverage.ignored) == {f"visual_encoder.{n}" for n in (*last, *norms, "proj")}
    monkeypatch.undo()
    made, twice = convert.load_params(tmp_path / "ours")
    assert made == config
    assert_same(trees.flatten(twice), trees.flatten(params))
    (folder / "clip_vit_L.pth").unlink()
    with pytest.raises(UserError, match="and clip_vit_L.pth, unless"):
        convert.from_torch(folder)
    # Out again under the same names.
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    names = load_file(tmp_path / "back" / "model.safetensors")
    assert_same({n: names[n] for n in state}, state)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "lionjax_blip2"


@pytest.mark.slow
def test_blip2_stage1_round_trips_with_its_vision_tower(tmp_path, monkeypatch):
    bridge = qformer.QFormerConfig(16, 2, 2, 24, 4, 2, 24, 30, 12)
    tower = ViTConfig(image_size=28, patch_size=14, width=24, depth=3, num_heads=4, mlp_dim=40)
    config = Blip2Stage1(tower, bridge)
    params = random_params(config, np.float16)
    state = convert.state_dict_from_params(config.weight_map(), params)
    folder = tmp_path / "parts"
    folder.mkdir()
    eva = {n.removeprefix("visual_encoder."): w for n, w in state.items() if n.startswith("visual_encoder.")}
    trained = {n: w for n, w in state.items() if not n.startswith("visual_encoder.")}
    torch.save(as_torch(torch, eva), folder / "eva_vit_g.pth")
    torch.save({"model": as_torch(torch, trained)}, folder / "blip2_pretrained.pth")
    with monkeypatch.context() as patch:
        patch.setattr(vit, "EVA_VIT_G", tower)
        patch.setattr(qformer, "QFormerConfig", lambda: bridge)
        convert.convert(folder, tmp_path / "ours", "jax")
    made, twice = convert.load_params(tmp_path / "ours")
    assert made == config
    assert_same(trees.flatten(twice), trees.flatten(params))
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), state)
    (tmp_path / "back" / "lionjax.json").unlink()
    assert convert.from_torch(tmp_path / "back")[0] == config
