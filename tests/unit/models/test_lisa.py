# SPDX-License-Identifier: Apache-2.0
"""LISA answers with masks: those of its answer's tokens, in words, per picture and turn by turn."""

import dataclasses

import jax
import numpy as np
import pytest
import small_t5
from small_lisa import MASK, PROCESSOR, SEG, TINY, batch_of
from text_batches import padded

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.types import UserError
from lionjax.data.pipeline import DataConfig
from lionjax.inference import engine, loading
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.vlm.lisa import LisaModule

END, NEW = 2, 8


def talkative(system, batch, mask_id: int, factor: float):
    """Random parameters with larger body and head, and with mask tokens likelier, than training would begin with."""
    made = sharding.init_sharded(system.init, jax.random.key(0), batch)
    random = np.random.default_rng(10)
    flat = {
        path: np.asarray(leaf) + 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in trees.flatten(made).items()
    }
    flat["language/head/kernel"][:, mask_id] *= factor
    return trees.unflatten(flat)


T5_LISA = dataclasses.replace(TINY, language=dataclasses.replace(small_t5.TINY, vocab_size=44))


@pytest.fixture(scope="module")
def params():
    return talkative(TINY, batch_of([[5]]), MASK, 4.0)


PROMPTS = [[5, 6, 7], [8], [9, MASK, 11, 12, 13], [14, 15]]


def answered(system, params, beams: int):
    """(batch with the generated answers to PROMPTS as targets, these answers, the states kept while generating)."""
    config = GenerationConfig(
        max_new_tokens=NEW,
        num_beams=beams,
        eos_token_id=END,
        pad_token_id=0,
        decoder_start_token_id=0 if system.is_encoder_decoder else None,
    )
    batch = batch_of(PROMPTS)
    made = generate(system, params, batch, config)
    answers = [ids[:length].tolist() for ids, length in zip(np.asarray(made.ids_BM), np.asarray(made.length_B))]
    target_BM, mask_BM = padded(answers)
    spoken = dataclasses.replace(batch, target_BM=target_BM, target_mask_BM=mask_BM)
    return spoken, answers, np.asarray(made.aux_outputs["state"])


def read_states(system, params, batch):
    """The states of the masks of prompt and target, and which of them are valid."""

    def states(module):
        return module.mask_states(batch, module.states_before(batch), system.max_masks)

    def read(params):
        return LisaModule(system).apply({"params": params}, method=states)

    return tuple(map(np.asarray, jax.jit(read)(params)))


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_each_kept_state_is_the_one_that_predicts_its_mask_token(params, beams):
    """Also in beam search, of a token in the prompt, and of one that ends a truncated answer and is read by nobody."""
    spoken, answers, kept = answered(TINY, params, beams)
    state_BKD, valid_BK = read_states(TINY, params, spoken)
    counts = [prompt.count(MASK) + answer.count(MASK) for prompt, answer in zip(PROMPTS, answers)]
    np.testing.assert_array_equal(valid_BK.sum(axis=1), np.minimum(counts, TINY.max_masks))
    assert sum(counts) >= 3
    np.testing.assert_allclose(kept[valid_BK], state_BKD[valid_BK], atol=1e-3)


@pytest.mark.slow
def test_over_a_t5_a_mask_of_the_prompt_takes_a_slot_and_the_answers_masks_have_their_states():
    """A T5 predicts no token of the prompt."""
    params = talkative(T5_LISA, batch_of([[5]]), MASK, -8.0)
    spoken, answers, kept = answered(T5_LISA, params, 1)
    state_BKD, valid_BK = read_states(T5_LISA, params, spoken)
    found = 0
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        earlier, count = prompt.count(MASK), answer.count(MASK)
        assert valid_BK[row].sum() == min(count, T5_LISA.max_masks) and not kept[row, :earlier].any()
        stored = kept[row, earlier : earlier + count]
        np.testing.assert_allclose(stored, state_BKD[row, : len(stored)], atol=1e-3)
        found += len(stored)
    assert found >= 3 and any(MASK in prompt for prompt in PROMPTS)


@pytest.mark.slow
def test_a_batch_without_a_mask_has_the_loss_of_its_words_alone(params):
    bare = batch_of([[5], [6]], [[20, 21, END], [22, END]])
    loss, metrics = jax.jit(TINY.loss)(params, bare)
    assert metrics["loss_bce"] == metrics["loss_dice"] == 0 and float(loss) == pytest.approx(
        float(metrics["loss_text"])
    )
    words, _ = jax.jit(TINY.loss)(params, dataclasses.replace(bare, masks_BKHW=None, sam_image_BHWC=None))
    assert float(words) == pytest.approx(float(loss))


def test_lisa_has_no_boxes():
    with pytest.raises(UserError, match="no box head"):
        TINY.predict_boxes({}, None)


@pytest.fixture(scope="module")
def model():
    language = dataclasses.replace(TINY.language, vocab_size=1024, eos_token_id=1)
    system = dataclasses.replace(TINY, language=language, image_token_id=21, mask_token_id=SEG)
    experiment = Experiment("lisa", system, DataConfig(processor=PROCESSOR), (), generation=GenerationDefaults())
    return loading.from_params(experiment, talkative(system, batch_of([[5]]), SEG, 3.0))


@pytest.mark.slow
def test_an_answer_has_a_mask_of_the_image_for_each_mask_token_and_its_box_in_the_text(model):
    image = np.random.default_rng(3).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    first, second = model.answer([image, image], ["Segment the star.", "Where is a ring?"])
    for answer in (first, second):
        count = min(answer.token_ids.count(SEG), model.vlm.max_masks)
        assert answer.masks.shape == (count, 20, 30)
        filled = [mask for mask in answer.masks if mask.any()]
        assert answer.boxes.shape == (len(filled), 4)
        for mask, (x0, y0, x1, y1) in zip(filled, answer.boxes):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            np.testing.assert_allclose((x0 * 30, x1 * 30), (columns[0], columns[-1] + 1))
            np.testing.assert_allclose((y0 * 20, y1 * 20), (rows[0], rows[-1] + 1))
        assert answer.text.count("[") == answer.token_ids.count(SEG)
    assert len(first.masks) + len(second.masks) >= 2
    # An earlier answer with masks stands in the prompt as mask tokens, and its masks are not returned again.
    (later,) = model.answer([image], ["And the ring?"], history=[[("Segment the star.", "It is [0.1,0.1,0.5,0.5].")]])
    assert len(later.masks) == min(later.token_ids.count(SEG), model.vlm.max_masks - 1)


@pytest.mark.slow
def test_a_long_list_of_questions_is_answered_in_slots_with_the_masks_of_each(model, monkeypatch):
    monkeypatch.setattr(engine, "BATCH_SIZE_BUCKETS", (1, 2, 4))
    images = list(np.random.default_rng(4).integers(0, 255, (6, 20, 30, 3), np.uint8))
    prompts = [f"Segment the star{'!' * k}" for k in range(6)]
    together = model.answer(images, prompts)
    for image, prompt, answer in zip(images, prompts, together):
        (alone,) = model.answer([image], [prompt])
        assert answer.token_ids == alone.token_ids
        np.testing.assert_allclose(answer.masks.mean(axis=(1, 2)), alone.masks.mean(axis=(1, 2)), atol=1e-2)
    assert sum(len(answer.masks) for answer in together) > 2


def test_a_box_cannot_be_asked_about(model):
    with pytest.raises(UserError, match="say in words what is meant"):
        model.answer([np.zeros((8, 8, 3), np.uint8)], ["What is {box}?"], boxes=[[(0.1, 0.1, 0.5, 0.5)]])
