# SPDX-License-Identifier: Apache-2.0
"""Folders that transformers saved answer the same prompts with the same ids as transformers' processor and generate."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tiny_released
from PIL import Image

import lionjax
from lionjax import convert
from lionjax.data.processor import ImageTextInput

pytest.importorskip("torch")
NEW = 8
QUESTIONS = ["What is it?", "Question: how many cats are there in the picture? Answer:", "a  photo\nof"]


def asked(name: str) -> list[str]:
    """The prompts as transformers' processor wants them."""
    if name != "llava":
        return QUESTIONS
    return [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]


def their_answers(model, processor, pictures, prompts) -> list[tuple[int, ...]]:
    """Generated ids up to the end token, greedy, from one batch padded on the left."""
    import torch

    processor.tokenizer.padding_side = "left"
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist()
    # A LLaVA returns the prompt too.
    length = inputs["input_ids"].shape[1]
    answers = [row[length:] if len(row) > NEW + 1 else row for row in ids]
    cut = [next((k + 1 for k, token in enumerate(row) if token in ends), len(row)) for row in answers]
    return [tuple(row[:end]) for row, end in zip(answers, cut)]


def prompt_ids(model, question: str) -> list[int]:
    (row,) = [model.processor.encode_input(ImageTextInput(tiny_released.pictures(1)[0], question))]
    return row["prompt"][row["prompt_mask"] == 1].tolist()


@pytest.fixture(scope="module", params=["llava", "blip2_opt", "instructblip"])
def released(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / request.param
    model, processor = tiny_released.save(request.param, folder)
    return request.param, folder, model, processor


@pytest.mark.slow
def test_a_released_folder_answers_with_the_ids_of_transformers(released, tmp_path):
    name, folder, theirs, processor = released
    convert.convert(folder, tmp_path / "ours", "jax")
    model = lionjax.load(tmp_path / "ours")
    config = model.generation_config("image_level")
    assert (config.num_beams, config.repetition_penalty, config.do_sample) == (1, 1.0, False)
    config = dataclasses.replace(config, max_new_tokens=NEW)
    prompts, pictures = asked(name), tiny_released.pictures(3)
    mine = [answer.token_ids for answer in model.answer(pictures, prompts, generation_config=config)]
    assert len({len(prompt_ids(model, prompt)) for prompt in prompts}) > 1, "prompts of one length are not padded"
    assert mine == their_answers(theirs, processor, pictures, prompts)
    # One prompt has no padding on either side.
    assert mine == [
        their_answers(theirs, processor, [picture], [prompt])[0] for picture, prompt in zip(pictures, prompts)
    ]
    assert len(set(mine)) > 1, "answers that are all alike would show nothing"


@pytest.mark.slow
def test_prompt_ids_are_those_of_the_processor(released):
    name, folder, _, processor = released
    model = lionjax.load(folder)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for prompt in asked(name):
        wanted = processor(images=tiny_released.pictures(1), text=[prompt])["input_ids"][0]
        without = [k for k in wanted if k != image]
        mine = prompt_ids(model, prompt)
        assert [k for k in mine if k != image] == without
        assert (image in mine) == (name == "llava")
        if name == "llava":
            assert mine.index(image) == wanted.index(image)


@pytest.mark.slow
def test_weights_of_several_dtypes_are_computed_in_float32_as_stored(tmp_path):
    """As `from_pretrained(folder, dtype=torch.float32)`; the dtype of config.json changes nothing."""
    import safetensors.torch
    import torch
    import transformers

    _, processor = tiny_released.save("llava", tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    mixed = {name: tensor.to(dtype) for (name, tensor), dtype in zip(sorted(state.items()), dtypes)}
    safetensors.torch.save_file(mixed, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    prompts, pictures = asked("llava"), tiny_released.pictures(3)
    answers = {}
    for name in ("bfloat16", "float32"):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"dtype": name}))
        model = lionjax.load(tmp_path)
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
        config = dataclasses.replace(model.generation_config("image_level"), max_new_tokens=NEW)
        answers[name] = [a.token_ids for a in model.answer(pictures, prompts, generation_config=config)]
        assert answers[name] == their_answers(theirs, processor, pictures, prompts)
    found = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
    assert model.vlm.dtype == "float32" and found == {"bfloat16", "float16", "float32"}
    assert answers["bfloat16"] == answers["float32"] and len(set(answers["float32"])) > 1


GROUNDED = [
    "What is the star?",
    "<grounding> An image of",
    "<grounding><phrase> the star</phrase>",
    "<phrase>it</phrase><object><patch_index_0005><patch_index_0920></object> is",
]


@pytest.fixture(scope="module")
def kosmos2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kosmos2")
    theirs, processor = tiny_released.save_kosmos2(folder)
    return theirs, processor, lionjax.load(folder)


def test_ids_image_positions_and_pixels_of_kosmos2_are_those_of_its_processor(kosmos2):
    _, processor, model = kosmos2
    rng = np.random.default_rng(1)
    for prompt in GROUNDED:
        picture = Image.fromarray(rng.integers(0, 256, (45, 61, 3), np.uint8))
        wanted = {key: value[0] for key, value in processor(picture, prompt, return_tensors="np").items()}
        row = model.processor.encode_input(ImageTextInput(picture, prompt))
        ids = row["prompt"][row["prompt_mask"] == 1].tolist()
        is_image = wanted["image_embeds_position_mask"].astype(bool)
        start = ids.index(model.vlm.image_token_id)
        assert np.flatnonzero(is_image).tolist() == list(range(start, start + 64))
        wanted_ids = wanted["input_ids"].tolist()
        assert [*ids[:start], *ids[start + 1 :]] == [*wanted_ids[:start], *wanted_ids[start + 64 :]]
        assert wanted["attention_mask"].all()
        pixels = np.moveaxis(wanted["pixel_values"], 0, -1)
        mine = model.processor.normalize(row["pixels"])
        assert (np.abs(mine - pixels) * model.processor.config.image_std).max() <= 1.01 / 255


@pytest.mark.slow
def test_kosmos2_answers_with_the_ids_of_generate_for_each_prompt_alone(kosmos2):
    """Transformers counts the padding of a batch into the positions of the tokens that follow, so prompts go alone."""
    import torch

    theirs, processor, model = kosmos2
    pictures, wanted = tiny_released.pictures(len(GROUNDED)), []
    for picture, prompt in zip(pictures, GROUNDED):
        inputs = processor(picture, prompt, return_tensors="pt")
        with torch.no_grad():
            ids = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
        wanted.append(tuple(ids[inputs["input_ids"].shape[1] :]))
    config = dataclasses.replace(model.generation_config("image_level"), max_new_tokens=NEW)
    answers = model.answer(pictures, GROUNDED, generation_config=config)
    assert [answer.token_ids for answer in answers] == wanted and len(set(wanted)) > 1
