# SPDX-License-Identifier: Apache-2.0
"""Lyrics as published: its config.json, three shards with an index, its first stage, and BLIP-2's as a start."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lionjax import convert
from lionjax.convert.formats.detect import open_checkpoint
from lionjax.convert.formats.lyrics import LYRICS, lyrics_format_name
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.connectors.qformer import QFormerConfig
from lionjax.models.language.bert import BertConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision import grounding_dino, ram
from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_T, GroundingDinoConfig
from lionjax.models.vision.ram import RAM_SWIN_L, RamConfig
from lionjax.models.vision.swin import SwinConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.blip2_stage1 import Blip2Stage1
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1
from lionjax.models.vlm.visual_prefix import LYRICS_CODE

# What the released code writes, without the fields that its classes have as defaults.
RELEASED = {
    "architectures": ["LyricsLMForConditionalGeneration"],
    "model_type": "blip-2",
    "num_query_tokens": 96,
    "image_text_hidden_size": 256,
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "blip_2_vision_model", "layer_norm_eps": 1e-5, "initializer_range": 1e-10},
    "qformer_config": {"detection_encoder_hidden_size": 260, "vocab_size": 30523, "num_vit_query_tokens": 32},
    "detection_config": {"dilation": False, "dn_number": 0, "depths": [2, 2, 6, 2], "drop_path_rate": 0.1},
    "ram_config": {"threshold": 0.68, "tag_list": "/ram_tag_list.txt", "vision_width": 1536},
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32001,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
    },
}
SWIN = SwinConfig(image_size=32, width=8, depths=(1, 1), num_heads=(2, 2), window_size=4)
TAGGER = RamConfig(SWIN, 5, 6, 8, 8, 2, 12, 1)
DETECTOR = GroundingDinoConfig(
    SwinConfig(None, width=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, output_stages=(1, 2, 3)),
    BertConfig(8, 1, 2, 16, vocab_size=40, max_positions=16),
    width=32,
    num_heads=4,
    mlp_dim=16,
    encoder_depth=1,
    decoder_depth=1,
    num_queries=6,
)
TOWER = ViTConfig(image_size=28, width=16, depth=1, num_heads=2, mlp_dim=20, norm_eps=1e-5)
BRIDGE = MQFormerConfig(12, 3, 2, 20, 5, vision_width=16, vocab_size=30, num_grounding_queries=3, region_width=36)
SMALL = dataclasses.replace(
    LYRICS_CODE,
    vision=TOWER,
    qformer=BRIDGE,
    language=DecoderConfig(20, 16, 1, 2, 2, 8, 20),
    tagger=TAGGER,
    detector=DETECTOR,
)


def random_state(system, seed: int) -> dict:
    """Random tensors of a system under its torch names."""
    rng = np.random.default_rng(seed)
    shapes = LYRICS.abstract_params(system)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float16), shapes)
    return convert.state_dict_from_params(system.weight_map(), params)


def write(folder, config: dict, shards: list[dict]) -> None:
    """A folder as published: shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name)
    where = {key: name for name, shard in zip(names, shards) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture
def small_experts(monkeypatch):
    """What config.json does not say is that of small experts."""
    monkeypatch.setattr(ram, "RAM_SWIN_L", TAGGER)
    monkeypatch.setattr(grounding_dino, "GROUNDING_DINO_SWIN_T", DETECTOR)


def small_config(system, architecture: str) -> dict:
    """The config.json of a small Lyrics with the experts of `small_experts`."""
    written = LYRICS.config_to_hf(SMALL)
    written["ram_config"] |= {"vit": "swin_l"}
    return written | {"architectures": [architecture], "image_text_hidden_size": 7}


def test_the_released_config_is_that_of_the_preset_and_is_written_back():
    whole = dataclasses.replace(LYRICS_CODE, tagger=RAM_SWIN_L, detector=GROUNDING_DINO_SWIN_T)
    read = LYRICS.config_from_hf(RELEASED)
    assert configs.diff_configs(read, whole) == {"language.pad_vocab_to_multiple_of": (1, 128)}
    assert LYRICS.config_from_hf(json.loads(json.dumps(LYRICS.config_to_hf(whole)))) == read
    assert lyrics_format_name(RELEASED) == "lyrics" and lyrics_format_name({"model_type": "blip-2"}) is None


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("detection_config", {"dilation": True}, "detection_config.dilation true.*only false is supported"),
        ("detection_config", {"dec_n_points": 8}, "dec_n_points 8; only 4, as detection_config.enc_n_points"),
        ("detection_config", {"new_field": 1}, "does not know"),
        ("qformer_config", {"detection_encoder_hidden_size": 256}, "256; only 260, as detection_config.hidden_dim"),
        ("qformer_config", {"num_vit_query_tokens": 30}, "num_vit_query_tokens 30; only 32"),
        ("ram_config", {"vision_width": 1024}, "vision_width 1024; only 1536"),
    ],
)
def test_settings_of_another_model_are_refused(part, fields, message):
    with pytest.raises(UserError, match=message):
        LYRICS.config_from_hf(RELEASED | {part: RELEASED[part] | fields})


@pytest.mark.slow
def test_three_published_shards_go_to_our_names_and_back_to_the_same_bits(tmp_path, small_experts):
    state = random_state(SMALL, 0)
    shards = [dict(list(sorted(state.items()))[part::3]) for part in range(3)]
    shards[0]["ram.text_decoder.bert.embeddings.LayerNorm.weight"] = np.ones(3, np.float16)
    write(tmp_path / "released", small_config(SMALL, "LyricsLMForConditionalGeneration"), shards)
    assert open_checkpoint(tmp_path / "released").config == SMALL
    convert.convert(tmp_path / "released", tmp_path / "ours", "jax")
    names = set(trees.flatten(convert.load_params(tmp_path / "ours")[1]))
    assert {name.split("/")[0] for name in names} == set(
        "vision vision_norm qformer projector language tagger detector".split()
    )
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    made = load_file(tmp_path / "back" / "model.safetensors")
    assert made.keys() == state.keys()
    assert all(made[name].tobytes() == state[name].tobytes() for name in state)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "blip-2"


@pytest.mark.slow
def test_the_first_stage_is_read_under_the_released_codes_names(tmp_path, small_experts):
    system = LyricsStage1(TOWER, BRIDGE, embed_dim=7, decoder_start_token_id=29, tagger=TAGGER, detector=DETECTOR)
    state = random_state(system, 1)
    write(tmp_path / "released", small_config(system, "LyricsQFromerForPretrain"), [state])
    assert "qformer.bert.encoder.layer.2.detection_crossattention.attention.key.weight" in state
    convert.convert(tmp_path / "released", tmp_path / "ours", "jax")
    config, params = convert.load_params(tmp_path / "ours")
    assert config == system
    back = convert.state_dict_from_params(system.weight_map(), params)
    assert all(back[name].tobytes() == state[name].tobytes() for name in state)


@pytest.mark.slow
def test_blip2s_first_stage_starts_what_both_have_and_the_detection_branch_is_new(tmp_path):
    import small_lion

    from lionjax.core import sharding
    from lionjax.core.experiment import Experiment, Stage, Weights
    from lionjax.planner.plans import dummy_batch
    from lionjax.training.init import init_params, make_param_specs

    plain = QFormerConfig(12, 3, 2, 20, 2, vision_width=16, vocab_size=30)
    rng = np.random.default_rng(0)
    shapes = LYRICS.abstract_params(Blip2Stage1(TOWER, plain, embed_dim=7))
    theirs = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in trees.flatten(shapes).items()}
    save_file(theirs, tmp_path / "params.safetensors")
    system = LyricsStage1(TOWER, BRIDGE, embed_dim=7)
    stages = (Stage("one", 1, ("(?!vision/).*",), (("caption", 1.0),), 2),)
    data = small_lion.experiment().data
    what = Experiment("start", system, data, stages, weights=(Weights("", str(tmp_path / "params.safetensors")),))
    batch = dummy_batch(what)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = trees.flatten(trees.merge(*init_params(what, batch, make_param_specs(what, batch, mesh))))
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(
            np.asarray(made[path], np.float32), leaf.astype(made[path].dtype).astype("f4"), path
        )
    new = made.keys() - theirs.keys()
    assert new and all("region_" in path for path in new)
    assert 0.01 < np.std(made["qformer/region_queries"]) < 0.03
