# SPDX-License-Identifier: Apache-2.0
"""Exported folders open with transformers' Auto classes: processor, chat template, generation settings, new sizes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import released_folders as released
from PIL import Image

import lionjax
from lionjax import convert
from lionjax.convert import ResizeOptions
from lionjax.convert.processor_files import complete_processor_files
from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.image_fit import ImageFit
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.tokenizer import TINY_TOKENIZER_FILE
from lionjax.inference.loading import from_params
from lionjax.training import loop
from lionjax.training.companions import companion_files, save_companions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VLMS = tuple(name for name in released.SYSTEMS if name != "llama")
ADDED = ("<at>", "<boxes>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function of a system's name to (released folder, its model, the folder in jax), made on first use."""
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = released.save_released(name, path / "released")
            convert.convert(path / "released", path / "jax", "jax")
            made[name] = (path / "released", model, path / "jax")
        return made[name]

    return make


def assert_same_processor(name, folder, original):
    made, expected = (released.processed(name, released.open_processor(f)) for f in (folder, original))
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(made[key], value, err_msg=key)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**{key: torch.as_tensor(value) for key, value in inputs.items()}).logits.numpy()


@pytest.mark.parametrize("name", released.SYSTEMS)
def test_a_converted_folder_has_the_processor_and_settings_of_the_released_one(tmp_path, folders, name):
    original, model, jax_folder = folders(name)
    convert.convert(jax_folder, tmp_path / "torch", "torch")
    assert_same_processor(name, tmp_path / "torch", original)
    again = type(model).from_pretrained(tmp_path / "torch").eval()
    assert again.generation_config.max_new_tokens == 7
    inputs = released.processed(name, released.open_processor(tmp_path / "torch"))
    np.testing.assert_array_equal(logits_of(again, inputs), logits_of(model, inputs))
    if name in ("llava", "llama"):
        messages = [{"role": "user", "content": "w7"}]
        template = released.open_processor(tmp_path / "torch").apply_chat_template(messages, tokenize=False)
        assert template == "user : w7 "


@pytest.mark.slow
@pytest.mark.parametrize("earlier_layout", [False, True])
@pytest.mark.parametrize("name", VLMS)
def test_a_new_image_size_is_written_to_every_file_that_has_it(tmp_path, folders, name, earlier_layout):
    original, _, _ = folders(name)
    shutil.copytree(original, tmp_path / "released")
    if earlier_layout:
        released.save_in_earlier_layout(tmp_path / "released")
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax", resize_options=ResizeOptions(image_size=42))
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    for config in (tmp_path / "jax" / "origin" / "config.json", tmp_path / "torch" / "config.json"):
        assert json.loads(config.read_text())["vision_config"]["image_size"] == 42
    assert released.remaining_sizes(tmp_path / "torch", released.SIDE) == []
    inputs = released.processed(name, released.open_processor(tmp_path / "torch"))
    assert inputs["pixel_values"].shape == (1, 3, 42, 42)
    again = released.auto_model(name, tmp_path / "torch")
    assert again.config.vision_config.image_size == 42
    if not earlier_layout:
        both = released.logits_behind_the_image(
            *convert.from_torch(tmp_path / "torch"), inputs, logits_of(again, inputs)
        )
        np.testing.assert_allclose(*both, atol=2e-4)


@pytest.mark.parametrize("name", released.SYSTEMS)
def test_added_tokens_are_in_every_file_that_lists_tokens(tmp_path, folders, name):
    original, model, _ = folders(name)
    convert.convert(original, tmp_path / "jax", "jax", resize_options=ResizeOptions(ADDED, 8))
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "torch")
    before = len(transformers.AutoTokenizer.from_pretrained(original))
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == [before, before + 1]
    assert tokenizer.decode(tokenizer("w7 <at>")["input_ids"], skip_special_tokens=True).strip() == "w7"
    again = released.auto_model(name, tmp_path / "torch")
    text = again.config.get_text_config()
    assert text.vocab_size == again.get_output_embeddings().weight.shape[0] and text.vocab_size % 8 == 0
    assert again.generation_config.max_new_tokens == 7
    processor = released.open_processor(tmp_path / "torch")
    inputs = released.processed(name, processor)
    expected = logits_of(model, released.processed(name, released.open_processor(original)))
    np.testing.assert_allclose(logits_of(again, inputs)[..., :before], expected[..., :before], atol=1e-5)


def test_added_tokens_are_written_where_files_of_earlier_versions_list_them(tmp_path, folders):
    original, _, _ = folders("llama")
    shutil.copytree(original, tmp_path / "released")
    entry = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = json.loads((original / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"1": entry | {"special": True}}
    (tmp_path / "released" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "released" / "added_tokens.json").write_text('{"<x>": 3}')
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax", resize_options=ResizeOptions(ADDED))
    decoder = json.loads((tmp_path / "jax" / "origin" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {new_id: value["content"] for new_id, value in decoder.items()} == {
        "1": "<s>",
        "50": "<at>",
        "51": "<boxes>",
    }
    added = json.loads((tmp_path / "jax" / "origin" / "added_tokens.json").read_text())
    assert added == {"<x>": 3, "<at>": 50, "<boxes>": 51}


def test_tokens_are_added_to_a_tokenizer_without_tokenizer_json(tmp_path, folders):
    original, _, _ = folders("llama")
    shutil.copytree(original, tmp_path / "released")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "released" / file).unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(5, 50))]
    (tmp_path / "released" / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "released" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax", resize_options=ResizeOptions(ADDED))
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "torch")
    assert tokenizer("w7 <boxes>", add_special_tokens=False)["input_ids"] == [7, 51]


# Image settings of a run


RUN_SETTINGS = {
    "released": {},
    "normalization": {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)},
    "stretched": {"image_fit": ImageFit("stretch", resample="bilinear")},
    "cropped": {"image_fit": ImageFit("shortest_edge", (35, 0), "lanczos")},
    "padded with mean": {"pad_to_square": True, "pad_color": "mean"},
    "padded with white": {"pad_to_square": True},
}


@pytest.mark.parametrize("earlier_layout", [False, True])
@pytest.mark.parametrize("case", RUN_SETTINGS)
@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_exported_image_settings_are_those_of_the_run(tmp_path, folders, name, case, earlier_layout):
    original, _, jax_folder = folders(name)
    shutil.copytree(original, tmp_path / "released")
    if earlier_layout:
        released.save_in_earlier_layout(tmp_path / "released")
    config, params = convert.load_params(jax_folder)
    experiment = fine_tuning(name, jax_folder, config)
    processor = dataclasses.replace(experiment.data.processor, **RUN_SETTINGS[case])
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))
    convert.to_torch(experiment, params, tmp_path / "torch", companions=tmp_path / "released")
    for file in ("processor_config.json", "preprocessor_config.json"):
        if case == "released" and (tmp_path / "released" / file).exists():
            written, given = (json.loads((tmp_path / f / file).read_text()) for f in ("torch", "released"))
            assert written == given
    theirs = released.open_processor(tmp_path / "torch").image_processor
    picture, pads_itself = released.picture(), name == "llava" and case == "padded with mean"
    expected = Processor(processor).preprocess_image(picture)
    if processor.pad_to_square and not pads_itself:
        color = "mean" if case == "padded with mean" else "white"
        assert f"with {'the mean color' if color == 'mean' else 'white'} to a square" in card(tmp_path / "torch")
        picture = padded(picture, tuple(int(255 * m) for m in processor.image_mean) if color == "mean" else "white")
    pixels = np.moveaxis(np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0]), 0, -1)
    assert (np.abs(pixels - expected) * processor.image_std).max() <= 1.01 / 255


def card(folder) -> str:
    return (folder / "README.md").read_text()


def padded(picture, color):
    side = max(picture.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, tuple((side - edge) // 2 for edge in picture.size))
    return square


def test_the_aspect_ratio_of_an_original_llava_is_that_of_the_run(tmp_path, folders):
    """LLaVA's own code reads it from config.json, and all else from CLIP's folder."""
    experiment = fine_tuning("llava", folders("llava")[2], convert.open_params(folders("llava")[2])[0])
    hf_config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14"}
    for fields, released_aspect, aspect in (
        ({}, "pad", "square"),
        ({"pad_to_square": True, "pad_color": "mean"}, "square", "pad"),
        ({"pad_to_square": True, "pad_color": "mean"}, "pad", "pad"),
    ):
        hf_config |= {"image_aspect_ratio": released_aspect}
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        processor = dataclasses.replace(experiment.data.processor, **fields)
        run = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))
        complete_processor_files(run, tmp_path, hf_config, released.SIDE)
        assert json.loads((tmp_path / "config.json").read_text()) == hf_config | {"image_aspect_ratio": aspect}
        (tmp_path / "preprocessor_config.json").unlink()


# Models of an own config, without released files


def own_experiment(name, config, folder, **fields) -> Experiment:
    """An experiment whose tokenizers are a tokenizer.json each, with nothing beside."""
    special = ("<image>",) if config.image_token_id is not None else ()
    for number, tokenizer in enumerate((released.tokenizer_of(50, special), released.tokenizer_of(40))):
        (folder / f"tokenizer{number}").mkdir()
        tokenizer.backend_tokenizer.save(str(folder / f"tokenizer{number}" / "tokenizer.json"))
    processor = ProcessorConfig(
        image_size=released.SIDE,
        tokenizer=str(folder / "tokenizer0"),
        question_tokenizer=str(folder / "tokenizer1") if name == "instructblip" else "tiny",
        use_tags=False,
        reader="decoder",
        prompt_tokenization="whole",
        prompt_template="user : {image} {question} assistant :" if name == "llava" else "{question}",
        **fields,
    )
    return Experiment("own", config, DataConfig(processor=processor), stages=())


@pytest.mark.parametrize("name", ["llava", "blip2", "instructblip"])
def test_a_model_of_an_own_config_is_opened_by_auto_classes_with_our_pixels_and_ids(tmp_path, folders, name):
    config, params = convert.load_params(folders(name)[2])
    fields = {"image_mean": (0.5, 0.4, 0.3), "pad_to_square": name == "llava", "pad_color": "mean"}
    experiment = own_experiment(name, config, tmp_path, **fields)
    from_params(experiment, params).export(tmp_path / "torch")
    processor, question = released.open_processor(tmp_path / "torch"), "w7 w9 w12"
    assert "AutoProcessor" in card(tmp_path / "torch")
    text = f"user : <image> {question} assistant :" if name == "llava" else question
    theirs = {k: np.asarray(v[0]) for k, v in processor(released.picture(), text, return_tensors="pt").items()}
    row = Processor(experiment.data.processor).encode_input(ImageTextInput(released.picture(), question))
    ours = row["prompt"][row["prompt_mask"] == 1].tolist()
    assert [k for k in ours if k != config.image_token_id] == [k for k in theirs["input_ids"] if k != 50]
    assert (theirs["input_ids"] == config.image_token_id).sum() == (4 if name == "llava" else 3)
    pixels = np.moveaxis(theirs["pixel_values"], 0, -1)
    mine = Processor(experiment.data.processor).normalize(row["pixels"])
    assert (np.abs(mine - pixels) * experiment.data.processor.image_std).max() <= 1.01 / 255
    inputs = released.processed(name, processor)
    model = released.auto_model(name, tmp_path / "torch")
    np.testing.assert_array_equal(logits_of(model, inputs), logits_of(folders(name)[1], inputs))


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_the_card_says_where_a_model_has_no_image_token(tmp_path, folders, name):
    config, params = convert.load_params(folders(name)[2])
    experiment = own_experiment(name, dataclasses.replace(config, image_token_id=None), tmp_path)
    from_params(experiment, params).export(tmp_path / "torch")
    assert "trained without an image token" in card(tmp_path / "torch") and "AutoProcessor" not in card(
        tmp_path / "torch"
    )


@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_kosmos2_of_an_own_config_has_its_processor_where_its_tokenizer_has_the_tokens(tmp_path, folders, has_tokens):
    config, params = convert.load_params(folders("kosmos2")[2])
    experiment = own_experiment("kosmos2", config, tmp_path)
    if has_tokens:
        tokenizer = released.processor_of("kosmos2").tokenizer
        tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer0" / "tokenizer.json"))
    from_params(experiment, params).export(tmp_path / "torch")
    assert ("AutoProcessor" in card(tmp_path / "torch")) == has_tokens
    if has_tokens:
        processor = released.open_processor(tmp_path / "torch")
        made, expected = (released.processed("kosmos2", p) for p in (processor, released.processor_of("kosmos2")))
        for key in ("input_ids", "attention_mask", "image_embeds_position_mask"):
            np.testing.assert_array_equal(made[key], expected[key])
        pixels = np.moveaxis(made["pixel_values"][0], 0, -1)
        np.testing.assert_allclose(
            pixels, Processor(experiment.data.processor).preprocess_image(released.picture()), atol=0.02
        )


# Through training


def fine_tuning(name, jax_folder, system) -> Experiment:
    """One step of the projector, from the converted weights of the whole model."""
    question = str(jax_folder / "origin" / "qformer_tokenizer") if name == "instructblip" else "tiny"
    processor = ProcessorConfig(
        image_size=released.SIDE,
        tokenizer=str(jax_folder),
        question_tokenizer=question,
        max_prompt_tokens=40,
        max_question_tokens=24,
        max_target_tokens=8,
        use_tags=False,
        reader="decoder",
        prompt_template=("" if system.qformer else "{image} ") + "{question}",
        image_fit=ImageFit("shortest_edge" if name == "llava" else "stretch"),  # as the released processor
    )
    return Experiment(
        name="tuned",
        model=system,
        data=DataConfig(sources=(Scenes((8, 2, 2), image_size=56),), processor=processor),
        stages=(Stage("tune", 1, ("projector",), (("vqa", 1.0),), batch_size=2, learning_rate=0.1, warmup_steps=0),),
        run=RunConfig(frozen_dtype="float32", evaluate_limit=0),
        weights=(("", str(jax_folder / "params.safetensors")),),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VLMS if name != "kosmos2"])
def test_a_fine_tuned_model_has_the_released_processor_when_the_released_folder_is_gone(tmp_path, folders, name):
    original, model, jax_folder = folders(name)
    shutil.copytree(jax_folder, tmp_path / "jax")
    experiment = fine_tuning(name, tmp_path / "jax", convert.open_params(jax_folder)[0])
    loop.train(experiment, tmp_path / "run", pipeline.batches)
    shutil.rmtree(tmp_path / "jax")
    run = lionjax.load(tmp_path / "run")
    run.export(tmp_path / "torch")
    assert_same_processor(name, tmp_path / "torch", original)
    again = released.auto_model(name, tmp_path / "torch")
    assert again.generation_config.max_new_tokens == 7
    inputs = released.processed(name, released.open_processor(tmp_path / "torch"))
    both = released.logits_behind_the_image(run.vlm, run.params, inputs, logits_of(again, inputs))
    np.testing.assert_allclose(*both, atol=2e-4)
    assert np.abs(logits_of(again, inputs) - logits_of(model, inputs)).max() > 1e-3  # it was trained


def test_a_run_folder_keeps_the_companion_files_of_its_initial_weights(tmp_path, folders):
    _, _, jax_folder = folders("llava")
    experiment = fine_tuning("llava", jax_folder, convert.open_params(jax_folder)[0])
    tmp_path.joinpath("run").mkdir()
    save_companions(tmp_path / "run", experiment)
    kept = {f.name: f.read_bytes() for f in (tmp_path / "run" / "origin").iterdir()}
    assert kept == {f.name: f.read_bytes() for f in (jax_folder / "origin").iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"} <= kept.keys()


def test_another_tokenizer_replaces_the_released_tokenizer_and_its_templates(tmp_path, folders):
    _, _, jax_folder = folders("llava")
    experiment = fine_tuning("llava", jax_folder, convert.open_params(jax_folder)[0])
    processor = dataclasses.replace(experiment.data.processor, tokenizer="tiny", image_token=21)
    data = dataclasses.replace(experiment.data, processor=processor)
    files = companion_files(dataclasses.replace(experiment, data=data))
    assert files["tokenizer.json"] == TINY_TOKENIZER_FILE and "processor_config.json" in files
    assert not {"chat_template.jinja", "tokenizer_config.json", "generation_config.json"} & files.keys()


def test_parameters_in_memory_are_written_with_the_files_of_their_folder(tmp_path, folders):
    original, _, jax_folder = folders("blip2")
    config, params = convert.load_params(jax_folder)
    for companions, folder in ((jax_folder, "a"), (original, "b")):
        convert.to_torch(config, params, tmp_path / folder, companions=companions)
        assert_same_processor("blip2", tmp_path / folder, original)
