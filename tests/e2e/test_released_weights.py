# SPDX-License-Identifier: Apache-2.0
"""The whole way of released weights: convert, answer, add a LoRA, export, load again in transformers and PEFT.

At every station the ids of the answers are those of transformers' processor and `generate` for the same images and
prompts, greedy, with prompts of unequal length in one batch.
"""

import dataclasses

import numpy as np
import peft_adapters
import pytest
import tiny_released

import lionjax
from lionjax import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NEW_TOKENS = 8
QUESTIONS = ["What is it?", "Question: how many cats are there in the picture? Answer:", "Where is the red star?"]
PROMPTS = {
    "llava": [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS],
    "blip2_opt": QUESTIONS,
    "instructblip": QUESTIONS,
}
LORA = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}


def cut_at_end(row: list[int], end_tokens) -> tuple[int, ...]:
    """The ids up to the first end token, which is kept."""
    ends = end_tokens if isinstance(end_tokens, list) else [end_tokens]
    return tuple(row[: next((k + 1 for k, token in enumerate(row) if token in ends), len(row))])


def their_answers(model, processor, name: str) -> list[tuple[int, ...]]:
    """New ids of transformers' `generate` for one batch of all prompts, padded on the left."""
    processor.tokenizer.padding_side = "left"
    images = tiny_released.pictures(len(QUESTIONS))
    inputs = processor(images=images, text=PROMPTS[name], padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    return [cut_at_end(row, model.generation_config.eos_token_id) for row in ids.tolist()]


def our_answers(folder, name: str) -> list[tuple[int, ...]]:
    model = lionjax.load(folder)
    config = dataclasses.replace(model.generation_config("image_level"), max_new_tokens=NEW_TOKENS)
    images = tiny_released.pictures(len(QUESTIONS))
    return [answer.token_ids for answer in model.answer(images, PROMPTS[name], generation_config=config)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_released_weights_answer_as_in_transformers_before_and_after_a_lora_and_an_export(name, tmp_path):
    model, processor = tiny_released.save(name, tmp_path / "released")
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax")
    plain = their_answers(model, processor, name)
    assert our_answers(tmp_path / "jax", name) == plain

    with_lora = peft_adapters.with_adapter(model, tmp_path / "lora", **LORA)
    tuned = their_answers(with_lora, processor, name)
    assert tuned != plain, "a LoRA that changes no answer shows nothing"
    convert.convert(tmp_path / "released", tmp_path / "tuned", "jax", adapter=tmp_path / "lora")
    assert our_answers(tmp_path / "tuned", name) == tuned

    convert.convert(tmp_path / "tuned", tmp_path / "exported", "torch")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "exported").eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "exported" / "adapter").eval()
    exported_processor = transformers.AutoProcessor.from_pretrained(tmp_path / "exported")
    assert their_answers(again, exported_processor, name) == tuned
    images = tiny_released.pictures(2, seed=5)
    wanted, given = (p(images=images, text=PROMPTS[name][:1] * 2) for p in (processor, exported_processor))
    assert sorted(wanted) == sorted(given)
    for key in wanted:
        np.testing.assert_array_equal(np.asarray(wanted[key]), np.asarray(given[key]), err_msg=key)
