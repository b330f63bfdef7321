# SPDX-License-Identifier: Apache-2.0
"""Box format "masks": one token where an answer has a mask, and SAM's image and masks in the corner of its square."""

import dataclasses

import numpy as np
import pytest
import small_lisa
from PIL import Image
from small_lisa import SEG

from lionjax.core.experiment import Stage
from lionjax.core.types import UserError
from lionjax.data import boxes, letterbox
from lionjax.data.letterbox import Letterbox
from lionjax.data.mask_answers import MASK_ANSWERS, mask_phrases
from lionjax.data.pipeline import DataConfig, batches
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.scenes.world import SHAPES

CONFIG = dataclasses.replace(small_lisa.PROCESSOR, max_target_tokens=40)
PROCESSOR = Processor(CONFIG)
ANSWER = "A star [0.100,0.200,0.500,0.600] and a ring [0.500,0.500,0.900,0.900]."


def test_each_box_of_an_answer_is_one_mask_token():
    ids = PROCESSOR.prompt.encode_target(ANSWER)
    assert ids.count(SEG) == 2 and PROCESSOR.tokenizer.eos_id == ids[-1]
    around = [(0.0, 0.25, 0.5, 0.5), (0.25, 0.25, 1.0, 1.0)]
    text, found = PROCESSOR.prompt.decode_with_boxes(ids, around)
    assert text == "A star [0.000,0.250,0.500,0.500] and a ring [0.250,0.250,1.000,1.000]." and found == around


def test_a_mask_token_without_a_mask_is_written_out():
    ids = PROCESSOR.prompt.encode_target(ANSWER)
    text, found = PROCESSOR.prompt.decode_with_boxes(ids, [None, (0.25, 0.25, 1.0, 1.0)])
    assert text == "A star [SEG] and a ring [0.250,0.250,1.000,1.000]." and found == [(0.25, 0.25, 1.0, 1.0)]
    assert PROCESSOR.prompt.decode_with_boxes(ids)[0] == "A star [SEG] and a ring [SEG]."


def test_a_question_with_a_box_is_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="'masks' cannot read; say in words"):
        PROCESSOR.encode_input(ImageTextInput(image, "What is in [0.1,0.2,0.5,0.6]?"))
    earlier = (("Where is it?", "It is [0.1,0.2,0.5,0.6]."),)  # an earlier answer has one
    row = PROCESSOR.encode_input(ImageTextInput(image, "And the ring?", turns=earlier))
    assert row["prompt"].tolist().count(SEG) == 1


def test_a_tokenizer_without_the_mask_token_is_refused():
    lacking = Processor(dataclasses.replace(CONFIG, mask_token="[SEG]"))
    with pytest.raises(UserError, match="mask_token, which the tokenizer lacks"):
        lacking.prompt.encode_target(ANSWER)


def test_sams_image_and_masks_lie_in_the_corner_of_the_square():
    """Longest side to the square's side, the rest zero after normalization; as segment_anything's ResizeLongestSide."""
    for size in ((60, 45), (33, 64), (50, 50)):
        width, height = size
        rect = Letterbox(*size, True).pixel_rect(32)
        scale = 32 / max(size)
        assert rect == (0, 0, int(height * scale + 0.5), int(width * scale + 0.5))
        image = Image.new("RGB", size, (200, 100, 50))
        row = PROCESSOR.encode_input(ImageTextInput(image, "Segment it.")) | {"record": np.int32(0)}
        batch = PROCESSOR.collate({key: array[None] for key, array in row.items()})
        assert batch.sam_size_B2.tolist() == [list(rect[2:])]
        sam = batch.sam_image_BHWC[0]
        assert (sam[: rect[2], : rect[3]] != 0).all() and not sam[rect[2] :].any() and not sam[:, rect[3] :].any()
        expected = (np.float32((200, 100, 50)) - np.float32(letterbox.SAM_MEAN)) / np.float32(letterbox.SAM_STD)
        np.testing.assert_allclose(sam[0, 0], expected, atol=1e-6)
        mask = letterbox.letterbox_mask(np.ones((height, width), bool), 32, True)
        assert mask[: rect[2], : rect[3]].all() and mask.sum() == rect[2] * rect[3]
        inside = (0.25, 0.5, 0.75, 1.0)
        corner = Letterbox(*size, True)
        padded = corner.to_padded(inside)
        assert padded == pytest.approx([e * s / max(size) for e, s in zip(inside, size * 2)])
        assert corner.from_padded(padded) == pytest.approx(inside)


def test_batches_have_a_mask_for_each_mask_token():
    """Of expressions, of objects that must be inferred, and of captions with several."""
    data = DataConfig(sources=(Scenes(sizes=(12, 2, 2), image_size=48),), processor=CONFIG)
    for task, most in (("res", 1), ("reason", 1), ("grounded", 3)):
        data = dataclasses.replace(data, processor=dataclasses.replace(CONFIG, max_boxes=4))
        batch = next(batches(data, Stage("s", 1, (".*",), ((task, 1.0),), 6), 0, 6))
        tokens_B = (batch.target_BM == SEG).sum(axis=1)
        np.testing.assert_array_equal(batch.masks_mask_BK.sum(axis=1), tokens_B)
        assert tokens_B.min() >= 1 and tokens_B.max() >= most
        for box, mask, real in zip(batch.boxes_BK4[:, 0], batch.masks_BKHW[:, 0], batch.masks_mask_BK[:, 0]):
            assert real
            np.testing.assert_allclose(boxes.box_around(mask), box, atol=1.5 / 32)


def test_an_answer_that_asks_for_a_mask_is_a_sentence_around_it():
    data = DataConfig(sources=(Scenes(sizes=(40, 2, 2), image_size=24),), processor=CONFIG)
    batch = next(batches(data, Stage("s", 1, (".*",), (("res", 1.0),), 32), 0, 32))
    texts = {PROCESSOR.prompt.decode_with_boxes(ids)[0] for ids in batch.target_BM.tolist()}
    assert texts == {
        PROCESSOR.prompt.decode_with_boxes(PROCESSOR.prompt.encode_target(text))[0]
        for text in [template.format(masks="[0.100,0.100,0.500,0.500]") for template in MASK_ANSWERS]
    }


def test_the_answer_to_an_inference_names_its_object_before_the_mask():
    data = DataConfig(sources=(Scenes(sizes=(40, 2, 2), image_size=24),), processor=CONFIG)
    batch = next(batches(data, Stage("s", 1, (".*",), (("reason", 1.0),), 32), 0, 32))
    texts = [PROCESSOR.prompt.decode_with_boxes(ids)[0] for ids in batch.target_BM.tolist()]
    phrases = [mask_phrases(text) for text in texts]
    named = [words for (words,) in phrases if words]
    assert len(named) >= 24 and all(words.startswith("the ") and words.split()[-1] in SHAPES for words in named)


@pytest.mark.parametrize(
    "text, phrases",
    [
        ("It is the red star [0.1,0.1,0.2,0.2].", ["the red star"]),
        ("Sure, it is [SEG].", [""]),
        ("Sure, [SEG].", [""]),
        ("A star [0,0,1,1], two blue rings [SEG] and a cat, gray [SEG].", ["A star", "two blue rings", "gray"]),
        ("[SEG][SEG]", ["", ""]),
        ("The bottle: [SEG] There is a hand [SEG] on it.", ["The bottle", "a hand"]),
        ("No mask.", []),
    ],
)
def test_the_phrase_of_a_mask_is_what_stands_before_it_in_the_answer(text, phrases):
    assert mask_phrases(text) == phrases


def test_the_box_around_a_mask_holds_its_outermost_pixels():
    mask = np.zeros((4, 8), bool)
    assert boxes.box_around(mask) is None
    mask[1, 2] = mask[2, 5] = True
    assert boxes.box_around(mask) == (0.25, 0.25, 0.75, 0.75)
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    assert boxes.box_around(mask) == (0.2, 0.2, 0.5, 0.5)  # in fractions of its image
