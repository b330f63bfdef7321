# SPDX-License-Identifier: Apache-2.0
"""The whole way of released weights: convert, answer, add a LoRA, export, load again in transformers and PEFT.

At every station the ids of the answers are those of transformers' processor and `generate` for the same images and
prompts, greedy, with prompts of unequal length in one batch.
"""

import dataclasses
import json

import jax
import numpy as np
import peft_adapters
import pytest
import tiny_released

import lionjax
from lionjax import convert
from lionjax.data.processor import ImageTextInput
from lionjax.inference.engine import LENGTH_BUCKETS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NEW_TOKENS = 8
QUESTIONS = ["What is it?", "Question: how many cats are there in the picture? Answer:", "Where is the red star?"]
PROMPTS = {name: QUESTIONS for name in tiny_released.SYSTEMS}
PROMPTS["llava"] = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
DECODERS = [name for name in PROMPTS if name != "instructblip_t5"]
GENERATION_SIDE = {name: "left" if name in DECODERS else "right" for name in PROMPTS}
LORA = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}


def cut_at_end(row: list[int], end_tokens) -> tuple[int, ...]:
    """The ids up to the first end token, which is kept."""
    ends = end_tokens if isinstance(end_tokens, list) else [end_tokens]
    return tuple(row[: next((k + 1 for k, token in enumerate(row) if token in ends), len(row))])


def their_answers(model, processor, name: str, side: str = "", rows: slice = slice(None)) -> list[tuple[int, ...]]:
    """New ids of transformers' `generate` for one batch of the prompts in `rows`, padded on `side` ("": the usual)."""
    processor.tokenizer.padding_side = side or GENERATION_SIDE[name]
    images = tiny_released.pictures(len(QUESTIONS))[rows]
    inputs = processor(images=images, text=PROMPTS[name][rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = ids[:, 1 if name not in DECODERS else inputs["input_ids"].shape[1] :]  # after the decoder's start token
    return [cut_at_end(row, model.generation_config.eos_token_id) for row in ids.tolist()]


def their_logits(model, processor, name: str, side: str, targets: list[list[int]]) -> list[np.ndarray]:
    """For each prompt the logits (tokens, vocabulary) that predict its target, of one batch padded on a side."""
    images = tiny_released.pictures(len(QUESTIONS))
    inputs = processor(images=images, text=PROMPTS[name], padding=True, return_tensors="pt")
    prompts = [processor(images=[i], text=[t])["input_ids"][0] for i, t in zip(images, PROMPTS[name])]
    ids = [[*prompt, *target] for prompt, target in zip(prompts, targets)]
    inputs |= processor.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    is_text = inputs["attention_mask"].bool().numpy()
    return [row[mask][-len(target) - 1 : -1] for row, mask, target in zip(logits, is_text, targets)]


def our_answers(folder, name: str) -> list[tuple[int, ...]]:
    model = lionjax.load(folder)
    config = dataclasses.replace(model.generation_config("image_level"), max_new_tokens=NEW_TOKENS)
    images = tiny_released.pictures(len(QUESTIONS))
    return [answer.token_ids for answer in model.answer(images, PROMPTS[name], generation_config=config)]


def check_padding_sides(model, name: str, folder, answers: list[tuple[int, ...]]) -> None:
    """`answers` are those of transformers to each prompt alone; `padding_side` of the folder changes none of ours.

    A decoder of transformers continues a prompt that is padded on the right behind its padding (it warns), so that
    only the longest prompt has its own answer there. An encoder has its own answers on the right; on the left, the
    padding of transformers' processor stands between image and text and changes their distances, which T5 sees.
    """
    settings, experiments = json.loads((folder / "tokenizer_config.json").read_text()), set()
    for side in ("left", "right"):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
        experiments.add(lionjax.load(folder).experiment)
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert processor.tokenizer.padding_side == side
        alone = [their_answers(model, processor, name, side, slice(k, k + 1))[0] for k in range(len(QUESTIONS))]
        assert alone == answers
        is_equal = [padded == own for padded, own in zip(their_answers(model, processor, name, side), alone)]
        assert is_equal[1] and all(is_equal) == (side == GENERATION_SIDE[name])  # the second is the longest
    assert len(experiments) == 1, "padding_side changes what the model is asked"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_batches_padded_on_either_side_are_ours(name, tmp_path):
    theirs, processor = tiny_released.save(name, tmp_path)
    model = lionjax.load(tmp_path)
    samples = [ImageTextInput(*pair) for pair in zip(tiny_released.pictures(len(QUESTIONS)), PROMPTS[name])]
    batch = model.processor.batch(samples, ["two cats.", "a", "Describe the red star"], LENGTH_BUCKETS)
    masks = batch.target_mask_BM.astype(bool)
    targets = [row[mask].tolist() for row, mask in zip(batch.target_BM, masks)]
    ours = np.asarray(jax.jit(model.vlm.logits)(model.params, batch))
    for side in ("left", "right"):
        wanted = their_logits(theirs, processor, name, side, targets)
        for mine, mask, logits in zip(ours, masks, wanted):
            np.testing.assert_allclose(mine[mask][:, : logits.shape[1]], logits, atol=1e-4, err_msg=side)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_released_weights_answer_as_in_transformers_before_and_after_a_lora_and_an_export(name, tmp_path):
    model, processor = tiny_released.save(name, tmp_path / "released")
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax")
    plain = their_answers(model, processor, name)
    assert our_answers(tmp_path / "jax", name) == plain
    check_padding_sides(model, name, tmp_path / "released", plain)

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
