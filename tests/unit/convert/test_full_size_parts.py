# SPDX-License-Identifier: Apache-2.0
"""Full-size published models of one part, and NExT-Chat-7B, against every name and shape of their files; no weights."""

import dataclasses

import numpy as np
import pytest
from full_size import Blank, lion_release
from full_size_parts import KINDS, blank, check, openai_clip_release

from lionjax.convert.formats.detect import format_of_config
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.language import bert, decoder, t5
from lionjax.models.vision import sam_encoder, vit
from lionjax.models.vlm.nextchat import NextChat

GAUSSIAN = 2 * 128  # SAM's random matrix, which its users do not count because it does not learn
PARTS = {  # config, numbers as counted by those who use it (None: not looked up)
    "flan-t5-xl": (t5.FLAN_T5_XL, 2_849_757_184),
    "flan-t5-xxl": (t5.FLAN_T5_XXL, 11_135_332_352),
    "vicuna-7b": (decoder.VICUNA_7B, 6_738_415_616),
    "vicuna-13b": (decoder.VICUNA_13B, 13_015_864_320),
    "smollm2-135m": (decoder.SMOLLM2_135M, 134_515_008),
    "opt-2.7b": (decoder.OPT_2_7B, 2_651_596_800),
    "gpt2": (decoder.GPT2, 124_439_808),
    "bert-base-uncased": (bert.BERT_BASE, 109_482_240),
    "all-MiniLM-L6-v2": (bert.MINILM_L6, 22_713_216),
    "clip-vit-large-patch14-336": (vit.CLIP_VIT_L, 303_507_456),
    "clip-vit-large-patch14": (dataclasses.replace(vit.CLIP_VIT_L, image_size=224), 303_179_776),
    "sam-vit-huge": (sam_encoder.SAM_VIT_H, 641_090_608 + GAUSSIAN),
    "sam-vit-base": (sam_encoder.SAM_VIT_B, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_the_full_size_table_of_a_part_covers_every_tensor_of_transformers_and_every_leaf(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, published = PARTS[name]
    kind = format_of_config(config)
    settings = kind.config_to_hf(config)
    model = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        theirs = model(model.config_class.from_dict(settings)).state_dict()
    front = (
        kind.base_model_prefix
        if kind.base_model_prefix and not any(n.startswith(kind.base_model_prefix) for n in theirs)
        else ""
    )
    state = Blank({front + n: (tuple(w.shape), np.float16) for n, w in theirs.items()})
    check(kind, config, state)
    assert published is None or trees.count_params(kind.abstract_params(config)) == published
    tied = {n for row in kind.weight_map(config) if row.tied_keys for n in (*row.torch_keys, *row.tied_keys)}
    missing = next(n for n in sorted(state) if n.endswith(".weight") and n not in tied)
    with pytest.raises(UserError, match="finds no tensor"):
        check(kind, config, {n: w for n, w in state.items() if n != missing})


def sam_release() -> dict:
    """Every tensor of sam_vit_h_4b8939.pth, written down from the file: name -> shape."""
    forms: dict[str, tuple] = {}

    def put(name, *shape):
        forms[name] = shape

    def dense(name, outputs, *inputs):
        put(name + ".weight", outputs, *inputs)
        put(name + ".bias", outputs)

    encoder, prompts, masks = "image_encoder.", "prompt_encoder.", "mask_decoder."
    put(encoder + "pos_embed", 1, 64, 64, 1280)
    dense(encoder + "patch_embed.proj", 1280, 3, 16, 16)
    for i in range(32):
        block, side = f"{encoder}blocks.{i}.", 127 if i in (7, 15, 23, 31) else 27
        dense(block + "norm1", 1280)
        dense(block + "norm2", 1280)
        dense(block + "attn.qkv", 3840, 1280)
        dense(block + "attn.proj", 1280, 1280)
        put(block + "attn.rel_pos_h", side, 80)
        put(block + "attn.rel_pos_w", side, 80)
        dense(block + "mlp.lin1", 5120, 1280)
        dense(block + "mlp.lin2", 1280, 5120)
    put(encoder + "neck.0.weight", 256, 1280, 1, 1)
    dense(encoder + "neck.1", 256)
    put(encoder + "neck.2.weight", 256, 256, 3, 3)
    dense(encoder + "neck.3", 256)
    put(prompts + "pe_layer.positional_encoding_gaussian_matrix", 2, 128)
    for name in (*(f"point_embeddings.{k}" for k in range(4)), "not_a_point_embed", "no_mask_embed"):
        put(f"{prompts}{name}.weight", 1, 256)
    dense(prompts + "mask_downscaling.0", 4, 1, 2, 2)
    dense(prompts + "mask_downscaling.1", 4)
    dense(prompts + "mask_downscaling.3", 16, 4, 2, 2)
    dense(prompts + "mask_downscaling.4", 16)
    dense(prompts + "mask_downscaling.6", 256, 16, 1, 1)
    put(masks + "iou_token.weight", 1, 256)
    put(masks + "mask_tokens.weight", 4, 256)
    attentions = [
        f"layers.{k}.{x}" for k in range(2) for x in ("cross_attn_token_to_image", "cross_attn_image_to_token")
    ]
    for name in (*attentions, "final_attn_token_to_image", "layers.0.self_attn", "layers.1.self_attn"):
        inner = 256 if "self_attn" in name else 128
        for letter in "qkv":
            dense(f"{masks}transformer.{name}.{letter}_proj", inner, 256)
        dense(f"{masks}transformer.{name}.out_proj", 256, inner)
    for k in range(2):
        for j in range(1, 5):
            dense(f"{masks}transformer.layers.{k}.norm{j}", 256)
        dense(f"{masks}transformer.layers.{k}.mlp.lin1", 2048, 256)
        dense(f"{masks}transformer.layers.{k}.mlp.lin2", 256, 2048)
    dense(masks + "transformer.norm_final_attn", 256)
    put(masks + "output_upscaling.0.weight", 256, 64, 2, 2)
    put(masks + "output_upscaling.0.bias", 64)
    dense(masks + "output_upscaling.1", 64)
    put(masks + "output_upscaling.3.weight", 64, 32, 2, 2)
    put(masks + "output_upscaling.3.bias", 32)
    for name, out in (*((f"output_hypernetworks_mlps.{k}", 32) for k in range(4)), ("iou_prediction_head", 4)):
        for layer, size in enumerate((256, 256, out)):
            dense(f"{masks}{name}.layers.{layer}", size, 256)
    return forms


def nextchat_release() -> dict:
    """Every tensor of NExT-Chat-7B's four .bin files, written down from them: name -> shape."""
    forms = {f"sam.model.{name}": shape for name, shape in sam_release().items()}

    def dense(name, outputs, *inputs):
        forms[name + ".weight"] = (outputs, *inputs)
        forms[name + ".bias"] = (outputs,)

    forms["model.embed_tokens.weight"] = forms["lm_head.weight"] = (32005, 4096)
    forms["model.norm.weight"] = (4096,)
    for i in range(32):
        layer = f"model.layers.{i}."
        forms |= {f"{layer}self_attn.{x}_proj.weight": (4096, 4096) for x in "qkvo"}
        forms |= {f"{layer}mlp.{x}_proj.weight": (11008, 4096) for x in ("gate", "up")}
        forms |= {f"{layer}mlp.down_proj.weight": (4096, 11008)}
        forms |= {f"{layer}{x}_layernorm.weight": (4096,) for x in ("input", "post_attention")}
        forms[f"{layer}self_attn.rotary_emb.inv_freq"] = (64,)
    dense("model.mm_projector.0", 4096, 1024)
    dense("model.mm_projector.2", 4096, 4096)
    tower = "model.vision_tower.vision_model."
    forms[tower + "embeddings.class_embedding"] = (1024,)
    forms[tower + "embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    forms[tower + "embeddings.position_embedding.weight"] = (577, 1024)
    forms[tower + "embeddings.position_ids"] = (1, 577)
    for name in ("pre_layrnorm", "post_layernorm"):
        dense(tower + name, 1024)
    for i in range(24):
        layer = f"{tower}encoder.layers.{i}."
        for x in ("q", "k", "v", "out"):
            dense(f"{layer}self_attn.{x}_proj", 1024, 1024)
        dense(layer + "layer_norm1", 1024)
        dense(layer + "layer_norm2", 1024)
        dense(layer + "mlp.fc1", 4096, 1024)
        dense(layer + "mlp.fc2", 1024, 4096)
    dense("loc_encoder.0", 2048, 4)
    dense("loc_encoder.2", 4096, 2048)
    dense("loc_decoder.0", 2048, 4096)
    dense("loc_decoder.2", 4, 2048)
    dense("seg_prompt_mlp.0", 4096, 4096)
    dense("seg_prompt_mlp.2", 1024, 4096)
    return forms


@pytest.mark.slow
def test_the_full_size_nextchat_table_covers_every_tensor_of_the_release_and_every_leaf_of_the_model():
    kind, state = KINDS["nextchat"], blank(nextchat_release())
    check(kind, NextChat(), state)
    said = {name for name in state if name.endswith(("inv_freq", "position_ids"))}
    assert sum(int(np.prod(state[n].shape)) for n in state if n not in said) == 7_741_812_788 + GAUSSIAN
    del state["model.layers.31.mlp.down_proj.weight"]
    with pytest.raises(UserError, match="'model.layers.31.mlp.down_proj.weight'"):
        check(kind, NextChat(), state)


def test_the_full_size_table_of_metas_sam_covers_every_tensor_of_its_file():
    forms = sam_release() | {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}
    check(KINDS["segment_anything"], sam_encoder.SAM_VIT_H, blank(forms))
    assert sum(int(np.prod(shape)) for shape in sam_release().values()) == 641_090_608 + GAUSSIAN


def test_the_full_size_table_of_eva_covers_every_tensor_of_its_file():
    state = lion_release(2048)
    state = {n.removeprefix("visual_encoder."): form for n, form in state.items() if n.startswith("visual_encoder.")}
    check(KINDS["eva"], vit.EVA_VIT_G, Blank(state))


def test_the_full_size_table_of_clip_under_openais_names_covers_every_tensor():
    kind, state = KINDS["openai_clip"], blank(openai_clip_release())
    check(kind, kind.infer_from_keys(kind.config_from_hf({}), state.keys()), state)
