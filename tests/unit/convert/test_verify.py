# SPDX-License-Identifier: Apache-2.0
"""Both models on the same inputs, stage by stage: they agree, and where they do not it is said where."""

import dataclasses
import random

import jax
import numpy as np
import pytest
import small_clip
import tiny_prefix
from published_folders import BERT, PUBLISHED
from small_sam import SAM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.convert.verify import compare
from lionjax.core import params as trees
from lionjax.core.types import UserError

MODELS = PUBLISHED | {
    "bert": ("BertModel", "BertConfig", BERT),
    "sam": ("SamModel", "SamConfig", SAM),
    "swin": (
        "SwinModel",
        "SwinConfig",
        dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4),
    ),
}
STAGES = {  # some that must be among those compared, and how many layers they have
    "t5": {
        "encoder.block.{i}.layer.0.SelfAttention.q": 3,
        "decoder.block.{i}.layer.1.EncDecAttention.k": 2,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": 1,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": 1,
    },
    "llama": {"model.layers.{i}.self_attn.k_proj": 3, "model.norm": 1, "lm_head": 1},
    "llama, tied": {"model.layers.{i}.mlp.down_proj": 3},
    "opt": {"model.decoder.layers.{i}.fc1": 2, "model.decoder.layers.{i}.final_layer_norm": 2},
    "gpt2": {"transformer.h.{i}.attn.c_attn": 2, "transformer.h.{i}.mlp.c_proj": 2},
    "clip": {"vision_model.embeddings.patch_embedding": 1, "vision_model.encoder.layers.{i}.self_attn.out_proj": 2},
    "bert": {"encoder.layer.{i}.attention.self.value": 3, "pooler.dense": 1, "embeddings.word_embeddings": 1},
    "swin": {"swin.layernorm": 1},
    "sam": {"vision_encoder.layers.{2i+1<2}.attn.qkv": 2, "vision_encoder.neck.conv2": 1},
}


def saved(name: str, folder):
    model, settings, sizes = MODELS[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, model)(getattr(transformers, settings)(**sizes))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.1 * torch.randn_like(weight)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_verification_compares_most_stages_and_all_agree(tmp_path, name):
    folder = saved(name, tmp_path / "theirs")
    found = compare.verify(*convert.from_torch(folder), folder)
    assert found.all_close, str(found)
    assert max(stage.relative_diff for stage in found.module_diffs) < 1e-4, str(found)
    layers = {stage.name: stage.num_layers for stage in found.module_diffs}
    assert STAGES[name].items() <= layers.items(), str(found)
    assert len(found.not_compared) < len(found.module_diffs) / 2, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_clip.clip_model, small_clip.siglip_model])
def test_both_towers_match_transformers_at_every_module(tmp_path, make):
    torch.manual_seed(0)
    make(np.random.default_rng(0)).save_pretrained(tmp_path)
    found = compare.verify(*convert.from_torch(tmp_path), tmp_path)
    assert found.all_close, str(found)
    names = {stage.name for stage in found.module_diffs}
    assert {"logits_per_image", "text_model.encoder.layers.{i}.mlp.fc1", "vision_model.post_layernorm"} < names
    assert len(found.not_compared) < len(found.module_diffs) / 2, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_prefix.SYSTEMS)
def test_vision_language_models_match_transformers_at_every_module(tmp_path, name):
    seed = tiny_prefix.seed()
    tiny_prefix.theirs(name, random.Random(seed)).save_pretrained(tmp_path)
    found = compare.verify(*convert.from_torch(tmp_path), tmp_path)
    assert found.all_close, f"seed {seed}\n{found}"
    parts = {stage.name.split(".")[0] for stage in found.module_diffs}
    assert {"language_model", "logits"} < parts and len(found.module_diffs) > 20, f"seed {seed}\n{found}"
    assert len(found.not_compared) < len(found.module_diffs) / 2, f"seed {seed}\n{found}"


def test_verification_names_the_stage_and_layer_that_differ(tmp_path):
    folder = saved("llama", tmp_path / "theirs")
    config, params = convert.from_torch(folder)
    kernel = params["blocks"]["mlp"]["up"]["kernel"].copy()
    kernel[1, 3, 4] += 1
    params["blocks"]["mlp"]["up"]["kernel"] = kernel
    found = compare.verify(config, params, folder)
    parted = [stage for stage in found.module_diffs if stage.relative_diff > compare.RELATIVE_TOLERANCE]
    assert not found.all_close and parted
    before = {stage.name: stage for stage in found.module_diffs}
    assert before["model.embed_tokens"].max_abs_diff == 0
    assert before["model.layers.{i}.mlp.up_proj"].worst_module in (
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
    )
    assert "<- differs most in model.layers." in str(found)


@pytest.mark.slow
def test_verification_compares_a_merged_lora_with_the_unmerged_model(tmp_path):
    from small_lora import CONFIG, random_params

    params = random_params(CONFIG)
    convert.to_torch(CONFIG, params, tmp_path / "merged", merge_lora=True)
    found = compare.verify(CONFIG, params, tmp_path / "merged")
    assert found.all_close, str(found)
    convert.to_torch(CONFIG, params, tmp_path / "apart")
    with pytest.raises(UserError, match="would leave out the LoRA of .*; convert with --merge-lora to verify"):
        compare.verify(CONFIG, params, tmp_path / "apart")


@pytest.mark.slow
def test_verification_says_what_transformers_does_not_have(tmp_path):
    from published_folders import tiny_lion
    from small_lora import random_params

    lion = dataclasses.replace(tiny_lion(), visual_input="AGGREGATOR")
    params = jax.tree.map(np.asarray, random_params(lion))
    convert.to_torch(lion, params, tmp_path / "torch")
    with pytest.raises(UserError, match="transformers has no class to run a lion"):
        compare.verify(lion, params, tmp_path / "torch")


def systems_without_a_class() -> dict:
    from published_folders import tiny_lion
    from small_grounding_dino import TINY as detector
    from small_nextchat import TINY as nextchat
    from small_ram import TINY as ram

    # On one position torch's group norm needs two numbers a group, and transformers two layers to tie their heads.
    detector = dataclasses.replace(detector, width=64, decoder_depth=2)
    systems = {"lion": tiny_lion(), "nextchat": nextchat, "ram": ram, "eva": tiny_lion().vision}
    return systems | {"groundingdino": detector}


PARTS = {  # some that must be compared, how many layers they have, and something that has nothing beside it
    "lion": (
        {
            "vision_model.encoder.layers.{i}.self_attn.qkv": 3,
            "qformer.encoder.layer.{2i+0<2}.intermediate_query.dense": 2,
            "qformer.encoder.layer.{2i+1<2}.attention.attention.key": 2,
            "language_model.decoder.block.{i}.layer.2.DenseReluDense.wo": 2,
            "language_projection": 1,
        },
        "fusion_adapter",
    ),
    "nextchat": (
        {
            "language_model.model.layers.{i}.self_attn.q_proj": 2,
            "multi_modal_projector.linear_1": 1,
            "vision_encoder.neck.conv2": 1,
        },
        "loc_encoder",
    ),
    "ram": ({"swin.layernorm": 1}, "tagging_head"),
    "groundingdino": (
        {
            "model.decoder.layers.{i}.fc1": 2,
            "model.encoder.layers.{i}.fusion_layer.attn.out_text_proj": 1,
            "model.backbone.conv_encoder.model.hidden_states_norms.stage4": 1,
        },
        "bert.pooler",
    ),
    "eva": ({"vision_model.encoder.layers.{i}.mlp.fc2": 3}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_model_without_a_transformers_class_is_verified_part_by_part(tmp_path, name):
    from small_lora import random_params

    system = systems_without_a_class()[name]
    params = random_params(system)
    convert.to_torch(system, params, tmp_path / "torch")
    found = compare.verify(system, params, tmp_path / "torch")
    assert found.all_close, str(found)
    layers = {stage.name.partition(": ")[2]: stage.num_layers for stage in found.module_diffs}
    wanted, alone = PARTS[name]
    assert wanted.items() <= layers.items(), str(found)
    assert alone is None or any(part.startswith(alone) for part in found.not_compared), str(found)
    # A kernel that was turned on its way would be noticed.
    flat = trees.flatten(params)
    path = next(p for p in flat if p.endswith("mlp/up/kernel") and not p.startswith(("queries", "aggregator")))
    turned = trees.unflatten(flat | {path: flat[path][..., ::-1, :]})
    assert not compare.verify(system, turned, tmp_path / "torch").all_close
