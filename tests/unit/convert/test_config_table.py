# SPDX-License-Identifier: Apache-2.0
"""Tables of config.json fields: what is computed, what is refused by name, and that exported configs are read again."""

import dataclasses
import json

import numpy as np
import pytest

from lionjax.convert.formats import detect, hf_vlm, openflamingo
from lionjax.convert.formats.bert import BERT
from lionjax.convert.formats.config_fields import ACTIVATIONS, HF_ACTIVATIONS, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable
from lionjax.convert.formats.hf_language import GPT2, LLAMA, OPT, T5
from lionjax.convert.formats.hf_rope import rope_from_hf, rope_to_hf
from lionjax.core import config as configs
from lionjax.core.types import UserError
from lionjax.models.language import decoder, t5
from lionjax.models.language.bert import BertConfig
from lionjax.models.vision import sam_encoder, swin, vit
from lionjax.models.vlm import visual_prefix
from lionjax.models.vlm.nextchat import NextChat
from lionjax.nn import layers
from lionjax.nn.rope import RopeScaling, rope_frequencies

TABLE = ConfigTable(
    ("toy",),
    ConfigFields({"width": "n_embd", "depth": "n_layer"}, {"n_embd": 8, "n_layer": 2}, activation="act"),
    {"act": "relu", "window": 4, "scale": None},
    fixed={"pre_norm": (True,), "window": (4, 8, None)},
    nullable=("window",),
    inert=("dropout",),
    parts=("tower",),
    aliases={"hidden_size": "n_embd"},
)


def test_a_table_fills_in_defaults_and_reads_other_spellings():
    settings = TABLE.read({"hidden_size": 16, "dropout": 0.5, "torch_dtype": "float16", "tower": {"a": 1}})
    expected = {"n_embd": 16, "n_layer": 2, "act": "relu", "window": 4, "scale": None, "tower": {"a": 1}}
    assert settings == expected
    assert TABLE.read_fields(settings) == {"width": 16, "depth": 2, "activation": "relu"}
    assert TABLE.read({"n_embd": 16, "hidden_size": 16, "window": None})["window"] is None
    assert TABLE.read(None)["n_embd"] == 8


@pytest.mark.parametrize(
    "hf_config, problem",
    [
        ({"depht": 3}, "the field part.depht 3, which lionjax does not know for a toy; remove the field"),
        ({"pre_norm": False}, "part.pre_norm false in its config.json; only true is supported"),
        ({"window": 5}, "part.window 5 in its config.json; only 4 or 8 or null is supported"),
        ({"act": "mish"}, "part.act 'mish' in its config.json; only 'gelu' or "),
        ({"act": None}, "part.act null in its config.json; only 'gelu' or "),
        ({"n_layer": "2"}, "part.n_layer '2'; it must be an integer"),
        ({"n_layer": None}, "part.n_layer null; it must be an integer"),
        ({"n_layer": True}, "part.n_layer true; it must be an integer"),
        ({"n_embd": 16, "hidden_size": 32}, "part.hidden_size 32 and part.n_embd 16, which are the same setting"),
        ({"model_type": "other"}, "part.model_type 'other' in its config.json; only 'toy' is supported"),
        ({"pruned_heads": {"0": [1]}}, "part.pruned_heads "),
        ({"add_cross_attention": True}, "part.add_cross_attention true"),
        ([1], r"part \[1\]; it must be a JSON object"),
    ],
)
def test_what_is_not_computed_is_refused_with_its_path(hf_config, problem):
    with pytest.raises(UserError, match=problem):
        TABLE.read(hf_config, "part")


T5_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CONFIG_READERS = ("swin", "sam", "kosmos2", "mplug_owl", "grounding-dino", "clip_model", "siglip")
LYRICS = {"text_config": {"model_type": "llama"}, "detection_config": {}, "ram_config": {}}
LYRICS["qformer_config"] = {"detection_encoder_hidden_size": 260}
LISA = {"architectures": ["LISAForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14"}
READERS = [
    *[(fmt, "blip-2", LYRICS) for fmt in detect.FORMATS if fmt.name in ("lyrics", "lyrics_stage1")],
    *[(fmt, name, {}) for fmt in (LLAMA, OPT, GPT2, BERT) for name in fmt.model_types if name != "mistral"],
    *[(fmt, fmt.model_types[0], {}) for fmt in detect.FORMATS if fmt.name in CONFIG_READERS],
    *[(fmt, name, {}) for fmt in detect.FORMATS if fmt.name == "clip" for name in fmt.model_types],
    *[(fmt, fmt.model_types[-1], {"text_config": {}}) for fmt in hf_vlm.VLM_FORMATS if fmt.name != "llava"],
    (LLAMA, "mistral", {"sliding_window": None}),
    (T5, "t5", T5_GATED),
    (hf_vlm.LLAVA, "llava", {"text_config": {}}),
    (hf_vlm.LLAVA, "llava_llama", {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}),
    *[(fmt, "nextchat", {}) for fmt in detect.FORMATS if fmt.name == "nextchat"],
    *[(fmt, "llava", LISA) for fmt in detect.FORMATS if fmt.name == "lisa"],
]


@pytest.mark.parametrize("fmt, model_type, hf_config", READERS, ids=[name for _, name, _ in READERS])
def test_every_reader_refuses_an_unknown_field_at_every_level(fmt, model_type, hf_config):
    hf_config = {"model_type": model_type} | hf_config
    fmt.config_from_hf(hf_config)
    with pytest.raises(UserError, match="the field unheard_of 1, which lionjax does not know"):
        fmt.config_from_hf(hf_config | {"unheard_of": 1})
    parts = {"clip": ["vision"], "sam": ["vision", "prompt_encoder", "mask_decoder"], "kosmos2": ["text", "vision"]}
    parts |= {
        "grounding-dino": ["backbone", "text"],
        "mplug_owl": ["text", "vision", "visual_abstractor"],
    } | dict.fromkeys(("blip2", "instructblip"), ["text", "vision", "qformer"])
    parts |= dict.fromkeys(("clip_model", "siglip"), ["text", "vision"])
    parts |= {"lyrics_stage1": ["vision", "qformer", "detection", "ram"]}  # it has no language model
    parts |= {"lyrics": ["text", *parts["lyrics_stage1"]]}
    known = parts.get(fmt.name, []) if model_type != "clip_vision_model" else []
    for part in ["text", "vision"] if fmt.name == "llava" and model_type == "llava" else known:
        nested = f"{part}_config"
        with pytest.raises(UserError, match=f"the field {nested}.unheard_of 1, which lionjax does not know"):
            fmt.config_from_hf(hf_config | {nested: hf_config.get(nested, {}) | {"unheard_of": 1}})


def test_every_reader_of_config_json_is_tested():
    read = {fmt.name for fmt, _, _ in READERS}
    # The others read config.json not at all, or only the lionjax config that it holds.
    others = {"lion", "blip2_first", "flamingo", "ram", "segment_anything", "openai_clip", "eva", "groundingdino"}
    others |= {"openai_clip_model", "clip_own"}
    assert read | others == {fmt.name for fmt in detect.FORMATS} and not read & others


VLMS = (
    dataclasses.replace(visual_prefix.LLAVA_15_7B, prepend_image=False),
    dataclasses.replace(visual_prefix.LLAVA_7B, prepend_image=False),
    visual_prefix.BLIP2_OPT_2_7B,
    visual_prefix.BLIP2_FLAN_T5_XL,
    visual_prefix.INSTRUCTBLIP_FLAN_T5_XL,
    visual_prefix.MPLUG_OWL_7B,
    visual_prefix.KOSMOS2,
)
YARN = RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2, truncate=False)
LLAMA_3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
SCALINGS = [RopeScaling("linear", 2.0), LLAMA_3, YARN]
WRITTEN = [
    *[(LLAMA, dataclasses.replace(decoder.SMOLLM2_135M, rope_scaling=scaling)) for scaling in (None, *SCALINGS)],
    *[(GPT2, dataclasses.replace(decoder.GPT2, activation=act)) for act in HF_ACTIVATIONS],
    (OPT, dataclasses.replace(decoder.OPT_2_7B, activation="gelu")),
    *[(T5, dataclasses.replace(t5.FLAN_T5_XL, activation=act)) for act in HF_ACTIVATIONS],
    (BERT, BertConfig(activation="gelu_tanh")),
    *[
        (detect.format_of_config(config), config)
        for config in (vit.CLIP_VIT_L, swin.SwinConfig(activation="relu"), sam_encoder.SAM_VIT_H, NextChat())
    ],
    *[(detect.format_of_config(config), config) for config in VLMS],
]


@pytest.mark.parametrize("fmt, config", WRITTEN, ids=[f"{fmt.name}{n}" for n, (fmt, _) in enumerate(WRITTEN)])
def test_a_written_config_json_is_read_again(fmt, config):
    written = json.loads(json.dumps(fmt.config_to_hf(config) | {"dtype": "float32"}))
    assert fmt.config_from_hf(written) == config


def test_every_activation_exists_and_has_one_name_that_is_written():
    assert set(ACTIVATIONS.values()) == set(HF_ACTIVATIONS) <= set(layers.ACTIVATIONS)
    assert all(ACTIVATIONS[name] == ours for ours, name in HF_ACTIVATIONS.items())


ROPE = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None, "max_position_embeddings": 2048}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type)
def test_rope_scaling_of_earlier_and_present_versions_is_the_same(scaling):
    written = rope_to_hf(500.0, scaling)
    for names in ({"rope_parameters"}, {"rope_scaling", "rope_theta"}, set(written)):
        assert rope_from_hf(ROPE | {name: written[name] for name in names}) == (500.0, scaling)
    assert configs.from_json(configs.to_json(scaling)) == scaling
    assert not np.allclose(rope_frequencies(64, 5e5, scaling), rope_frequencies(64, 5e5), atol=0)


@pytest.mark.parametrize(
    "rope, problem",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "text.rope_scaling.rope_type 'dynamic' in its"),
        ({"rope_scaling": {"type": "linear"}}, "text.rope_scaling.factor null; it must be a number above 0"),
        ({"rope_scaling": LINEAR | {"factor": float("nan")}}, "text.rope_scaling.factor NaN; it must be a number"),
        ({"rope_scaling": LINEAR | {"stretch": 3}}, "the field text.rope_scaling.stretch 3"),
        ({"rope_scaling": "linear"}, "text.rope_scaling 'linear'; it must be a JSON object or null"),
        (
            {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}},
            "text.rope_parameters.rope_theta 20.0 and text.rope_theta 10.0, which are the same setting",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 3.0}},
            "text.rope_scaling .* and text.rope_parameters .*, which differ",
        ),
    ],
)
def test_other_rotary_positions_are_refused_by_name(rope, problem):
    with pytest.raises(UserError, match=problem):
        rope_from_hf(ROPE | rope, "text")


def test_an_mpt_with_other_settings_is_refused_by_name():
    for field, value in {"attn_clip_qkv": 6, "logit_scale": 2.0, "no_bias": False, "norm_type": "rmsnorm"}.items():
        with pytest.raises(UserError, match=field):
            openflamingo.MPT_TABLE.read({"model_type": "mpt", field: value})
    for field, value in {
        "softmax_scale": 0.5,
        "clip_qkv": 6,
        "alibi": False,
        "attn_type": "multiquery_attention",
    }.items():
        with pytest.raises(UserError, match=f"attn_config.{field}"):
            openflamingo.MPT_ATTENTION_TABLE.read({field: value}, "attn_config")
