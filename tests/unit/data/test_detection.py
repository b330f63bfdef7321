# SPDX-License-Identifier: Apache-2.0
"""Captions of detectors: which tokens name which box, cuts, names of scenes, batches."""

import numpy as np
import pytest

from lionjax.core.experiment import Mix, Stage
from lionjax.core.types import ModelInfo, UserError
from lionjax.data import pipeline, tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.detection import encode_detection
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes import naming, tasks, world
from lionjax.data.scenes.dataset import Scenes
from lionjax.tiny.tokenizer import wordpiece_vocabulary

BOX, OTHER = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.9, 0.9)


@pytest.fixture(scope="module")
def words():
    return tokenizer.load("tiny_wordpiece")


def named(words, row, k: int) -> list[str]:
    return [words.backend.id_to_token(int(i)) for i in row["question"][row["box_tokens"][k]]]


def test_the_shipped_vocabulary_is_what_its_command_writes_and_holds_the_words_of_scenes(words):
    assert tokenizer.TINY_WORDPIECE_FILE.read_text().split() == wordpiece_vocabulary()
    scene_words = (*world.SHAPES, *world.COLORS, *world.TEXTURES, *world.SIZES)
    assert all(words.token_to_id(word) for word in scene_words)
    assert tokenizer.tokenizer_files("tiny_wordpiece") == {"vocab.txt": tokenizer.TINY_WORDPIECE_FILE}


@pytest.mark.parametrize("caption", ["Red circle. star. red", "red circle, star, red."])
def test_each_box_has_the_tokens_of_its_names_and_no_others(words, caption):
    row = encode_detection(words, caption, (BOX, OTHER), (("red", "star"), ("red circle",)), 12, 3)
    assert sorted(named(words, row, 0)) == ["red", "star"] and named(words, row, 1) == ["red", "circle"]
    assert row["boxes_mask"].tolist() == [1, 1, 0] and not row["box_tokens"][2].any()
    np.testing.assert_array_equal(row["boxes"][:2], np.float32([BOX, OTHER]))
    used = row["question"][row["question_mask"].astype(bool)]
    assert [used[0], used[-2], used[-1]] == [words.bos_ids[0], words.token_to_id("."), words.eos_id]


def test_a_long_caption_is_cut_at_its_end_with_the_names_behind_the_cut(words):
    row = encode_detection(words, "red circle. blue star.", (BOX, OTHER), (("red circle",), ("blue star",)), 5, 2)
    assert row["question"].shape == (5,) and row["question_mask"].all()
    assert named(words, row, 0) == ["red", "circle"] and named(words, row, 1) == ["blue"]


def test_names_that_a_caption_lacks_and_too_many_boxes_are_refused_in_a_sentence(words):
    with pytest.raises(UserError, match="the caption 'red star.' has no 'star'; write the names of all boxes"):
        encode_detection(words, "red star.", (BOX,), (("star",),), 9, 1)
    with pytest.raises(UserError, match="names 2 boxes, but at most 1 are allowed; raise processor.max_boxes"):
        encode_detection(words, "star.", (BOX, BOX), (("star",), ("star",)), 9, 1)


@pytest.mark.parametrize("kind", naming.KINDS)
def test_captions_of_scenes_name_every_object_that_has_the_name(kind):
    absent = held_out = 0
    for index, split in enumerate(("train", "heldout") * 20):
        scene = world.sample_scene(split, index)
        example = tasks.detect(scene, np.random.default_rng(index), kind)
        names = example.question.rstrip(".").split(", " if kind == "tags" else ". ")
        for name in names:
            true = {t.box for t in scene.things if set(name.split()) <= {t.color, t.shape}}
            assert true == {box for box, own in zip(example.boxes, example.box_names) if name in own}
            absent += not true
            held_out += split == "train" and tuple(name.split()) in world.HELD_OUT_PAIRS
        assert len(set(names)) == len(names)
    assert absent > 10 and not held_out


def test_batches_of_a_detector_hold_captions_boxes_and_their_tokens(words):
    sizes = {"image_size": 16, "max_question_tokens": 40, "max_prompt_tokens": 90, "max_target_tokens": 1}
    processor = ProcessorConfig(**sizes, question_tokenizer="tiny_wordpiece", max_boxes=8, use_tags=False)
    data = DataConfig((Scenes((8, 1, 1), 16),), processor, num_threads=0).for_model(ModelInfo(detects_phrases=True))
    batch = next(pipeline.batches(data, Stage("s", 1, ("**",), (Mix("detect"),), 4), 0, 4))
    assert batch.box_tokens_BKL.shape == (4, 8, 40) and batch.boxes_BK4.shape == (4, 8, 4)
    np.testing.assert_array_equal(batch.box_tokens_BKL.any(-1), batch.boxes_mask_BK.astype(bool))
    assert not (batch.box_tokens_BKL & (batch.question_mask_BL == 0)[:, None]).any()
    assert not batch.target_mask_BM.any()
