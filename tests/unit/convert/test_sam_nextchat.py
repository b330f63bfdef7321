# SPDX-License-Identifier: Apache-2.0
"""Folders of SAM and of NExT-Chat come in, say what they are, and go out again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_sam import SAM
from torch_configs import assert_loads_alike

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.models.vision.sam_encoder import SAM_VIT_H
from lionjax.models.vlm.nextchat import NextChat


@pytest.mark.slow
def test_a_sam_folder_of_transformers_round_trips(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SamModel(transformers.SamConfig(**SAM))
    theirs.save_pretrained(tmp_path / "theirs")
    coverage = convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    assert coverage.format_name == "sam" and not coverage.ignored
    config, params = convert.load_params(tmp_path / "ours")
    assert (config.depth, config.global_attn_indexes, config.decoder_norm_eps, config.masks) == (4, (1, 3), 1e-6, 4)
    convert.to_torch(config, params, tmp_path / "back")
    assert_loads_alike(theirs, tmp_path / "back")


def test_metas_sam_is_recognized_by_its_file_name(tmp_path):
    save_file({"image_encoder.pos_embed": np.zeros((1, 64, 64, 1280), np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").rename(tmp_path / "sam_vit_h_4b8939.pth")
    kinds = {kind.name: kind for kind in detect.FORMATS}
    assert kinds["segment_anything"].config_from_hf({}) == SAM_VIT_H
    with pytest.raises(UserError):  # found and opened as SAM; the rest of it is not there
        convert.from_torch(tmp_path / "sam_vit_h_4b8939.pth")


RELEASE = {
    "architectures": ["NextChatForSegLM"],
    "model_type": "nextchat",
    "vocab_size": 32005,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-05,
    "mm_depth": 2,
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "use_mm_proj": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def test_the_released_nextchat_config_gives_the_full_size_model():
    kind = next(kind for kind in detect.FORMATS if kind.name == "nextchat")
    assert kind.config_from_hf(RELEASE) == NextChat()
    said = kind.config_to_hf(NextChat())
    assert {key: said[key] for key in RELEASE if key in said} == {key: RELEASE[key] for key in RELEASE if key in said}
    assert kind.config_from_hf(json.loads(json.dumps(said))) == NextChat()
    assert kind.config_from_hf(RELEASE | {"mm_depth": 1}).projector_depth == 1


@pytest.mark.slow
def test_a_nextchat_round_trips_bit_exactly(tmp_path):
    from small_nextchat import TINY, batch_of

    shapes = sharding.abstract_params(TINY.init, jax.random.key(0), batch_of([[5]]))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float16), shapes)
    convert.to_torch(TINY, params, tmp_path / "torch")
    names = load_file(tmp_path / "torch" / "model.safetensors")
    assert {"loc_encoder.0.weight", "seg_prompt_mlp.2.bias", "model.mm_projector.2.weight"} <= names.keys()
    (tmp_path / "torch" / detect.CONFIG_FILE).unlink()  # as where only the original's files are
    config, back = convert.from_torch(tmp_path / "torch")
    one, other = trees.flatten(params), trees.flatten(back)
    assert config == TINY and one.keys() == other.keys()
    assert all(one[path].tobytes() == other[path].tobytes() for path in one)
