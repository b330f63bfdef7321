# SPDX-License-Identifier: Apache-2.0
"""config.json of exported folders: the model_type that it names, and edits that contradict lionjax.json."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
from paths import CONFIGS, EXPERIMENTS
from published_folders import tiny_lion, tiny_t5
from safetensors.numpy import load_file
from small_lora import CONFIG, random_params
from small_prefix import OWN_TOWER, random_weights

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.convert.formats.hf_config import merge_hf_config
from lionjax.convert.model_card import ORIGINAL_CODE, TRANSFORMERS_TYPES
from lionjax.core import config as configs
from lionjax.core.types import UserError
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import EVA_VIT_G
from lionjax.nn.lora import LoraConfig

DECODER = dataclasses.replace(CONFIG, lora=LoraConfig())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_transformers_loads_no_exported_config_as_another_model(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = detect.model_config_of(configs.load(CONFIGS / f"{name}.py"))
    try:
        checkpoint_format = detect.format_of_config(model)
    except UserError:
        pytest.skip("this model has no torch format")
    written = merge_hf_config({}, checkpoint_format, model, "float32")
    (tmp_path / "config.json").write_text(json.dumps(written))
    if written["model_type"] in TRANSFORMERS_TYPES:
        opened = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(opened).model_type == written["model_type"]
        words = getattr(model, "language", getattr(model, "text", model))
        assert opened.get_text_config().vocab_size == words.vocab_size
        assert isinstance(model, DecoderConfig) or opened.vision_config.image_size == model.vision.image_size
    else:
        with pytest.raises(ValueError, match=written["model_type"]):
            transformers.AutoConfig.from_pretrained(tmp_path)
        assert written["model_type"] in ORIGINAL_CODE or written["model_type"].startswith("lionjax_")


def test_the_model_types_of_transformers_are_those_that_it_has():
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    assert set(auto.CONFIG_MAPPING) >= TRANSFORMERS_TYPES
    assert not set(auto.CONFIG_MAPPING) & set(ORIGINAL_CODE)


@pytest.mark.parametrize(
    "model, model_type",
    [
        (OWN_TOWER, "lionjax_llava"),
        (tiny_lion(), "lionjax_lion"),
        (dataclasses.replace(EVA_VIT_G, image_size=28, width=24, depth=2, num_heads=2, mlp_dim=40), "lionjax_eva"),
    ],
)
def test_a_model_type_of_our_own_opens_without_lionjax_json(tmp_path, model, model_type):
    convert.to_torch(model, random_weights(model), tmp_path / "torch")
    assert json.loads((tmp_path / "torch" / "config.json").read_text())["model_type"] == model_type
    (tmp_path / "torch" / "lionjax.json").unlink()
    config, params = convert.from_torch(tmp_path / "torch")
    assert config == model
    convert.to_torch(config, params, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("torch", "again"))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("earlier", ["lion", "lionjax_lion"])
def test_the_earlier_model_type_of_a_lion_is_still_read(tmp_path, earlier):
    convert.to_torch(tiny_lion(), random_weights(tiny_lion()), tmp_path / "torch")
    file = tmp_path / "torch" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": earlier}))
    assert convert.from_torch(tmp_path / "torch")[0] == tiny_lion()
    (tmp_path / "torch" / "lionjax.json").unlink()
    assert convert.from_torch(tmp_path / "torch")[0] == tiny_lion()


# Edits after the export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    convert.to_torch(DECODER, random_params(DECODER), folder / "llama")
    convert.to_torch(*tiny_t5(), folder / "t5")
    convert.to_torch(tiny_lion(), random_weights(tiny_lion()), folder / "lion")
    return folder


def edited(exported, tmp_path, name, edit):
    """A copy of an exported folder with an edited config.json; a dotted name is a nested field, None removes it."""
    shutil.copytree(exported / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    content = json.loads(file.read_text())
    for path, value in edit.items():
        *parents, field = path.split(".")
        part = content
        for parent in parents:
            part = part[parent]
        part[field] = value
    file.write_text(json.dumps(content))
    return tmp_path / name


@pytest.mark.parametrize(
    "name, edit, field",
    [
        ("llama", {"rms_norm_eps": 0.5}, "rms_norm_eps 0.5"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, "linear"),
        ("llama", {"model_type": "opt"}, "model_type 'opt'"),
        ("t5", {"num_heads": 2}, "num_heads 2"),
        ("t5", {"layer_norm_epsilon": 0.1}, "layer_norm_epsilon 0.1"),
        ("lion", {"system.vision.num_heads": 2}, "vision.num_heads 2"),
    ],
)
def test_an_edited_config_that_contradicts_lionjax_json_is_refused(exported, tmp_path, name, edit, field):
    folder = edited(exported, tmp_path, name, edit)
    with pytest.raises(UserError, match=f"config.json .*{field}.*lionjax.json.*delete lionjax.json") as error:
        convert.from_torch(folder)
    assert str(error.value).count("\n") == 0
    with pytest.raises(UserError, match=field):
        convert.convert(folder, tmp_path / "jax", "jax")


@pytest.mark.parametrize(
    "edit",
    [
        {"transformers_version": "9.9"},
        {"use_cache": False},
        {"_name_or_path": "mine"},
        {"architectures": ["LlamaModel"]},
        {"dtype": "bfloat16"},
    ],
)
def test_an_edit_that_changes_no_result_is_accepted(exported, tmp_path, edit, caplog):
    with caplog.at_level(logging.WARNING):
        config, _ = convert.from_torch(edited(exported, tmp_path, "llama", edit))
    assert config == DECODER and "lionjax.json" not in caplog.text


def test_an_edited_dropout_is_reported(exported, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        convert.from_torch(edited(exported, tmp_path, "t5", {"dropout_rate": 0.5}))
    assert "dropout_rate 0.5" in caplog.text and "which decides" in caplog.text


def test_without_lionjax_json_the_edited_config_decides(exported, tmp_path):
    folder = edited(exported, tmp_path, "llama", {"rms_norm_eps": 0.5})
    (folder / "lionjax.json").unlink()
    assert convert.from_torch(folder)[0].norm_eps == 0.5


# Merging with the released config.json


def test_released_fields_that_lionjax_does_not_write_are_kept_and_stale_sizes_are_not():
    checkpoint_format = detect.format_of_config(DECODER)
    released = checkpoint_format.config_to_hf(DECODER) | {"use_cache": False, "torch_dtype": "float16"}
    merged = merge_hf_config(released, checkpoint_format, dataclasses.replace(DECODER, vocab_size=56), "float32")
    assert merged["use_cache"] is False and merged["vocab_size"] == 56
    assert merged["dtype"] == merged["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    "released", [{"model_type": "t5", "d_model": 8}, {"model_type": "llama", "attention_bias": True}]
)
def test_a_released_config_of_another_model_is_not_merged(released):
    merged = merge_hf_config(released, detect.format_of_config(DECODER), DECODER, "float32")
    assert not {"d_model", "attention_bias"} & merged.keys()
