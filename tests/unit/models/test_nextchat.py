# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat talks about places: what it says it saw, beams, unequal prompts, and batches without a box."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nextchat import END, LOCATION, TINY, TRIGGER, batch_of

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.vlm.nextchat import NextChat

NEW = 10


@pytest.fixture(scope="module")
def params():
    """Random ones, made to talk: body and head are larger, and triggers likelier, than training would begin with."""
    made = sharding.init_sharded(TINY.init, jax.random.key(0), batch_of([[5]]))
    random = np.random.default_rng(10)
    flat = {
        path: np.asarray(leaf) + 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in trees.flatten(made).items()
    }
    flat["language/head/kernel"][:, TRIGGER] *= 2.5
    return trees.unflatten(flat)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_each_returned_box_equals_the_box_decoded_from_the_answer_tokens(params, beams):
    """Also in beam search, where states must follow their beams; read again at once, with the boxes as inputs."""
    config = GenerationConfig(
        max_new_tokens=NEW, num_beams=beams, eos_token_id=END, pad_token_id=0, decoder_start_token_id=None
    )
    made = generate(TINY, params, batch_of(PROMPTS), config)
    answers = [ids[:length].tolist() for ids, length in zip(np.asarray(made.ids_BM), np.asarray(made.length_B))]
    kept = {name: np.asarray(leaf) for name, leaf in made.aux_outputs.items()}
    fed = [answer[:-1].count(TRIGGER) for answer in answers]  # at the last word nothing was read
    np.testing.assert_array_equal(kept["count"], fed)
    assert sum(fed) >= 3, "the model must say some places"
    assert len({tuple(answer) for answer in answers}) == len(answers)
    for answer in answers:
        for place, token in enumerate(answer[:-1]):
            assert (token == TRIGGER) == (answer[place + 1] == LOCATION)
    spoken = batch_of(PROMPTS, answers, [row[:count] for row, count in zip(kept["box"], fed)])
    box_BK4, state_BKD, real_BK = jax.jit(TINY.predict_boxes)(params, spoken)
    for row, count in enumerate(fed):
        assert np.asarray(real_BK)[row, :count].all()
        np.testing.assert_allclose(kept["box"][row, :count], np.asarray(box_BK4)[row, :count], atol=1e-4)
        np.testing.assert_allclose(kept["state"][row, :count], np.asarray(state_BKD)[row, :count], atol=1e-3)
        assert not kept["box"][row, count:].any()


@pytest.mark.slow
def test_an_answer_in_a_batch_of_unequal_prompts_is_the_one_given_alone(params):
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=END, pad_token_id=0, decoder_start_token_id=None)
    together = generate(TINY, params, batch_of(PROMPTS), config)
    longest = batch_of(PROMPTS)
    for row in (0, 1):
        only = jax.tree.map(lambda leaf, row=row: leaf[[row]], longest)
        length = int(only.prompt_mask_BL.sum())
        short = dataclasses.replace(
            only, prompt_BL=only.prompt_BL[:, :length], prompt_mask_BL=only.prompt_mask_BL[:, :length]
        )
        alone = generate(TINY, params, short, config)
        np.testing.assert_array_equal(alone.ids_BM[0], together.ids_BM[row])
        np.testing.assert_allclose(alone.aux_outputs["box"][0], together.aux_outputs["box"][row], atol=1e-5)


@pytest.mark.slow
def test_a_trigger_that_ends_a_prompt_gets_a_box_and_one_that_ends_an_answer_gets_none(params):
    prompt = batch_of([[5, 6, TRIGGER], [7, 8]])
    made = generate(
        TINY,
        params,
        prompt,
        GenerationConfig(max_new_tokens=2, eos_token_id=END, pad_token_id=0, decoder_start_token_id=None),
    )
    assert made.ids_BM[0, 0] == LOCATION and made.aux_outputs["count"][0] == 1
    read, _ = jax.jit(TINY.prefill, static_argnums=2)(params, prompt, 1)
    assert np.asarray(read)[0].argmax() == LOCATION and (np.delete(np.asarray(read)[0], LOCATION) < -1e29).all()
    assert (np.delete(np.asarray(read)[1], LOCATION) > -1e29).all() and np.asarray(read)[1, LOCATION] < -1e29


@pytest.mark.slow
def test_boxes_beyond_max_boxes_are_counted_and_leave_the_first_unchanged(params):
    def talk(system):
        def say(params, batch):
            _, cache = system.prefill(params, batch, 5)
            for token in (TRIGGER, LOCATION, TRIGGER, LOCATION):
                _, cache = system.extend(params, jnp.full(1, token), cache)
            return cache.generated["kept"]

        return jax.jit(say)(params, batch_of([[5, 6]]))

    few, many = talk(dataclasses.replace(TINY, max_boxes=1)), talk(TINY)
    assert few["count"][0, 0] == many["count"][0, 0] == 2
    np.testing.assert_allclose(few["box"][0, 0, 0], many["box"][0, 0, 0], atol=1e-6)
    assert np.abs(many["box"][0, 0, 1]).sum() > 0 and few["box"].shape[2] == 1


@pytest.mark.slow
def test_masks_of_an_answer_come_from_its_boxes_and_states(params):
    batch = batch_of([[5], [6]])
    box = jnp.asarray([[[0.1, 0.1, 0.6, 0.9], [0.5, 0.5, 0.9, 0.9]]] * 2)
    state = jax.random.normal(jax.random.key(1), (2, 2, 16))
    masks = jax.jit(TINY.predict_masks)
    logits, iou = masks(params, batch, box, state)
    assert logits.shape == (2, 2, 16, 16) and iou.shape == (2, 2) and np.isfinite(logits).all()
    again, _ = masks(params, batch, box, state.at[0, 1].add(1.0))
    changed = np.abs(np.asarray(logits - again)).max((2, 3)) > 1e-5
    np.testing.assert_array_equal(changed, [[False, True], [False, False]])
    features = jax.jit(TINY.extract_features)(params, batch)
    seen = dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)
    np.testing.assert_allclose(masks(params, seen, box, state)[0], logits, atol=1e-5)


@pytest.mark.slow
def test_sam_encodes_each_image_once_for_any_number_of_boxes(params):
    def operations(boxes: int) -> float:
        box, state = jnp.zeros((2, boxes, 4)), jnp.zeros((2, boxes, 16))
        return jax.jit(TINY.predict_masks).lower(params, batch_of([[5], [6]]), box, state).cost_analysis()["flops"]

    def seeing() -> float:
        system = dataclasses.replace(TINY)
        bare = dataclasses.replace(batch_of([[5], [6]], sam=False), boxes_BK4=None)
        both = jax.jit(system.extract_features).lower(params, batch_of([[5], [6]])).cost_analysis()["flops"]
        return both - jax.jit(system.extract_features).lower(params, bare).cost_analysis()["flops"]

    one, three, five = map(operations, (1, 3, 5))
    each = (three - one) / 2
    assert five - three == pytest.approx(2 * each, rel=0.02)
    assert one - each == pytest.approx(seeing(), rel=0.05)  # what is left when no box is asked about


@pytest.mark.slow
def test_the_weight_of_giou_is_the_configs(params):
    batch = batch_of(ASKED, ANSWERS, GIVEN)
    (_, code), _ = slopes("language")(params, batch)
    _, paper = jax.jit(dataclasses.replace(TINY, giou_weight=0.8).loss)(params, batch)
    assert TINY.giou_weight == 0.2 and float(code["loss_giou"]) > 0
    assert float(paper["loss_giou"]) == pytest.approx(4 * float(code["loss_giou"]), rel=1e-5)
    assert float(paper["loss_l1"]) == pytest.approx(float(code["loss_l1"]), rel=1e-5)


ANSWERS = [[20, TRIGGER, LOCATION, 21, TRIGGER, LOCATION, END], [22, 23, END]]
ASKED = [[5, TRIGGER, LOCATION, 6], [7]]
SAID = [[0.1, 0.2, 0.5, 0.7], [0.3, 0.3, 0.9, 0.8]]  # in the answer, after one that the question asks about
GIVEN = [[[0.0, 0.0, 0.2, 0.2], *SAID], []]


@functools.cache
def slopes(objective: str):
    system = dataclasses.replace(TINY, objective=objective)
    return jax.jit(jax.value_and_grad(lambda params, batch: system.loss(params, batch), has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["language", "masks"])
def test_rows_without_a_box_do_not_enter_the_box_losses(params, objective):
    mixed = batch_of(ASKED, ANSWERS, GIVEN)
    (loss, terms), grads = slopes(objective)(params, mixed)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    spoiled = mixed.boxes_BK4.copy()
    spoiled[1] = 5.0  # nonsense where no box is real
    (_, other), _ = slopes(objective)(params, dataclasses.replace(mixed, boxes_BK4=spoiled))
    for name in terms:
        assert float(terms[name]) == pytest.approx(float(other[name]), rel=1e-5), name
    bare = dataclasses.replace(
        batch_of(ASKED, [[20, 21, END, 0, 0, 0, 0], ANSWERS[1]], GIVEN), boxes_mask_BK=np.zeros((2, 3), bool)
    )
    (loss, terms), grads = slopes(objective)(params, bare)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    places = {"l1", "giou", "cycle_state", "cycle_box"} if objective == "language" else {"focal", "dice", "iou"}
    assert all(terms[f"loss_{name}"] == 0 for name in places)


@pytest.mark.slow
def test_objective_all_is_the_sum_of_language_and_mask_losses(params):
    """The objective "all" is the sum of both others, and so are its slopes."""
    mixed = batch_of(ASKED, ANSWERS, GIVEN)
    (whole, terms), grads = slopes("all")(params, mixed)
    (words, _), of_words = slopes("language")(params, mixed)
    (masks, told), of_masks = slopes("masks")(params, mixed)
    assert float(whole) == pytest.approx(float(words) + float(masks), rel=1e-5)
    assert set(told) <= set(terms) and float(terms["loss_dice"]) == pytest.approx(float(told["loss_dice"]), rel=1e-5)
    for one, two, three in zip(*map(jax.tree.leaves, (grads, of_words, of_masks))):
        np.testing.assert_allclose(one, two + three, atol=1e-5, rtol=1e-4)


def test_the_second_trigger_of_an_answer_means_the_second_box(params):
    batch = batch_of(ASKED, ANSWERS, GIVEN)
    (_, terms), _ = slopes("language")(params, batch)
    box_BK4, _, real_BK = jax.jit(TINY.predict_boxes)(params, batch)
    assert np.asarray(real_BK).tolist() == [[True, True, False], [False] * 3]
    wanted = 2 * np.abs(np.asarray(box_BK4)[0, :2] - np.float32(SAID)).mean()
    assert float(terms["loss_l1"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_the_vicuna_sizes_are_those_of_the_release():
    made = sharding.abstract_params(NextChat().init, jax.random.key(0), full_batch())
    assert trees.count_params(made) - 2 * 128 == 7_741_812_788


def full_batch() -> Batch:
    ids, row = np.zeros((1, 8), np.int32), np.zeros(1, np.int32)
    return Batch(np.zeros((1, 336, 336, 3), np.float32), ids, ids, None, None, ids, ids, ids, row, row)
