# SPDX-License-Identifier: Apache-2.0
"""Boxes in texts: as digits, location tokens or embeddings; into a padded square and back; and boxes that are none."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from chat_prompts import lengths
from paths import CONFIGS
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import boxes as places
from lionjax.data import images
from lionjax.data.config import DataConfig
from lionjax.data.letterbox import Letterbox
from lionjax.data.mixture import MixtureDataset
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.scenes.tasks import box_to_text

BOX, OTHER = (0.1234567, 0.25, 0.5, 0.75), (0.0, 0.1, 0.3, 0.9)
TEXT = f"A red star {box_to_text(BOX)}, a ring {box_to_text(OTHER)} and nothing else."
CONFIG = ProcessorConfig(
    image_size=28,
    **lengths(64, 8, 64),
    use_tags=False,
    pad_to_square=True,
    max_boxes=3,
    sam_image_size=32,
    location_bins_per_side=32,
)
POINTING = dataclasses.replace(CONFIG, box_format="embeddings")
AT, HERE = 19, 20  # of the tiny tokenizer


def test_a_text_is_words_and_boxes_and_known_boxes_keep_their_decimals():
    assert places.split_text_and_boxes(TEXT, [BOX]) == ["A red star ", BOX, ", a ring ", OTHER, " and nothing else."]
    assert places.split_text_and_boxes(TEXT)[1] == (0.123, 0.25, 0.5, 0.75)
    assert places.join_text_and_boxes(places.split_text_and_boxes(TEXT, [BOX])) == TEXT
    assert places.split_text_and_boxes("no box [1,2] here") == ["no box [1,2] here"]


@pytest.mark.parametrize("side", [4, 32])
def test_location_tokens_are_those_of_kosmos_2(side):
    theirs = pytest.importorskip("transformers.models.kosmos2.processing_kosmos2")
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, size = rng.random(2) * 0.9, 0.02 + rng.random(2) * 0.5
        box = (*low.tolist(), *np.minimum(low + size, 1).tolist())
        bins = places.box_to_bins(box, side)
        assert bins == tuple(map(int, theirs.coordinate_to_patch_index(box, side)))
        np.testing.assert_allclose(
            places.box_from_bins(*bins, side), theirs.patch_index_to_coordinate(*bins, side), atol=1e-12
        )
        assert np.abs(np.subtract(places.box_from_bins(*bins, side), box)).max() <= 1 / side


IN_SQUARE = {  # BOX and OTHER in the square around a picture of this size, by hand
    (1, 1): [BOX, OTHER],
    (60, 20): [(0.1234567, 25 / 60, 0.5, 35 / 60), (0.0, 22 / 60, 0.3, 38 / 60)],
    (20, 60): [(22.469134 / 60, 0.25, 30 / 60, 0.75), (20 / 60, 0.1, 26 / 60, 0.9)],
}


@pytest.mark.parametrize("how", places.BOX_FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (60, 20), (20, 60)])
def test_boxes_of_a_decoded_answer_are_fractions_of_the_original_image(how, size):
    processor, square = Processor(dataclasses.replace(CONFIG, mask_token="<extra_id_5>")), Letterbox(*size)
    ids, inside = processor.prompt.encode_with_boxes(TEXT, [BOX, OTHER], square, how)
    np.testing.assert_allclose(inside, IN_SQUARE[size])
    text, boxes = processor.prompt.decode_with_boxes([*ids, 1, 7, 7], inside, square)
    assert places.split_text_and_boxes(text)[0] == "A red star " and text.endswith("] and nothing else.")
    worst = {"digits": 2e-3, "bins": 1 / 32 + 1e-3, "embeddings": 1e-6, "masks": 1e-6}[how] * max(size) / min(size)
    np.testing.assert_allclose(boxes, [BOX, OTHER], atol=worst)


def test_digit_boxes_are_text_and_bins_and_embeddings_are_two_tokens():
    processor = Processor(CONFIG)
    assert processor.prompt.encode_with_boxes(TEXT)[0] == processor.tokenizer.encode(TEXT)
    said = f"Answer: {box_to_text(BOX)}"
    (*words, at, here), _ = processor.prompt.encode_with_boxes(said, box_format="embeddings")
    assert (at, here) == (AT, HERE) and processor.prompt.decode(words) == "Answer:"
    (*_, low, high), _ = processor.prompt.encode_with_boxes(said, box_format="bins")
    assert low - processor.tokenizer.vocab_size == 8 * 32 + 3 and high - processor.tokenizer.vocab_size == 23 * 32 + 15


def test_box_tokens_without_a_box_are_skipped():
    codec = Processor(CONFIG).prompt.box_codec
    first = codec.first_location_token_id
    assert codec.decode([5, AT, HERE, 6, AT], [BOX]) == [[5], BOX, [6]]
    assert codec.decode([AT, HERE, AT, HERE], [BOX]) == [BOX]
    assert codec.decode([5, first + 1, 6, first, first + 33]) == [
        [5, 6],
        (0.0 + 0.5 / 32, 0.5 / 32, 1.5 / 32, 1.5 / 32),
    ]


def test_ids_after_the_vocabulary_are_boxes_only_with_location_tokens():
    """A LLaVA has rows of words that its tokenizer lacks; nor is a box what lies behind the last location token."""
    codec = Processor(dataclasses.replace(CONFIG, location_bins_per_side=0)).prompt.box_codec
    beyond = [codec.first_location_token_id, codec.first_location_token_id + 40]
    assert codec.decode([5, *beyond, 6]) == [[5, *beyond, 6]]
    codec = Processor(CONFIG).prompt.box_codec
    last = codec.first_location_token_id + 32 * 32 - 1
    assert codec.decode([5, codec.first_location_token_id, last]) == [[5], places.box_from_bins(0, 1023, 32)]
    assert codec.decode([5, codec.first_location_token_id, last + 1]) == [[5, last + 1]]


def test_location_tokens_have_the_ids_of_the_tokenizer(tmp_path):
    """Kosmos-2's has its own among its words, and words behind them."""
    special, own = ["<pad>", "<s>", "</s>", "<unk>"], [f"<patch_index_{place:04d}>" for place in range(4)]
    words = {word: number for number, word in enumerate([*special, "star", *own, "ring"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    backend.save(str(tmp_path / "tokenizer.json"))
    c = dataclasses.replace(CONFIG, tokenizer=str(tmp_path), box_format="bins", location_bins_per_side=2)
    processor = Processor(c)
    ids, _ = processor.prompt.encode_with_boxes(f"star {box_to_text((0.1, 0.1, 0.9, 0.9))} ring")
    assert ids == [4, 5, 8, 9]
    text, boxes = processor.prompt.decode_with_boxes(ids)
    assert text == "star [0.250,0.250,0.750,0.750] ring" and boxes == [(0.25, 0.25, 0.75, 0.75)]


def test_a_row_has_the_boxes_of_question_and_answer_in_the_order_of_their_tokens():
    processor = Processor(POINTING)
    pixels, question = np.zeros((28, 28, 3), np.uint8), f"What is at {box_to_text(OTHER)}?"
    row = processor.encode_example(
        pixels, question, (), f"It is {box_to_text(BOX)}.", boxes=(OTHER, BOX), image_letterbox=Letterbox(40, 20)
    )
    assert (row["prompt"] == HERE).sum() == (row["target"] == HERE).sum() == 1
    wanted = [(0.0, 0.3, 0.3, 0.7), (0.1234567, 0.375, 0.5, 0.625)]  # ten rows above, ten below
    np.testing.assert_allclose(row["boxes"][:2], wanted, atol=1e-6)
    np.testing.assert_array_equal(row["boxes_mask"], [1, 1, 0])
    asked = processor.encode_example(pixels, question, boxes=(OTHER,), box_format="digits")
    assert not (asked["prompt"] == HERE).any() and "[0.000,0.100" in processor.prompt.decode(asked["prompt"])


def test_decoder_prompts_have_image_tokens_and_no_end_token():
    c = dataclasses.replace(
        POINTING, reader="decoder", prompt_template="Look: {image} {question} Say:", num_image_tokens=4
    )
    processor = Processor(c)
    ids = processor.prompt.encode_prompt("what is it?")
    assert ids[-1] != processor.tokenizer.eos_id and ids.count(21) == 4
    start = ids.index(22)
    assert ids[start : start + 6] == [22, 21, 21, 21, 21, 23]
    assert processor.tokenizer.decode(ids[:start]) == "Look:"
    assert processor.prompt.decode(ids).endswith("what is it? Say:")


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("What is at [0.6,0.2,0.1,0.5]?", None, "has no area"),
        ("What is at [0.1,0.2,1.6,0.5]?", None, "leaves the image"),
        ("Where?", "Answer: [0.100,0.500,0.200,0.500]", "has no area"),
        ("Compare [0.1,0.1,0.2,0.2][0.1,0.1,0.2,0.2]", TEXT, "contain 4 boxes, but at most 3 are allowed"),
    ],
)
def test_invalid_boxes_are_refused(question, answer, message):
    with pytest.raises(UserError, match=message):
        Processor(POINTING).encode_example(np.zeros((28, 28, 3), np.uint8), question, (), answer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_boxes": 0}, "processor.max_boxes is 0"),
        ({"pad_to_square": False}, "needs processor.pad_to_square"),
        ({"prompt_template": "no question"}, "needs {question} once"),
        ({"location_bins_per_side": -1}, "location_bins_per_side is -1"),
        (
            {"box_format": "bins", "location_bins_per_side": 0},
            "processor.location_bins_per_side is 0; set it to at least 1",
        ),
    ],
)
def test_contradictory_processor_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(POINTING, **change)


def test_an_answer_cut_after_a_trigger_loses_the_trigger():
    processor = Processor(dataclasses.replace(POINTING, max_target_tokens=2))
    answer = f"star {box_to_text(BOX)}"
    ids = processor.prompt.encode_target(answer)
    assert ids and processor.tokenizer.eos_id not in ids and AT not in ids
    row = processor.encode_example(np.zeros((processor.config.image_size,) * 2 + (3,), np.uint8), "?", (), answer)
    assert row["num_cut"] > 0 and not row["boxes_mask"].any()


def pictures_of_all_kinds(folder):
    """Paths, sizes, where BOX lies in the square, and where the picture in SAM's of 32, by hand."""
    wide = (0.1234567, 1 / 3, 0.5, 2 / 3), (5, 0, 21, 32)
    tall = ((6 + 0.1234567 * 24) / 36, 0.25, 0.5, 0.75), (0, 5, 32, 21)
    thin = ((17 + 0.1234567) / 36, 0.25, 17.5 / 36, 0.75), (0, 15, 32, 1)
    array = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    plain, exif = Image.fromarray(array), Image.Exif()
    exif[0x0112] = 6
    made = {"gray.png": plain.convert("L"), "palette.png": plain.convert("P"), "print.jpg": plain.convert("CMYK")}
    for name, picture in made.items():
        picture.save(folder / name)
        yield folder / name, (36, 24), *wide
    plain.save(folder / "turned.jpg", exif=exif)
    yield folder / "turned.jpg", (24, 36), *tall
    plain.resize((1, 36)).save(folder / "thin.png")
    yield folder / "thin.png", (1, 36), *thin


def test_boxes_round_trip_through_padding_for_all_image_modes_and_shapes(tmp_path):
    processor = Processor(POINTING)
    for path, size, inside, (top, left, high, wide) in pictures_of_all_kinds(tmp_path):
        row = processor.encode_input(ImageTextInput(path, f"What is at {box_to_text(BOX)}?", boxes=(BOX,)))
        assert tuple(row["size"]) == size and row["pixels"].shape == (28, 28, 3) and row["sam"].shape == (32, 32, 3)
        np.testing.assert_allclose(row["boxes"][0], inside, atol=1e-6)
        batch = processor.collate({name: np.stack([value]) for name, value in row.items()})
        outside = np.ones((32, 32), bool)
        outside[top : top + high, left : left + wide] = False
        assert outside.any() and not batch.sam_image_BHWC[0][outside].any()
        assert np.abs(batch.sam_image_BHWC[0][~outside]).min() > 0
        upright = np.asarray(images.to_pil_image(path).resize((wide, high), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(row["sam"][top : top + high, left : left + wide], upright)


DATA = DataConfig(sources=(Scenes((40, 4, 4), image_size=56),), processor=POINTING)


def test_masks_match_their_boxes_and_mask_fraction_limits_the_images_that_have_them():
    records, rng = MixtureDataset(DATA, "train"), np.random.default_rng(0)
    (part,) = records.components("res")
    row = records.encode_example(part, 3, rng, with_masks=True)
    (place,) = np.flatnonzero(row["masks_mask"])
    rows, columns = np.nonzero(row["masks"][place])
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 32
    np.testing.assert_allclose(edges, row["boxes"][place], atol=2.5 / 32)
    (other,) = records.components("rec")
    assert not records.encode_example(other, 3, rng, with_masks=True)[
        "masks_mask"
    ].any() and "sam" not in records.encode_example(other, 3, rng)
    few = MixtureDataset(dataclasses.replace(DATA, mask_fraction=0.1), "train")
    assert few.components("res")[0].num_examples == 4 and few.components("rec")[0].num_examples == 40
    with pytest.raises(UserError, match="do not transform masks"):
        dataclasses.replace(DATA, hflip=True)


def test_one_task_of_a_mixture_may_write_its_boxes_otherwise_and_says_so():
    records = MixtureDataset(DATA, "train")
    (plain,), (digits,) = records.components("rec"), records.components("scenes/rec@digits")
    rows = [records.encode_example(part, 0, np.random.default_rng(0)) for part in (plain, digits)]
    assert [(row["target"] == HERE).any() for row in rows] == [True, False]
    assert "[0." in records.processor.prompt.decode(rows[1]["target"])
    assert records.processor.prompt.decode(rows[1]["prompt"]).endswith("Write places in digits.")
    with pytest.raises(UserError, match="'words'; choose one of digits"):
        records.components("rec@words")


def test_the_tiny_nextchat_learns_and_compares_boxes_in_all_three_ways_in_one_run():
    from lionjax.core import config
    from lionjax.evaluation import runner

    what = config.load(CONFIGS / "tiny_nextchat.py")
    assert {"rec", "digits_rec", "bins_rec"} <= set(map(runner.benchmark_label, runner.trained_benchmarks(what)))
    records = MixtureDataset(dataclasses.replace(what.data, sources=(Scenes((40, 4, 4), image_size=56),)), "train")
    first, language = records.processor.prompt.box_codec.first_location_token_id, what.model.language
    for name, pointed, written in (("rec", 1, 0), ("rec@digits", 0, 0), ("rec@bins", 0, 2)):
        (part,) = records.components(name)
        ids = records.encode_example(part, 0, np.random.default_rng(0))["target"]
        assert ((ids == HERE).sum(), (ids >= first).sum()) == (pointed, written) and ids.max() < language.vocab


def test_boxes_round_trip_within_half_a_quantization_step():
    """Of 10,000 boxes: digits half a thousandth, Kosmos-2's tokens half a cell, and a whole one where they are flat."""
    rng, side = np.random.default_rng(1), 32
    low, size = rng.random((10_000, 2)) * 0.99, rng.random((10_000, 2)) ** 3
    boxes = np.concatenate([low, np.minimum(low + np.maximum(size, 1e-3), 1)], axis=1)
    said = np.array([places.split_text_and_boxes(box_to_text(box))[0] for box in boxes.tolist()])
    assert np.abs(said - boxes).max() <= 0.5e-3 + 1e-9
    bins = np.array([places.box_to_bins(box, side) for box in boxes.tolist()])
    back = np.array([places.box_from_bins(*pair, side) for pair in bins.tolist()])
    rows, columns = bins // side, bins % side
    flat = (rows[:, 0] == rows[:, 1]) | (columns[:, 0] == columns[:, 1])
    assert 0.1 < flat.mean() < 0.9
    error = np.abs(back - boxes).max(axis=1)
    assert error[~flat].max() <= 0.5 / side + 1e-9 and error[flat].max() <= 1 / side + 1e-9
