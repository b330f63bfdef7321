# SPDX-License-Identifier: Apache-2.0
"""Boxes in texts are fractions of the image or of its padded square, as the reader says; none is padded twice.

The image is 40 x 20: a box (x0, y0, x1, y1) of it is (x0, y0 / 2 + 0.25, x1, y1 / 2 + 0.25) of the square.
"""

import dataclasses
import json

import numpy as np
import pytest
from chat_prompts import decoder_prompts
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import mixture, samples
from lionjax.data.boxes import box_to_text
from lionjax.data.config import DataConfig
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.lion import LionRecords
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.data.letterbox import Letterbox, pad_boxes, unpad_boxes
from lionjax.data.prepare import array_record_writer
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.evaluation import runner

IN_IMAGE, IN_SQUARE = (0.25, 0.1, 0.5, 0.9), (0.25, 0.3, 0.5, 0.7)
TEXTS = {"image": "[0.250,0.100,0.500,0.900]", "square": "[0.250,0.300,0.500,0.700]"}
VERBATIM = "[0.25, 0.3, 0.5, 0.70]"  # as LLaVA-1.5's files have it
PARTS = {"prompt_template": "USER: {image} {question} ASSISTANT:", "followup_template": "USER: {question} ASSISTANT:"}


def prompts(**fields):
    return decoder_prompts(max_target_tokens=128, max_prompt_tokens=160, **PARTS | {"pad_to_square": True} | fields)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 20), (90, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), (90, 0, 0)).save(tmp_path / "b.png")
    return tmp_path


def conversations(folder, *texts, image="a.png", **fields) -> Conversations:
    rounds = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    (folder / "talk.json").write_text(json.dumps([{"image": image, "conversations": rounds}]))
    return Conversations(str(folder / "talk.json"), str(folder), **fields)


def spelled(processor: Processor, row: dict[str, np.ndarray]) -> str:
    """The text of a row's prompt and target, end tokens left out."""
    ids = np.concatenate([row[name][row[f"{name}_mask"] > 0] for name in ("prompt", "target")])
    return processor.tokenizer.decode(ids[ids != processor.tokenizer.eos_id])


def trained_text(source, processor, task="conversation", seed=0, **fields) -> str:
    """All text of the first training example."""
    data = DataConfig((source,), processor, num_threads=0, **fields)
    opened = mixture.open_mixture(data, "train")
    (component,) = opened.components(task)
    return spelled(opened.processor, opened.encode_example(component, 0, np.random.default_rng(seed)))


def compact(text: str) -> str:
    return text.replace(" ", "")


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("tokenization", ["parts", "whole"])
def test_boxes_of_the_padded_square_are_learned_as_the_file_has_them(folder, tokenization):
    talk = ("<image>\nwhat is at " + VERBATIM + "?", "a bus", "where is it?", "at " + VERBATIM)
    text = trained_text(conversations(folder, *talk), prompts(prompt_tokenization=tokenization))
    assert compact(text).count(compact(VERBATIM)) == 2


def test_boxes_of_the_padded_square_become_those_of_the_image_for_a_model_that_does_not_pad(folder):
    talk = ("<image>\nwhat is at " + VERBATIM + "?", "a bus", "where is it?", "at " + VERBATIM)
    text = trained_text(conversations(folder, *talk), prompts(pad_to_square=False))
    assert compact(text).count(TEXTS["image"]) == 2 and "0.3" not in text


@pytest.mark.parametrize("padded", [True, False])
def test_boxes_of_the_image_are_padded_once_in_a_file_that_says_so(folder, padded):
    source = conversations(folder, f"<image>\nwhat is at {TEXTS['image']}?", "a bus", padded_boxes=padded)
    assert TEXTS["image" if padded else "square"] in compact(trained_text(source, prompts()))


@pytest.mark.parametrize(
    ("row", "kind", "task"),
    [
        ({"image": "a.png", "task": "rec", "expression": "it", "boxes": [IN_IMAGE]}, JsonLines, "rec"),
        ({"image": "a.png", "question": "q", "answer": TEXTS["image"], "category": "ref"}, LionRecords, "region_level"),
        ({"img_path": "a.png", "expression": "it", "bbox": [10, 2, 20, 18]}, ShikraJsonl, "rec"),
    ],
)
def test_every_other_reader_has_boxes_of_the_image_which_are_padded_once(folder, row, kind, task):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    source = kind(str(folder / "rows.jsonl"), str(folder))
    assert TEXTS["square"] in compact(trained_text(source, prompts(), task))
    assert TEXTS["image"] in compact(trained_text(source, prompts(pad_to_square=False), task))


def test_crops_and_flips_move_boxes_in_the_texts_of_conversations(folder):
    source = conversations(folder, "<image>\nwhere is it?", VERBATIM)
    flips = {trained_text(source, prompts(), seed=seed, hflip=True).split("ASSISTANT:")[-1] for seed in range(12)}
    assert {compact(text) for text in flips} == {TEXTS["square"], "[0.500,0.300,0.750,0.700]"}


def test_array_record_keeps_whose_fractions_boxes_are(folder, tmp_path_factory):
    source = conversations(folder, "<image>\nwhere is it?", VERBATIM)
    built = ArrayRecordDataset(str(array_record_writer.build(source, tmp_path_factory.mktemp("built"))))
    assert compact(VERBATIM) in compact(trained_text(built, prompts()))
    assert TEXTS["image"] in compact(trained_text(built, prompts(pad_to_square=False)))


def test_location_tokens_of_a_padded_square_are_not_padded_again(folder):
    source = conversations(folder, "<image>\nwhere is it?", VERBATIM)
    fields = {"box_format": "embeddings", "max_boxes": 1}
    rows = []
    for padded in (True, False):
        data = DataConfig((dataclasses.replace(source, padded_boxes=padded),), prompts(**fields), num_threads=0)
        opened = mixture.open_mixture(data, "train")
        (component,) = opened.components("conversation")
        rows.append(opened.encode_example(component, 0, np.random.default_rng(0)))
    np.testing.assert_allclose([row["boxes"][0] for row in rows], [IN_SQUARE, (0.25, 0.4, 0.5, 0.6)], atol=1e-6)
    assert all(row["size"].tolist() == [40, 20] for row in rows)


# ------------------------------------------------------------------ evaluation and inference


def test_evaluation_compares_boxes_of_the_image_and_asks_as_in_training(folder):
    talk = ("<image>\nwhat is at " + VERBATIM + "?", "a bus", "where is it?", "at " + VERBATIM)
    data = DataConfig((conversations(folder, *talk),), prompts())
    (sample,) = samples.examples(data, "conversation", "train")
    example = sample.example
    assert example.answer == f"at {TEXTS['image']}" == example.answers[0] and TEXTS["image"] in example.history[0][0]
    np.testing.assert_allclose((example.boxes[0], example.question_boxes[0]), [IN_IMAGE] * 2, atol=1e-9)
    for padded, wanted in ((True, compact(VERBATIM)), (False, TEXTS["image"])):
        processor = Processor(prompts(pad_to_square=padded))
        ((_, rows),) = runner.encode_samples(processor, data, [sample], False, "conversation")
        assert compact(spelled(processor, rows[False])).count(wanted) == 1


def test_earlier_rounds_of_a_chat_are_padded_as_its_question_is():
    image = np.zeros((20, 40, 3), np.uint8)
    turns = ((f"what is at {TEXTS['image']}?", f"it is {TEXTS['image']}"),)
    for tokenization in ("parts", "whole"):
        processor = Processor(prompts(prompt_tokenization=tokenization))
        row = processor.encode_input(ImageTextInput(image, f"and at {TEXTS['image']}?", turns=turns))
        text = compact(spelled(processor, row))
        assert text.count(TEXTS["square"]) == 3 and TEXTS["image"] not in text


@pytest.mark.parametrize("tokenization", ["parts", "whole"])
def test_each_in_context_example_is_padded_by_its_own_image(tokenization):
    wide, square = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 20, 3), np.uint8)
    question, answer = f"what is at {TEXTS['image']}?", f"it is {TEXTS['image']}"
    processor = Processor(prompts(max_images=2, prompt_tokenization=tokenization))
    for image, shot, counts in ((wide, square, (2, 1)), (square, wide, (1, 2)), (wide, wide, (0, 3))):
        row = processor.encode_input(ImageTextInput(image, question, shots=((shot, question, answer),)))
        text = compact(spelled(processor, row))
        assert (text.count(TEXTS["image"]), text.count(TEXTS["square"])) == counts


def test_shots_of_a_mixture_are_padded_by_their_own_image(folder):
    rows = [
        {"image": name, "question": f"{name[0]} {TEXTS['image']}?", "answer": "yes", "question_boxes": [IN_IMAGE]}
        for name in ("a.png", "b.png")
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    processor = prompts(max_images=2)
    opened = mixture.open_mixture(
        DataConfig((JsonLines(str(folder / "rows.jsonl"), str(folder)),), processor, num_threads=0), "train"
    )
    (component,) = opened.components("vqa+1")
    row = opened.encode_example(component, 0, np.random.default_rng(0))
    text = compact(spelled(opened.processor, row))
    assert f"a{TEXTS['square']}?" in text and f"b{TEXTS['image']}?" in text


# ------------------------------------------------------------------ texts


def test_boxes_of_a_text_go_to_the_square_and_back():
    square = Letterbox(40, 20)
    assert pad_boxes(f"at {TEXTS['image']}.", square) == f"at {TEXTS['square']}."
    text, boxes = unpad_boxes(f"at {VERBATIM}.", square)
    assert text == f"at {TEXTS['image']}." and boxes == [pytest.approx(IN_IMAGE)]
    assert pad_boxes(text, square, boxes) == f"at {TEXTS['square']}."


def test_numbers_in_brackets_that_are_no_fractions_stay_as_they_are():
    for text in ("the list [1,2,3,4]", "[10, 20, 30, 40]"):
        assert pad_boxes(text, Letterbox(40, 20)) == text == unpad_boxes(text, Letterbox(40, 20))[0]


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (427, 640), (500, 499)])
def test_a_box_of_three_decimals_comes_back_exactly_from_the_image_to_the_square(size):
    rng = np.random.default_rng(0)
    square = Letterbox(*size)
    for _ in range(200):
        x0, x1, y0, y1 = (*np.sort(rng.uniform(0, 1, 2)), *np.sort(rng.uniform(0, 1, 2)))
        text = box_to_text(square.to_padded((x0, y0, x1, y1)))
        unpadded, boxes = unpad_boxes(text, square)
        again = pad_boxes(unpadded, square, boxes)
        edges = [np.array(json.loads(one)) for one in (text, again)]
        assert np.abs(edges[0] - edges[1]).max() < 1.1e-3  # the clip to the image moves an edge by a rounding at most


def test_a_padded_box_with_several_images_stays_as_the_file_has_it(folder):
    rows = [
        {
            "images": ["a.png", "b.png"],
            "messages": [
                {"role": "user", "content": f"<image> or <image> at {VERBATIM}?"},
                {"role": "assistant", "content": "b"},
            ],
        }
    ]
    (folder / "talk.json").write_text(json.dumps(rows))
    source = Conversations(str(folder / "talk.json"), str(folder))
    for padded in (True, False):
        text = trained_text(source, prompts(max_images=2, pad_to_square=padded))
        assert compact(VERBATIM) in compact(text)


def test_a_box_outside_of_the_image_is_still_refused_where_boxes_are_embeddings(folder):
    source = conversations(folder, "<image>\nwhere is it?", "[0.5,0.5,0.5,0.7]")
    with pytest.raises(UserError, match="has no area"):
        trained_text(source, prompts(box_format="embeddings", max_boxes=1))
