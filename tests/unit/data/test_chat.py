# SPDX-License-Identifier: Apache-2.0
"""Rows of more than one question: rounds of a talk, captions alone, scenes in words, examples with their pictures."""

import dataclasses

import numpy as np
import pytest
from chat_prompts import PICTURE, decoder_prompts

from lionjax.core.experiment import Stage
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.chat import PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.data.scenes.dataset import Scenes
from lionjax.inference.model import build_inputs
from lionjax.nn import losses

GRAY = np.full((28, 28, 3), 99, np.uint8)
CHAT = decoder_prompts(
    max_target_tokens=64,
    prompt_template="USER: {image} {question} ASSISTANT:",
    followup_template="USER: {question} ASSISTANT:",
)
TURNS = (("How many stars?", "two"), ("Which color?", "red"))


def real(row, name):
    return row[name][row[f"{name}_mask"] == 1].tolist()


def test_every_answer_of_a_talk_is_learned_and_no_question_as_llava_masks_its_rounds():
    processor = Processor(CHAT)
    words, end = processor.tokenizer.encode, [processor.tokenizer.eos_id]
    row = processor.encode_example(GRAY, "Is it large?", answer="yes", prompt_format=PromptFormat("", TURNS))
    user, reply = words("USER:"), words("ASSISTANT:")
    start = processor.tokenizer.bos_ids
    assert real(row, "prompt") == [*start, *user, PICTURE, *words("How many stars?"), *reply]
    rounds = [  # text and whether it is learned, as LLaVA's preprocess_v1 has it: answers with their </s>
        (words("two") + end, 1),
        (user + words("Which color?") + reply, 0),
        (words("red") + end, 1),
        (user + words("Is it large?") + reply, 0),
        (words("yes") + end, 1),
    ]
    assert real(row, "target") == [number for ids, _ in rounds for number in ids]
    learned = [flag for ids, flag in rounds for _ in ids]
    assert row["loss_mask"].tolist() == learned + [0] * (64 - len(learned))
    batch = processor.collate({name: leaf[None] for name, leaf in row.items()}, length_buckets=(56,))
    assert batch.loss_mask_BM.tolist() == [(learned + [0] * 56)[:56]]


def test_a_talk_so_far_is_the_prompt_of_the_next_question_and_its_only_picture_stands_first():
    processor = Processor(CHAT)
    trained = processor.encode_example(GRAY, "Is it large?", answer="yes", prompt_format=PromptFormat("", TURNS))
    (prompt,) = processor.batch([ImageTextInput(GRAY, "Is it large?", turns=TURNS)]).prompt_BL
    whole = real(trained, "prompt") + real(trained, "target")
    end = len(whole) - len(processor.prompt.encode_target("yes"))
    assert prompt[:end].tolist() == whole[:end] and not prompt[end:].any()
    plain = Processor(dataclasses.replace(CHAT, followup_template=""))  # LION's way: one question that tells it all
    one = ImageTextInput(GRAY, "Is it large?", turns=TURNS[:1])
    told = dataclasses.replace(one, turns=(), question="Question: How many stars? Answer: two Question: Is it large?")
    np.testing.assert_array_equal(plain.batch([one]).prompt_BL, plain.batch([told]).prompt_BL)


def test_an_encoder_reads_all_rounds_but_the_last_answer():
    processor = Processor(dataclasses.replace(CHAT, reader="encoder"))
    row = processor.encode_example(GRAY, "Is it large?", answer="yes", prompt_format=PromptFormat("", TURNS))
    assert real(row, "target") == processor.prompt.encode_target("yes")
    assert row["loss_mask"].sum() == len(real(row, "target"))
    assert processor.tokenizer.encode("red")[0] in real(row, "prompt")


def test_a_plain_row_is_a_picture_and_its_caption_closed_as_the_first_stage_closes_it():
    processor = Processor(dataclasses.replace(CHAT, caption_end="<im_end>", answer_end="<im_start>"))
    row = processor.encode_example(GRAY, "What is this?", answer="a ring", prompt_format=PromptFormat("plain"))
    words = processor.tokenizer.encode("a ring")
    assert real(row, "prompt") == [*processor.tokenizer.bos_ids, PICTURE]
    assert real(row, "target") == [*words, processor.tokenizer.token_to_id("<im_end>")]
    asked = processor.encode_example(GRAY, "What is this?", answer="a ring")
    assert real(asked, "target") == [*words, processor.tokenizer.token_to_id("<im_start>")]


def rows_of(mixture, **processor):
    c = dataclasses.replace(CHAT, template="{image} {question}", **processor)
    data = DataConfig((Scenes((6, 2, 2), image_size=28),), c, num_threads=0)
    return next(pipeline.batches(data, Stage("any", 1, ("x",), mixture, 4), seed=0, batch_size=4)), Processor(c)


def test_scenes_told_in_words_show_no_picture_and_say_what_is_there():
    batch, processor = rows_of((("vqa@told", 1.0),))
    assert not (batch.prompt_BL == PICTURE).any()
    assert all("background. " in processor.tokenizer.decode(ids) for ids in batch.prompt_BL)


def test_rows_of_several_pictures_learn_each_answer_and_stand_beside_rows_of_one():
    batch, processor = rows_of((("vqa+2", 1.0), ("vqa", 1.0)), pictures=3, shot_end="</s>")
    assert batch.image_BHWC.shape == (4, 3, 28, 28, 3) and set(batch.dataset_B) == {0, 1}
    for row, part in enumerate(batch.dataset_B):
        ids = np.concatenate([batch.prompt_BL[row], batch.target_BM[row]])
        many = 1 if part else 3
        assert (ids == PICTURE).sum() == many
        # What no token stands for is blank: a picture of the mean color.
        assert (np.abs(batch.image_BHWC[row]).max((1, 2, 3)) > 0.1).tolist() == [True, not part, not part]
        said = np.diff(np.concatenate([[0], batch.loss_mask_BM[row], [0]]))
        assert (said == 1).sum() == many
        ends = batch.loss_mask_BM[row] * (batch.target_BM[row] == processor.tokenizer.eos_id)
        assert ends.sum() == many and not (batch.loss_mask_BM[row] * (batch.target_BM[row] == PICTURE)).any()


def test_each_data_set_counts_by_its_weight_whatever_its_share_of_the_tokens():
    numbers = np.random.default_rng(0)
    logits, target = numbers.standard_normal((5, 3, 7)), numbers.integers(0, 7, (5, 3))
    mask, part = numbers.integers(0, 2, (5, 3)), np.array([0, 1, 1, 0, 1])
    loss, metrics = losses.per_dataset_cross_entropy(logits, target, mask, part, (1.0, 0.2, 9.0))
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, target[..., None], -1)[..., 0]
    wanted = sum(w * (nats * mask)[part == n].sum() / mask[part == n].sum() for n, w in enumerate((1.0, 0.2)))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert metrics["weight"] == mask.sum()


@pytest.mark.parametrize(
    ("mixture", "said"), [("vqa@whispered", "choose one of"), ("vqa+some", "a number of examples")]
)
def test_a_form_that_does_not_exist_raises_a_one_sentence_error(mixture, said):
    with pytest.raises(UserError, match=said):
        rows_of(((mixture, 1.0),))


def test_history_and_shots_need_one_entry_per_prompt():
    with pytest.raises(UserError, match="2 history were given for 1 prompts"):
        build_inputs([GRAY], ["?"], None, None, None, [[], []])
    with pytest.raises(UserError, match=r"have \[0, 1\] shots"):
        build_inputs([GRAY] * 2, ["?"] * 2, None, None, None, None, [[], [(GRAY, "a?", "b")]])
