# SPDX-License-Identifier: Apache-2.0
"""Sentences with slots for images, states and objects: placeholders and data in order, and what does not match."""

import dataclasses

import numpy as np
import pytest

from lionjax.core.errors import UserError
from lionjax.core.types import SentenceSlots
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.data.sentences import SlotData

SLOTS = SentenceSlots(state_width=3, max_states=2, num_state_tokens=2, max_objects=3)
CONFIG = ProcessorConfig(
    image_size=8,
    **{"max_prompt_tokens": 60, "max_question_tokens": 1, "max_target_tokens": 8},
    use_tags=False,
    reader="decoder",
    prompt_template="{image} {question}",
    num_image_tokens=4,
    image_token=-200,
    slots=SLOTS,
)
IMAGE = np.zeros((8, 8, 3), np.uint8)
MASKS = np.eye(3, dtype=bool)[:, :, None].repeat(8, 2).repeat(3, 1)[:, :8]
STATES = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def encode(text: str, states=STATES, masks=MASKS, config=CONFIG):
    return Processor(config).encode_input(ImageTextInput(IMAGE, text, slots=SlotData(states, masks)), "red")


def slots_of(row) -> list[int]:
    return [int(token) for token in row["prompt"][row["prompt_mask"] == 1] if token < 0]


def test_slots_stand_where_the_text_has_them_and_data_follow_their_order():
    row = encode("From <state> the red <obj_2> and <obj_1>, <image> then <obj_3> <state>?")
    assert slots_of(row) == [-201] * 2 + [-202] * 2 + [-200] * 4 + [-202] + [-201] * 2
    np.testing.assert_array_equal(row["object_masks"], MASKS[[1, 0, 2]])
    np.testing.assert_array_equal(row["states"], np.float32(STATES))
    batch = Processor(CONFIG).collate({name: np.stack([row[name]] * 2) for name in row})
    assert batch.state_BKS.shape == (2, 2, 3) and batch.object_mask_BKHW.shape == (2, 3, 8, 8)


def test_permuting_the_objects_with_their_tags_changes_nothing_else():
    order = [2, 0, 1]
    number = [order.index(k) + 1 for k in range(3)]  # of each object among the permuted ones
    before = encode("red <obj_1> blue <obj_2> green <obj_3>?", ())
    after = encode("red <obj_{}> blue <obj_{}> green <obj_{}>?".format(*number), (), MASKS[order])
    np.testing.assert_array_equal(before["prompt"], after["prompt"])
    np.testing.assert_array_equal(before["object_masks"], after["object_masks"])


def test_a_decoder_learns_all_answers_about_one_sentence_and_later_questions_may_have_slots():
    config = dataclasses.replace(CONFIG, max_target_tokens=40, followup_template="{question}")
    turns, last = (("Is <obj_1> red?", "yes"), ("Is <obj_2> blue?", "no")), "What is at <state>?"
    processor = Processor(config)
    row = processor.encode_input(ImageTextInput(IMAGE, last, turns=turns, slots=SlotData(STATES[:1], MASKS[:2])), "red")
    target = row["target"][row["target_mask"] == 1]
    learned = row["loss_mask"][row["target_mask"] == 1] == 1
    assert slots_of(row) == [-202] and [int(k) for k in target if k < 0] == [-202, -201, -201]
    ends = [processor.tokenizer.eos_id]
    answers = [token for said in ("yes", "no", "red") for token in (*processor.tokenizer.encode(said), *ends)]
    assert target[learned].tolist() == answers and not (target[learned] < 0).any()
    np.testing.assert_array_equal(row["object_masks"], MASKS * np.array([1, 1, 0], bool)[:, None, None])
    np.testing.assert_array_equal(row["states"][0], np.float32(STATES[0]))
    asked = ImageTextInput(IMAGE, last, turns=turns, slots=SlotData(STATES[:1], MASKS[:2]))
    prompt = slots_of(processor.encode_input(asked))
    assert prompt == [-202, -202, -201, -201], "in generation all turns are in the prompt"


def test_a_question_without_slots_has_its_image_in_front_and_empty_data():
    row = encode("What is red?", (), ())
    assert slots_of(row) == [-200] * 4 and not row["states"].any() and not row["object_masks"].any()
    plain = dataclasses.replace(CONFIG, slots=None)
    row = Processor(plain).encode_input(ImageTextInput(IMAGE, "What is <state>?"))
    assert slots_of(row) == [-200] * 4 and "states" not in row


@pytest.mark.parametrize(
    ("text", "states", "masks", "words"),
    [
        ("From <state>?", STATES, (), "has 1 state slots, but 2 states were given; give one for each slot"),
        ("Only <obj_1> <obj_2>?", (), MASKS, r"names the objects \[1, 2\], but 3 were given"),
        ("Is <obj_1> red?", (), (), "has slots of objects, but no object was given"),
        ("<obj_1> <obj_2> <obj_3> <obj_1>?", (), MASKS, "has 4 object slots, but this model reads at most 3"),
        ("From <state>?", ((1.0, 2.0),), (), "a state has 2 numbers, but this model reads 3 finite ones"),
        ("From <state>?", ((1.0, 2.0, float("nan")),), (), "reads 3 finite ones"),
        ("Now <image> and <image>?", (), (), "has 2 image slots, but 1 images were given"),
        ("What is red?", STATES[:1], (), "has 0 state slots, but 1 states were given"),
    ],
)
def test_slots_that_do_not_match_their_data_are_one_clear_sentence(text, states, masks, words):
    with pytest.raises(UserError, match=words) as error:
        encode(text, states, masks)
    assert "\n" not in str(error.value)


def test_the_numbers_of_the_slots_are_checked():
    with pytest.raises(ValueError, match=r"slots.state_width is 3 and slots.max_states 0; set both or neither"):
        SentenceSlots(state_width=3)
    with pytest.raises(UserError, match=r"slots.max_objects is -1"):
        SentenceSlots(max_objects=-1)
