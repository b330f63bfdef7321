# SPDX-License-Identifier: Apache-2.0
"""What stands beside exported weights: transformers opens tokenizer and pictures as we do, and the card is true."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import released_folders as released
from PIL import Image
from published_folders import VIT
from safetensors.numpy import load_file
from small_lion import experiment, params_of
from small_lora import CONFIG, random_params
from small_prefix import OWN_TOWER, random_weights

from lionjax import cli, convert
from lionjax.data.processor import Processor
from lionjax.inference.loading import from_params
from lionjax.nn.lora import LoraConfig


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    what = experiment()
    folder = tmp_path_factory.mktemp("out") / "lion"
    from_params(what, params_of(what)).export(folder)
    return what, folder


@pytest.mark.slow
def test_transformers_loads_the_exported_tokenizer_with_the_same_ids(exported):
    transformers = pytest.importorskip("transformers")
    what, folder = exported
    mine = Processor(what.data.processor).tokenizer
    for place in (folder, folder / "qformer_tokenizer"):
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        text = "how many red stars are left of <extra_id_0> the box?"
        assert (
            theirs(text, add_special_tokens=False)["input_ids"]
            == mine.backend.encode(text, add_special_tokens=False).ids
        )
        assert (theirs.pad_token, theirs.eos_token, theirs.unk_token) == ("<pad>", "</s>", "<unk>")


def test_transformers_loads_the_exported_image_processor_with_the_same_pixels(exported):
    transformers = pytest.importorskip("transformers")
    what, folder = exported
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8))
    made = np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    wanted = Processor(what.data.processor).preprocess_image(picture)
    np.testing.assert_allclose(made, wanted, atol=1e-6)


def test_the_card_of_a_run_says_what_it_is_and_how_it_was_trained(exported):
    what, folder = exported
    card = (folder / "README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: lionjax" in head and "pipeline_tag: image-text-to-text" in head
    assert "# small\n" in card and "| `t5_model` |" in card and "| third | 2 | 8 | 0.001 |" in card
    assert "load_state_dict" in card and "Data: Scenes. Seed 0." in card


def test_the_card_of_a_known_model_names_its_class_and_how_peft_adds_the_lora(tmp_path):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    card = (tmp_path / "torch" / "README.md").read_text()
    assert "library_name: transformers" in card and "LlamaForCausalLM.from_pretrained(" in card
    assert "adapter (LoRA)" in card and "PeftModel.from_pretrained" in card and "## Training" not in card


def test_released_processor_files_are_kept_and_their_sizes_follow_the_model(tmp_path, exported):
    what, _ = exported
    mine = tmp_path / "preprocessor_config.json"
    mine.write_text(json.dumps({"size": 7, "resample": 2}))
    convert.to_torch(what.model, params_of(what), tmp_path / "torch", companions={mine.name: mine})
    assert json.loads((tmp_path / "torch" / mine.name).read_text()) == {"size": 28, "resample": 2}


def test_tied_tensors_are_counted_once(tmp_path):
    counts = []
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, lora=LoraConfig(), tie_embeddings=tied)
        params = random_params(config)
        convert.to_torch(config, params, tmp_path / str(tied))
        counts.append(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
        card = (tmp_path / str(tied) / "README.md").read_text()
        assert counts[-1] in card and ("copies of tied tensors: 1, counted once" in card) == tied
    assert counts[0] != counts[1]


# Every call that a card prints


def run_card(folder, tmp_path) -> dict:
    """Run the Python and shell blocks of a folder's card; returns the Python names."""
    card, names = (folder / "README.md").read_text(), {}
    blocks = re.findall(r"```(\w*)\n(.*?)```", card, re.DOTALL)
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(code.replace("this folder", str(folder)), names)
            continue
        command, *arguments = code.strip().replace("THIS_FOLDER", str(folder)).split()
        assert command == "lionjax"
        assert cli.main([a.replace("NEW_FOLDER", str(tmp_path / "new")) for a in arguments]) == 0
    assert (tmp_path / "new" / "params.safetensors").is_file()
    return names


@pytest.mark.parametrize("name", [*released.SYSTEMS, "clip"])
def test_the_calls_on_the_card_of_a_released_model_run(tmp_path, name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if name == "clip":
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)).save_pretrained(tmp_path / "released")
        released.processor_of("llava").image_processor.save_pretrained(tmp_path / "released")
    else:
        released.save_released(name, tmp_path / "released")
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax")
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    card = (tmp_path / "torch" / "README.md").read_text()
    names = run_card(tmp_path / "torch", tmp_path)
    assert "library_name: transformers" in card and f"{type(names['model']).__name__}.from_pretrained(" in card
    openers = {"llama": "tokenizer", "clip": "image_processor"}
    assert openers.get(name, "processor") in names
    assert ("jax_model" in names) == (name != "clip")


def test_the_calls_on_the_card_of_a_lora_run(tmp_path):
    pytest.importorskip("peft")
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    assert type(run_card(tmp_path / "torch", tmp_path)["model"]).__name__.startswith("Peft")


@pytest.mark.slow
def test_the_calls_on_the_card_of_a_model_with_original_code_run(tmp_path, exported):
    pytest.importorskip("torch")
    what, folder = exported
    card = (folder / "README.md").read_text()
    assert "transformers has no class" in card and "https://github.com/JiuTian-VL/JiuTian-LION" in card
    names = run_card(folder, tmp_path)
    assert names["state_dict"].keys() == load_file(folder / "model.safetensors").keys()
    convert.to_torch(what, params_of(what), tmp_path / "shards", 100_000, companions=folder)
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "new")
    assert run_card(tmp_path / "shards", tmp_path)["state_dict"].keys() == names["state_dict"].keys()


@pytest.mark.slow
def test_a_card_says_where_there_is_no_pytorch_code(tmp_path):
    convert.to_torch(OWN_TOWER, random_weights(OWN_TOWER), tmp_path / "torch")
    card = (tmp_path / "torch" / "README.md").read_text()
    assert "There is no PyTorch code for this model" in card and "```python" not in card
    run_card(tmp_path / "torch", tmp_path)
