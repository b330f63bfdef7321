# SPDX-License-Identifier: Apache-2.0
"""The released LISA folder, and a LISA with LoRA as PEFT has it, into lionjax and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_lisa import TINY, batch_of

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.models.vlm import lisa
from lionjax.nn.lora import LoraConfig

KIND = next(kind for kind in detect.FORMATS if kind.name == "lisa")
RELEASE = {  # config.json of LISA-7B-v1
    "architectures": ["LISAForCausalLM"],
    "model_type": "llava",
    "vocab_size": 32003,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "freeze_mm_mlp_adapter": True,
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 1024,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "vision_tower": "openai/clip-vit-large-patch14",
    "out_dim": 256,
    "train_mask_decoder": True,
    "tune_mm_mlp_adapter": False,
    "use_cache": False,
    "use_mm_proj": True,
}


def test_the_released_config_gives_the_full_size_model():
    assert detect.lisa_format_name(RELEASE) == "lisa"
    assert KIND.config_from_hf(RELEASE) == lisa.LISA_7B
    said = KIND.config_to_hf(lisa.LISA_7B)
    assert {key: said[key] for key in RELEASE if key in said} == {
        key: value for key, value in RELEASE.items() if key in said
    } | {"model_type": "lisa"}
    assert "system" not in said and KIND.config_from_hf(json.loads(json.dumps(said))) == lisa.LISA_7B
    thirteen = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    thirteen |= {"num_attention_heads": 40, "num_key_value_heads": 40}
    assert KIND.config_from_hf(RELEASE | thirteen) == lisa.LISA_13B


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"out_dim": 128}, "out_dim 128; only 256"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_projector_type": "identity"}, "mm_projector_type"),
    ],
)
def test_a_config_that_is_not_lisas_is_refused(changed, problem):
    with pytest.raises(UserError, match=problem):
        KIND.config_from_hf(RELEASE | changed)


def random_params(system):
    shapes = sharding.abstract_params(system.init, jax.random.key(0), batch_of([[5]]))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float16), shapes)


def assert_same_bits(one, other):
    one, other = trees.flatten(one), trees.flatten(other)
    assert one.keys() == other.keys()
    assert all(one[path].tobytes() == other[path].tobytes() for path in one)


@pytest.mark.slow
def test_a_merged_folder_round_trips_bit_exactly(tmp_path):
    params = random_params(TINY)
    convert.to_torch(TINY, params, tmp_path / "torch")
    names = load_file(tmp_path / "torch" / "model.safetensors")
    known = {"model.text_hidden_fcs.0.2.bias", "model.visual_model.mask_decoder.iou_token.weight", "lm_head.weight"}
    assert known | {"model.mm_projector.weight", "model.layers.1.self_attn.q_proj.weight"} <= names.keys()
    (tmp_path / "torch" / detect.CONFIG_FILE).unlink()  # as where only the original's files are
    config, back = convert.from_torch(tmp_path / "torch")
    assert config == TINY
    assert_same_bits(params, back)


@pytest.mark.slow
def test_a_folder_without_clip_takes_the_one_in_a_subfolder(tmp_path):
    """As LISA is released; its config.json names the CLIP."""
    system = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, activation="quick_gelu"))
    params = random_params(system)
    convert.to_torch(system, params, tmp_path / "torch")
    convert.to_torch(system.vision, params["vision"], tmp_path / "torch" / "clip")
    file = tmp_path / "torch" / "model.safetensors"
    tensors = load_file(file)
    tower = [name for name in tensors if name.startswith("model.vision_tower.")]
    save_file({name: array for name, array in tensors.items() if name not in tower}, file)
    assert len(tower) == len(load_file(tmp_path / "torch" / "clip" / "model.safetensors")) > 30
    (tmp_path / "torch" / detect.CONFIG_FILE).unlink()
    config, back = convert.from_torch(tmp_path / "torch")
    assert config == system
    assert_same_bits(params, back)


@pytest.mark.slow
def test_a_lora_round_trips_bit_exactly_beside_its_base(tmp_path):
    language = dataclasses.replace(TINY.language, lora=LoraConfig(2, 16.0, 0.05))
    system = dataclasses.replace(TINY, language=language)
    params = random_params(system)
    convert.to_torch(system, params, tmp_path / "torch")
    adapter = load_file(tmp_path / "torch" / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    assert adapter.keys() == {module.format(layer, which, side) for layer in "01" for which in "qv" for side in "AB"}
    settings = json.loads((tmp_path / "torch" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 16, 0.05)
    config, back = convert.from_torch(tmp_path / "torch")
    assert config == system
    assert_same_bits(params, back)
