# SPDX-License-Identifier: Apache-2.0
"""Groups of a mixture: each batch is of one group, and the groups take turns, as in LION's published training code."""

import json

import numpy as np
import pytest

from lionjax.core.experiment import Mix, Stage
from lionjax.core.types import IMAGE_LEVEL, REGION_LEVEL
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes

SIZE = 8
DATA = DataConfig(
    (Scenes(sizes=(40, 4, 6), image_size=32),),
    ProcessorConfig(image_size=32, max_prompt_tokens=96, max_question_tokens=64, max_target_tokens=48),
    num_threads=0,
)
MIXTURE = (
    Mix("vqa", 9.0, group="image_level"),
    Mix("rec", 1.0, group="region_level"),
    Mix("caption", 3.0, group="image_level"),
)


def stream(size=SIZE, mixture=MIXTURE, index=0, count=1):
    return pipeline.batches(DATA, Stage("both", 1, (".*",), mixture, SIZE), 0, size, index, count)


def take(batches, number: int) -> list:
    taken = [next(batches) for _ in range(number)]
    batches.close()
    return taken


def levels(batches) -> list[set]:
    return [set(batch.task_B.tolist()) for batch in batches]


def test_batches_alternate_one_to_one_between_two_groups_whatever_their_weights():
    assert levels(take(stream(), 6)) == [{IMAGE_LEVEL}, {REGION_LEVEL}] * 3
    assert levels(take(stream(mixture=MIXTURE[1:]), 4)) == [{REGION_LEVEL}, {IMAGE_LEVEL}] * 2


def test_weights_count_within_a_group_and_every_record_comes_before_any_comes_again():
    batches = take(stream(), 20)
    entries = np.concatenate([batch.dataset_B for batch in batches[::2]])
    assert (entries == 0).sum() == 3 * (entries == 2).sum() == 60
    regions = np.concatenate([batch.record_B for batch in batches[1::2]])
    assert sorted(regions[:40]) == sorted(regions[40:]) == list(range(40))


@pytest.mark.parametrize("delivered", [2, 3])
def test_a_restored_stream_goes_on_with_the_group_whose_turn_it_is(delivered):
    whole, first = take(stream(), 6), stream()
    for _ in range(delivered):
        next(first)
    position = json.loads(json.dumps(first.position()))
    second = stream()
    second.restore(position)
    for batch, wanted in zip(take(second, 6 - delivered), whole[delivered:]):
        np.testing.assert_array_equal(batch.prompt_BL, wanted.prompt_BL)
        np.testing.assert_array_equal(batch.record_B, wanted.record_B)


def test_a_stream_that_resumes_with_another_batch_size_still_alternates():
    first = stream()
    take(first, 3)
    other = stream(size=5)
    other.restore(first.position())
    found = levels(take(other, 5))
    assert all(len(level) == 1 for level in found) and all(a != b for a, b in zip(found, found[1:]))


def test_processes_divide_each_batch_of_a_group():
    whole, parts = take(stream(), 4), [take(stream(index=i, count=2), 4) for i in range(2)]
    for step, batch in enumerate(whole):
        records = np.concatenate([part[step].record_B for part in parts])
        np.testing.assert_array_equal(records, batch.record_B)


def test_one_group_is_the_stream_of_a_mixture_without_groups():
    def prompts(group):
        mixture = (Mix("vqa", 1.0, group=group), Mix("rec", 2.0, group=group))
        return np.stack([batch.prompt_BL for batch in take(stream(mixture=mixture), 4)])

    np.testing.assert_array_equal(prompts(""), prompts("all"))
