# SPDX-License-Identifier: Apache-2.0
"""LISA answers with masks: those of its answer's tokens, in words, per picture and turn by turn."""

import dataclasses

import jax
import numpy as np
import pytest
from small_lisa import MASK, PROCESSOR, SEG, TINY, batch_of
from text_batches import padded

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.types import UserError
from lionjax.data.pipeline import DataConfig
from lionjax.inference import loading
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


@pytest.fixture(scope="module")
def params():
    return talkative(TINY, batch_of([[5]]), MASK, 4.0)


PROMPTS = [[5, 6, 7], [8], [9, MASK, 11, 12, 13], [14, 15]]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_each_kept_state_is_the_one_that_predicts_its_mask_token(params, beams):
    """Also in beam search, of a token in the prompt, and of one that ends a truncated answer and is read by nobody."""
    config = GenerationConfig(max_new_tokens=NEW, num_beams=beams, eos_token_id=END, pad_token_id=0)
    batch = batch_of(PROMPTS)
    made = generate(TINY, params, batch, config)
    answers = [ids[:length].tolist() for ids, length in zip(np.asarray(made.ids_BM), np.asarray(made.length_B))]
    target_BM, mask_BM = padded(answers)
    spoken = dataclasses.replace(batch, target_BM=target_BM, target_mask_BM=mask_BM)

    def read(module, batch):
        return module.mask_states(batch, module.states_before(batch), TINY.max_masks)

    state_BKD, valid_BK = jax.jit(lambda params: LisaModule(TINY).apply({"params": params}, spoken, method=read))(
        params
    )
    valid_BK = np.asarray(valid_BK)
    counts = [prompt.count(MASK) + answer.count(MASK) for prompt, answer in zip(PROMPTS, answers)]
    np.testing.assert_array_equal(valid_BK.sum(axis=1), np.minimum(counts, TINY.max_masks))
    assert sum(counts) >= 3
    kept = np.asarray(made.aux_outputs["state"])
    np.testing.assert_allclose(kept[valid_BK], np.asarray(state_BKD)[valid_BK], atol=1e-3)


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


def test_a_box_cannot_be_asked_about(model):
    with pytest.raises(UserError, match="say in words what is meant"):
        model.answer([np.zeros((8, 8, 3), np.uint8)], ["What is {box}?"], boxes=[[(0.1, 0.1, 0.5, 0.5)]])
