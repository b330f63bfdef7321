# SPDX-License-Identifier: Apache-2.0
"""What stands beside exported weights: transformers opens tokenizer and pictures as we do, and the card is true."""

import json

import numpy as np
import pytest
from PIL import Image
from small_lion import experiment, params_of
from small_lora import CONFIG, random_params

from lionjax import convert
from lionjax.data.processor import Processor
from lionjax.inference.loading import from_params


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    what = experiment()
    folder = tmp_path_factory.mktemp("out") / "lion"
    from_params(what, params_of(what)).export(folder)
    return what, folder


def test_transformers_reads_words_as_we_do(exported):
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


def test_transformers_reads_pictures_as_we_do(exported):
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


def test_companion_files_are_not_overwritten(tmp_path, exported):
    what, _ = exported
    mine = tmp_path / "preprocessor_config.json"
    mine.write_text(json.dumps({"size": 7}))
    convert.to_torch(what, params_of(what), tmp_path / "torch", companions={mine.name: mine})
    assert json.loads((tmp_path / "torch" / mine.name).read_text()) == {"size": 7}
