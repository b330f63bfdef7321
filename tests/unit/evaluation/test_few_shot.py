# SPDX-License-Identifier: Apache-2.0
"""Examples of training data before a question: which are chosen, where they stand, and what a row of them says."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from chat_prompts import PICTURE, decoder_prompts

from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.processor import Processor
from lionjax.data.scenes.dataset import Scenes
from lionjax.evaluation import runner
from lionjax.evaluation.few_shot import FewShot

PROMPTS = decoder_prompts(max_target_tokens=16, shot_end="</s>")
DATA = DataConfig((Scenes((12, 2, 2), image_size=28),), PROMPTS, num_threads=0)


class Sees:
    """A tower that sees the pixels themselves."""

    def extract_features(self, params, batch):
        return batch.image_BHWC.reshape(len(batch.image_BHWC), 1, -1)


ANSWERER = SimpleNamespace(model=Sees(), params={}, processor=Processor(PROMPTS))


def test_the_most_similar_shot_is_last_and_random_shots_do_not_depend_on_the_image():
    alike, drawn = (FewShot(ANSWERER, DATA, "vqa", 3, how, pool_size=12) for how in ("alike", "random"))
    sample = next(pipeline.examples(DATA, "vqa", "train", 1))
    pixels = ANSWERER.processor.load_pixels(sample.image)
    chosen = alike.select(sample, pixels)
    flat = np.stack([ANSWERER.processor.normalize(p).ravel() for p in (*alike.pool_pixels, pixels)])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert chosen == np.argsort(flat[:-1] @ flat[-1])[-3:].tolist()
    np.testing.assert_array_equal(alike.pool_pixels[chosen[-1]], pixels)  # the picture itself is in the pool
    assert drawn.select(sample, pixels) == drawn.select(sample, pixels[::-1])
    assert len(set(drawn.select(sample, pixels))) == 3


def test_few_shot_rows_have_the_examples_in_order_and_the_question_last():
    shown = FewShot(ANSWERER, DATA, "vqa", 2, "alike", pool_size=12)
    samples = list(pipeline.examples(DATA, "vqa", "heldout", 2))
    for sample, rows in runner.encode_samples(ANSWERER.processor, DATA, samples, False, "vqa", shown):
        pixels, row = ANSWERER.processor.load_pixels(sample.image), rows[False]
        which = shown.select(sample, pixels)
        np.testing.assert_array_equal(row["pixels"], [*(shown.pool_pixels[k] for k in which), pixels])
        words, end = ANSWERER.processor.tokenizer.encode, ANSWERER.processor.tokenizer.eos_id
        wanted = [
            part
            for k in which
            for part in (PICTURE, *words(shown.pool_turns[k][0]), *words(shown.pool_turns[k][1]), end)
        ]
        wanted += [PICTURE, *words(sample.example.question)]
        assert row["prompt"][row["prompt_mask"] == 1].tolist() == wanted


def test_zero_shot_prompts_can_have_two_text_only_examples():
    shown = FewShot(ANSWERER, DATA, "vqa", 0, use_text_examples=True, pool_size=12)
    (sample,) = pipeline.examples(DATA, "vqa", "heldout", 1)
    ((_, rows),) = runner.encode_samples(ANSWERER.processor, DATA, [sample], False, "vqa", shown)
    row = rows[False]
    assert row["pixels"].shape == (28, 28, 3) and (row["prompt"] == PICTURE).sum() == 1
    assert (row["prompt"] == ANSWERER.processor.tokenizer.eos_id).sum() == 2
    bare = dataclasses.replace(shown, use_text_examples=False)
    ((_, rows),) = runner.encode_samples(ANSWERER.processor, DATA, [sample], False, "vqa", bare)
    assert not (rows[False]["prompt"] == ANSWERER.processor.tokenizer.eos_id).any()


def test_invalid_few_shot_settings_raise_a_one_sentence_error():
    with pytest.raises(UserError, match="random or alike"):
        FewShot(ANSWERER, DATA, "vqa", 1, "best")
    with pytest.raises(UserError, match="num_shots is 13 but the pool has 12"):
        FewShot(ANSWERER, DATA, "vqa", 13, pool_size=12)
