# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO's files: the released ones at full size by name and shape, and a tiny one on its way in and out."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from full_size_parts import KINDS, blank, check
from safetensors.numpy import load_file
from small_grounding_dino import TINY
from small_lora import random_params

from lionjax import convert
from lionjax.convert.formats.detect import format_of_config
from lionjax.convert.formats.hf_vision import SWIN_KEY_PATTERNS
from lionjax.core.types import UserError
from lionjax.models.language.bert import BERT_BASE
from lionjax.models.vision import grounding_dino
from lionjax.models.vision.grounding_dino_weights import original_weight_map

HF = dict(inverse_sigmoid_eps=1e-5, look_forward_twice=False, dropout=0.1)
RELEASES = {  # width, depths and window of the backbone, and the config
    "groundingdino_swint_ogc.pth": (96, (2, 2, 6, 2), 7, grounding_dino.GROUNDING_DINO_SWIN_T),
    "groundingdino_swinb_cogcoor.pth": (128, (2, 2, 18, 2), 12, grounding_dino.GROUNDING_DINO_SWIN_B),
}


def release(width: int, depths, window: int) -> dict:
    """Every tensor of a released file, written down from the original's modules: name -> shape."""
    forms = {"label_enc.weight": (2001, 256), "bert.embeddings.position_ids": (1, 512)}

    def dense(name, outputs, *inputs):
        forms[f"{name}.weight"] = (outputs, *inputs)
        forms[f"{name}.bias"] = (outputs,)

    def mlp(name, *sizes):
        for n, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            dense(f"{name}.layers.{n}", outputs, inputs)

    def attention(name):
        forms[f"{name}.in_proj_weight"], forms[f"{name}.in_proj_bias"] = (768, 256), (768,)
        dense(f"{name}.out_proj", 256, 256)

    def deformable(name):
        for part, outputs in (("sampling_offsets", 256), ("attention_weights", 128)):
            dense(f"{name}.{part}", outputs, 256)
        for part in ("value_proj", "output_proj"):
            dense(f"{name}.{part}", 256, 256)

    def layer(name, mlp_dim, *norms):
        dense(f"{name}.linear1", mlp_dim, 256)
        dense(f"{name}.linear2", 256, mlp_dim)
        for norm in norms:
            dense(f"{name}.{norm}", 256)

    dense("backbone.0.patch_embed.proj", width, 3, 4, 4)
    dense("backbone.0.patch_embed.norm", width)
    for s, depth in enumerate(depths):
        size, heads = width << s, (width // 32) << s
        for b in range(depth):
            block = f"backbone.0.layers.{s}.blocks.{b}."
            forms[f"{block}attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            forms[f"{block}attn.relative_position_index"] = (window**2, window**2)
            for part, shape in (("attn.qkv", (3 * size, size)), ("attn.proj", (size, size)), ("norm1", (size,))):
                dense(block + part, *shape)
            for part, shape in (("mlp.fc1", (4 * size, size)), ("mlp.fc2", (size, 4 * size)), ("norm2", (size,))):
                dense(block + part, *shape)
        if s < 3:
            forms[f"backbone.0.layers.{s}.downsample.reduction.weight"] = (2 * size, 4 * size)
            dense(f"backbone.0.layers.{s}.downsample.norm", 4 * size)
        if s:
            dense(f"backbone.0.norm{s}", size)
            dense(f"input_proj.{s - 1}.0", 256, size, 1, 1)
    dense("input_proj.3.0", 256, 8 * width, 3, 3)
    for level in range(4):
        dense(f"input_proj.{level}.1", 256)
    for part, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        forms[f"bert.embeddings.{part}_embeddings.weight"] = (rows, 768)
    dense("bert.embeddings.LayerNorm", 768)
    dense("bert.pooler.dense", 768, 768)
    for i in range(12):
        name = f"bert.encoder.layer.{i}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{name}attention.{part}", 768, 768)
        dense(f"{name}intermediate.dense", 3072, 768)
        dense(f"{name}output.dense", 768, 3072)
        dense(f"{name}attention.output.LayerNorm", 768)
        dense(f"{name}output.LayerNorm", 768)
    dense("feat_map", 256, 768)
    forms["transformer.level_embed"], forms["transformer.tgt_embed.weight"] = (4, 256), (900, 256)
    for i in range(6):
        name = f"transformer.encoder.layers.{i}"
        deformable(f"{name}.self_attn")
        layer(name, 2048, "norm1", "norm2")
        name = f"transformer.encoder.text_layers.{i}"
        attention(f"{name}.self_attn")
        layer(name, 1024, "norm1", "norm2")
        name = f"transformer.encoder.fusion_layers.{i}."
        forms[f"{name}gamma_v"] = forms[f"{name}gamma_l"] = (256,)
        for x in "vl":
            dense(f"{name}layer_norm_{x}", 256)
            dense(f"{name}attn.{x}_proj", 1024, 256)
            dense(f"{name}attn.values_{x}_proj", 1024, 256)
            dense(f"{name}attn.out_{x}_proj", 256, 1024)
        name = f"transformer.decoder.layers.{i}"
        attention(f"{name}.self_attn")
        attention(f"{name}.ca_text")
        deformable(f"{name}.cross_attn")
        layer(name, 2048, "norm1", "norm2", "norm3", "catext_norm")
        mlp(f"bbox_embed.{i}", 256, 256, 256, 4)
        mlp(f"transformer.decoder.bbox_embed.{i}", 256, 256, 256, 4)
    dense("transformer.decoder.norm", 256)
    mlp("transformer.decoder.ref_point_head", 512, 256, 256)
    dense("transformer.enc_output", 256, 256)
    dense("transformer.enc_output_norm", 256)
    mlp("transformer.enc_out_bbox_embed", 256, 256, 256, 4)
    return forms


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_the_full_size_table_of_a_release_covers_every_tensor_of_its_file_and_every_leaf(name):
    *sizes, config = RELEASES[name]
    kind, state = KINDS["groundingdino"], blank(release(*sizes))
    for tensor in state:
        if tensor.endswith("relative_position_index"):
            state[tensor] = state[tensor].astype(np.int64)
    assert kind.infer_from_keys(kind.config_from_hf({}), state.keys()) == config and format_of_config(config) == kind
    check(kind, config, state)
    del state["transformer.encoder.layers.5.self_attn.value_proj.bias"]
    with pytest.raises(UserError, match="'transformer.encoder.layers.5.self_attn.value_proj.bias'"):
        check(kind, config, state)


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for *_, config in RELEASES.values()], ids=["tiny", "base"])
def test_the_full_size_table_of_a_hugging_face_folder_covers_every_tensor_and_every_leaf(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(config, text=dataclasses.replace(BERT_BASE, pooler=False), **HF)
    kind = format_of_config(config)
    assert kind.name == "grounding-dino" and kind.config_from_hf(kind.config_to_hf(config)) == config
    settings = transformers.GroundingDinoConfig.from_dict(kind.config_to_hf(config))
    with torch.device("meta"):
        theirs = transformers.GroundingDinoForObjectDetection(settings).state_dict()
    shapes = {}
    for name, tensor in theirs.items():  # names in memory -> names in files
        for pattern, new in SWIN_KEY_PATTERNS if ".conv_encoder." in name else ():
            name = re.sub(pattern, new, name)
        name = re.sub(r"attention\.relative_position_bias\.", "attention.self.", name)
        shapes[name.replace("model.swin.embed", "model.embed").replace("model.swin.enc", "model.enc")] = tensor.shape
    check(kind, config, blank({name: tuple(shape) for name, shape in shapes.items()}))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_the_original_code_goes_in_and_out_with_the_same_bits(tmp_path, monkeypatch, prefix):
    torch = pytest.importorskip("torch")
    params = random_params(TINY)
    state = convert.state_dict_from_params(original_weight_map(TINY), params)
    more = {"label_enc.weight": np.ones((3, 4), np.float32), "bert.embeddings.position_ids": np.arange(4)[None]}
    tensors = {prefix + name: torch.from_numpy(np.array(tensor)) for name, tensor in (state | more).items()}
    file = tmp_path / "groundingdino_swint_ogc.pth"
    torch.save({"model": tensors, "epoch": 5}, file)
    (tmp_path / "vocab.txt").write_text("[PAD]")
    monkeypatch.setattr(grounding_dino, "GROUNDING_DINO_SWIN_T", TINY)
    report = convert.convert(file, tmp_path / "jax", "jax")
    assert report.format_name == "groundingdino" and set(report.ignored) == {*more, "epoch"}
    monkeypatch.undo()  # the sizes now stand in lionjax.json
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    back = load_file(tmp_path / "torch" / "model.safetensors")
    assert back.keys() == state.keys() and all(back[name].tobytes() == state[name].tobytes() for name in state)
    assert json.loads((tmp_path / "torch" / "config.json").read_text())["model_type"] == "lionjax_groundingdino"
    assert (tmp_path / "torch" / "vocab.txt").read_text() == "[PAD]"
    config, again = convert.from_torch(tmp_path / "torch")
    assert config == TINY and jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_box_heads_that_differ_between_layers_are_refused():
    c = dataclasses.replace(TINY, decoder_depth=2)
    state = convert.state_dict_from_params(original_weight_map(c), random_params(c))
    state["bbox_embed.1.layers.2.bias"] = state["bbox_embed.1.layers.2.bias"] + 1
    with pytest.raises(UserError, match="'bbox_embed.1.layers.2.bias'"):
        convert.params_from_state_dict(original_weight_map(c), state)


@pytest.mark.parametrize(
    "field, problem",
    [
        ({"decoder_bbox_embed_share": False}, "decoder_bbox_embed_share false in its config.json; only true"),
        ({"decoder_ffn_dim": 64}, "decoder_ffn_dim 64; only 2048, as encoder_ffn_dim, is supported"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_config.model_type 'resnet'"),
        ({"backbone_config": {"out_indices": [0, 1]}}, "backbone_config.out_indices"),
        ({"text_config": {"model_type": "roberta"}}, "text_config.model_type 'roberta'"),
    ],
)
def test_a_config_that_computes_something_else_is_refused_by_the_field(field, problem):
    with pytest.raises(UserError, match=problem):
        KINDS["grounding-dino"].config_from_hf(field)
