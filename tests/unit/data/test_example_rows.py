# SPDX-License-Identifier: Apache-2.0
"""Rows of several examples: which share a row, how long it is, what stands where, and what is refused."""

import dataclasses

import numpy as np
import pytest
from text_batches import batch_of, padded

from lionjax.core.errors import UserError
from lionjax.core.experiment import Stage
from lionjax.core.types import IMAGE_TOKEN, Batch, RowLayout
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.example_rows import (
    RowBatches,
    balanced_rows,
    count_row_tokens,
    example_lengths,
    pack_batch,
    round_up_length,
)
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes

IMAGE, BOX = 7, 8
SPLICED = RowLayout(IMAGE, tokens_per_image=3)
EXPANDED = RowLayout(IMAGE, tokens_per_image=2, is_expanded=True, box_token_id=BOX)


def batch(prompts, targets, images: int = 1, **fields) -> Batch:
    number = np.arange(len(prompts) * images, dtype=np.float32).reshape(
        len(prompts), *(images,) * (images > 1), 1, 1, 1
    )
    return batch_of(number, padded(prompts), padded(targets), **fields)


def tight(row: int, target: int) -> tuple[int, int]:
    return row, target


@pytest.mark.parametrize("examples_per_row", [2, 4, 8])
def test_rows_are_nearly_equally_long_and_hold_each_example_once(examples_per_row):
    length_B = 600 + np.random.default_rng(0).exponential(150, 128).astype(int)
    index_RM = balanced_rows(length_B, examples_per_row)
    assert sorted(index_RM.ravel()) == list(range(128))
    sums = length_B[index_RM].sum(axis=1)
    # No rows are shorter than their mean, or than the longest example with the shortest ones.
    sorted_B = np.sort(length_B)
    shortest = max(sums.mean(), sorted_B[-1] + sorted_B[: examples_per_row - 1].sum())
    assert sums.max() <= 1.01 * shortest < length_B.reshape(-1, examples_per_row).sum(axis=1).max()
    np.testing.assert_array_equal(index_RM, balanced_rows(length_B, examples_per_row))


@pytest.mark.parametrize("needed", [1, 8, 130, 1000, 2000, 2049, 6000])
def test_a_length_without_buckets_is_at_most_a_sixteenth_longer(needed):
    length = round_up_length(needed)
    assert needed <= length <= max(8, needed * 17 / 16) and length % 8 == 0


def test_a_row_has_the_shortest_bucket_that_holds_it_and_a_longer_row_is_refused():
    assert round_up_length(100, (96, 128, 256)) == 128
    with pytest.raises(UserError, match=r"takes 257 tokens.*longest of data.length_buckets is 256.*examples_per_row"):
        round_up_length(257, (96, 128, 256))


def test_a_row_has_prompt_and_target_of_each_example_in_turn_with_their_images():
    examples = batch([[1, IMAGE, 2], [3], [IMAGE, IMAGE, 4], [5, 6]], [[11], [12, 13, 14], [15, 16], [17]])
    loss_mask = examples.target_mask_BM.copy()
    loss_mask[1, 1] = 0
    examples = dataclasses.replace(examples, loss_mask_BM=loss_mask)
    rows = pack_batch(examples, SPLICED, 4, tight)
    x = IMAGE_TOKEN
    # The second image token of the third example has no image.
    np.testing.assert_array_equal(rows.prompt_BL, [[1, x, x, x, 2, 11, 3, 12, 13, 14, x, x, x, 4, 15, 16, 5, 6, 17]])
    np.testing.assert_array_equal(rows.segment_BL, [[1] * 6 + [2] * 4 + [3] * 6 + [4] * 3])
    np.testing.assert_array_equal(rows.target_BM, [[11, 12, 13, 14, 15, 16, 17]])
    np.testing.assert_array_equal(rows.loss_mask_BM, [[1, 1, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rows.prompt_BL[0][rows.target_index_BM[0]], rows.target_BM[0])
    np.testing.assert_array_equal(rows.record_B, [[0, 1, 2, 3]])
    assert rows.image_BHWC.ravel().tolist() == [0, 2, 1, 3]  # those in the row first
    assert count_row_tokens(rows, SPLICED) == (19, 19)
    # Of one example in a row: texts of 3 + 3 places and 3 image tokens.
    assert count_row_tokens(examples, SPLICED) == (19, 4 * 9)


def test_images_stand_in_front_of_prompts_without_a_token_where_the_model_puts_them_there():
    examples = batch([[1], [2, IMAGE]], [[11], [12]], images=2)
    layout = dataclasses.replace(SPLICED, prepends_images=True)
    rows = pack_batch(examples, layout, 2, tight)
    x = IMAGE_TOKEN
    np.testing.assert_array_equal(rows.prompt_BL, [[*[x] * 6, 1, 11, 2, x, x, x, 12]])
    assert rows.image_BHWC.ravel().tolist() == [0, 1, 2, 3]
    assert example_lengths(examples, layout)[0].tolist() == [8, 5]


def test_cached_features_follow_their_images():
    examples = batch([[1], [IMAGE]], [[11], [12]])
    features = {"patches": np.arange(2 * 3).reshape(2, 3, 1)}
    rows = pack_batch(dataclasses.replace(examples, image_BHWC=None, features=features), SPLICED, 2, tight)
    assert rows.image_BHWC is None and rows.features["patches"][0, :, 0, 0].tolist() == [3, 0]


def test_boxes_with_a_token_come_first_in_the_order_of_the_row():
    box = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    mask = np.array([[1, 0], [1, 1], [1, 0]])
    prompts = [[1, IMAGE, IMAGE], [BOX, 2], [3]]  # the first example's box stands in digits
    examples = batch(prompts, [[11], [BOX, 12], [BOX]], boxes_BK4=box, boxes_mask_BK=mask)
    rows = pack_batch(examples, EXPANDED, 3, tight)
    np.testing.assert_array_equal(rows.boxes_BK4[0, :4], [box[1, 0], box[1, 1], box[2, 0], box[0, 0]])
    np.testing.assert_array_equal(rows.boxes_mask_BK, [[1, 1, 1, 1, 0, 0]])


REFUSED = {
    r"3 examples .* do not divide into rows of 2": (SPLICED, [[1], [1], [1]], 2),
    r"record 1 has no token before its answer": (SPLICED, [[1], []], 2),
    r"an example of 5 tokens does not fit the 4 learned positions": (
        dataclasses.replace(SPLICED, max_positions=4),
        [[1], [1, IMAGE]],
        2,
    ),
    r"a prompt has 1 image tokens, but an image takes 2": (EXPANDED, [[1], [1, IMAGE]], 2),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_examples_that_have_no_place_in_a_row_are_refused_in_one_sentence(sentence):
    layout, prompts, examples_per_row = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        pack_batch(batch(prompts, [[11]] * len(prompts)), layout, examples_per_row, tight)


def test_a_stage_refuses_numbers_of_examples_that_do_not_divide_its_batch():
    fields = {"name": "one", "steps": 1, "trainable": (".*",), "mixture": (("vqa", 1.0),), "batch_size": 8}
    assert Stage(**fields, examples_per_row=4).num_rows == 2
    with pytest.raises(UserError, match=r"examples_per_row is 0; it must be at least 1"):
        Stage(**fields, examples_per_row=0)
    with pytest.raises(UserError, match=r"batch_size is 8; it must be a multiple of examples_per_row=4 times grad_"):
        Stage(**fields, examples_per_row=4, grad_accum_steps=4)


# ---------------------------------------------------------------------- the stream

PROCESSOR = ProcessorConfig(
    32,
    **{"max_prompt_tokens": 96, "max_question_tokens": 64, "max_target_tokens": 48},
    reader="decoder",
    use_tags=False,
    prompt_template="{image} {question}",
    image_token=IMAGE,
)
DATA = DataConfig(sources=(Scenes(sizes=(40, 4, 6), image_size=32),), processor=PROCESSOR, num_threads=0)
MIXTURE = (("vqa", 1.0), ("rec", 2.0), ("caption", 1.0))
LAYOUT = RowLayout(IMAGE, tokens_per_image=4)


def stream(data: DataConfig, index: int = 0, count: int = 1) -> pipeline.BatchIterator:
    return pipeline.batches(data, Stage("rows", 1, (".*",), MIXTURE, 8), 0, 8, index, count)


def packed_stream(number: int, index: int = 0, count: int = 1, agree=None, position=None) -> list[Batch]:
    rows = RowBatches(stream(DATA, index, count), LAYOUT, 4, agree=agree)
    if position is not None:
        rows.restore(position)
    batches = [next(rows) for _ in range(number)]
    batches.append(rows.position())
    rows.close()
    return batches


def test_a_packed_stream_has_the_examples_and_positions_of_the_unpacked_one():
    plain = stream(DATA)
    *packed, position = packed_stream(3)
    for rows in packed:
        examples = next(plain)
        assert rows.record_B.shape == (2, 4)
        assert sorted(rows.record_B.ravel()) == sorted(examples.record_B)
        assert rows.loss_mask_BM.sum() == examples.loss_mask_BM.sum()
        # Fewer positions are padding, and those that are not are the same number.
        tokens, positions = count_row_tokens(rows, LAYOUT)
        assert tokens == count_row_tokens(examples, LAYOUT)[0] and positions < count_row_tokens(examples, LAYOUT)[1] / 3
    assert position == plain.position()
    plain.close()


def test_a_packed_stream_goes_on_from_a_position_with_the_same_rows():
    *whole, _ = packed_stream(5)
    *_, position = packed_stream(3)
    *rest, _ = packed_stream(2, position=position)
    for one, other in zip(rest, whole[3:], strict=True):
        for field in ("prompt_BL", "segment_BL", "target_BM", "image_BHWC", "record_B"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_processes_that_agree_have_rows_of_one_length_with_the_examples_of_one_process():
    *alone, _ = packed_stream(2)
    needed: list[tuple[int, int]] = []

    def keep(row, target):
        needed.append((row, target))
        return row, target

    for index in range(2):
        packed_stream(2, index, 2, keep)
    largest = np.maximum(needed[:2], needed[2:])
    parts = []
    for index in range(2):
        answers = iter(largest.tolist())
        parts.append(packed_stream(2, index, 2, lambda *_, answers=answers: next(answers))[:2])
    for one, first, second in zip(alone, *parts):
        assert first.prompt_BL.shape == second.prompt_BL.shape and first.target_BM.shape == second.target_BM.shape
        assert sorted(one.record_B.ravel()) == sorted([*first.record_B.ravel(), *second.record_B.ravel()])


def test_length_buckets_of_two_processes_hold_the_longest_text_of_both():
    data = dataclasses.replace(DATA, length_buckets=(16, 32, 48, 64, 96))
    parts = [stream(data, index, 2) for index in range(2)]
    needed: list[tuple[int, ...]] = []
    for part in parts:
        part.choose_lengths_with(lambda *given: needed.append(given) or given)
        next(part)
    largest = [max(pair) for pair in zip(*needed)]
    assert needed[0] != needed[1]
    for part in parts:
        part.restore({**part.position(), "next": 0})
        part.choose_lengths_with(lambda *_: largest)
    first, second = map(next, parts)
    for name in ("prompt_BL", "question_BL", "target_BM"):
        assert getattr(first, name).shape == getattr(second, name).shape
    assert first.prompt_BL.shape[1] == round_up_length(largest[0], data.length_buckets)
    for part in parts:
        part.close()
