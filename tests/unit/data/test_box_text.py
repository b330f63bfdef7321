# SPDX-License-Identifier: Apache-2.0
"""Spatial text and packed text of Lyrics equal the release's arrays; cuts, masking and tokens."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tokenizers
from golden import folders

from lionjax.core.types import UserError
from lionjax.data import box_text, tokenizer
from lionjax.data.box_text import PackingConfig, PackingTokens, pack_text, spatial_text

ORIGINAL_NAMES = {
    "ids": "ids",
    "masked_ids": "ids_masked",
    "position": "position_ids",
    "mask": "attention_mask",
    "icg_label": "labels_icg",
    "msp_label": "labels_msp",
}
DOG = (("dog",), ((0.1, 0.2, 0.5, 0.6),))


def parse(text: str):
    """(tags, boxes) of a spatial text."""
    found = re.findall(r" (.+?): \[(.+?)\]", text)
    return [tag for tag, _ in found], [tuple(map(float, box.split(", "))) for _, box in found]


def golden_cases(folder):
    """(prefix of the arrays, captions, spatial texts, draws, packing sizes) of each case of a golden folder."""
    config, arrays = json.loads((folder / "config.json").read_text()), np.load(folder / "arrays.npz")
    sizes = {name: PackingConfig(*size.values(), msp_compat=True) for name, size in config["packing"].items()}
    whole = json.loads((folder / "refiner.json").read_text())["box_text"]
    yield arrays, "stage1.pack.", config["captions"], whole, arrays["stage1.msp_draws"], sizes["stage1"]
    for case in json.loads((folder / "refiner_cases.json").read_text()):
        prefix = f"cases.{case['name']}."
        yield arrays, prefix, case["captions"], case["box_text"], arrays[f"{prefix}draws"], sizes["cases"]


@pytest.mark.parametrize("folder", folders("lyrics"))
def test_packed_text_has_the_originals_arrays(folder):
    tokens, checked = tokenizer.load(str(folder)), 0
    for arrays, prefix, captions, texts, draws, config in golden_cases(folder):
        intended = "stage1_intended.pack." if prefix == "stage1.pack." else f"{prefix}intended."
        first = 0
        for row, (caption, text) in enumerate(zip(captions, texts)):
            tags, boxes = parse(text)
            assert spatial_text(tags, boxes) == text
            own_draws, first = draws[first : first + 5 * len(boxes)], first + 5 * len(boxes)
            for names, compat, source in (
                (ORIGINAL_NAMES, True, prefix),
                (("masked_ids", "msp_label"), False, intended),
            ):
                c = dataclasses.replace(config, msp_compat=compat)
                made = pack_text(tokens, caption, tags, boxes, own_draws, c)
                for name in names:
                    theirs = arrays[source + ORIGINAL_NAMES[name]][row]
                    np.testing.assert_array_equal(made[name], theirs, err_msg=f"{source}{name}")
                    checked += 1
        assert first == len(draws)
    assert checked


def test_boxes_caption_and_row_are_cut_where_the_original_cuts():
    tokens, special = tokenizer.load("tiny"), PackingTokens.of(tokenizer.load("tiny"))
    box_ids, caption_ids = (len(pack_ids(tokens, *texts)) - 1 for texts in (("", *DOG), ("a red dog", (), ())))
    c = PackingConfig(box_ids - 2, caption_ids - 1, 3 + box_ids + caption_ids)
    row = pack_text(tokens, "a red dog", *DOG, np.ones(5), c)
    assert row["mask"].sum() == 1 + box_ids - 2 + caption_ids - 1
    assert special.sep not in row["ids"]
    short = pack_text(tokens, "a red dog", *DOG, np.ones(5), dataclasses.replace(c, length=4))
    assert all(len(array) == 4 for array in short.values()) and short["mask"].all()


def pack_ids(tokens, caption, tags, boxes):
    row = pack_text(tokens, caption, tags, boxes, np.ones(5 * len(boxes)))
    return row["ids"][: row["mask"].sum()]


@pytest.mark.parametrize("compat", [False, True])
def test_brackets_are_masked_only_as_released_and_ends_of_boxes_never(compat):
    tokens = tokenizer.load("tiny")
    special = PackingTokens.of(tokens)
    row = pack_text(tokens, "", *DOG, np.zeros(5), PackingConfig(msp_compat=compat))
    used = row["mask"].astype(bool)
    left = [int(i) for i in row["masked_ids"][used] if i != special.mask]
    visible = [*tokens.encode("["), *(tokens.encode("0.6") if compat else tokens.encode("]"))]
    assert left == [special.cls, *visible, special.sep]
    np.testing.assert_array_equal(row["ids"] == row["msp_label"], row["masked_ids"] != row["ids"])


def test_a_generator_masks_the_share_that_the_config_names():
    tokens, boxes = tokenizer.load("tiny"), DOG[1] * 20
    packed = [pack_text(tokens, "", DOG[0] * 20, boxes, np.random.default_rng(k), PackingConfig()) for k in range(20)]
    special, encode = PackingTokens.of(tokens), tokens.encode
    whole = sum((row["ids"] == encode("dog")[0]).sum() for row in packed)
    hidden = sum(((row["ids"] == encode("dog")[0]) & (row["masked_ids"] == special.mask)).sum() for row in packed)
    assert 0.08 < hidden / whole < 0.23


def test_tags_can_be_masked_more_often_than_coordinates():
    tokens, draws = tokenizer.load("tiny"), np.full(5, 0.5)
    rows = [
        pack_text(tokens, "a dog", *DOG, draws, PackingConfig(mask_probability=0.1, tag_mask_probability=share))
        for share in (None, 0.4, 0.6)
    ]
    labels = [row["msp_label"][row["msp_label"] >= 0].tolist() for row in rows]
    assert labels == [[], [], tokens.encode("dog")]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_caption_is_hidden_from_the_masked_text_alone(share):
    tokens = tokenizer.load("tiny")
    special, length = PackingTokens.of(tokens), len(tokens.encode("two red dogs"))
    shown, hidden = PackingConfig(mask_probability=1.0), PackingConfig(hide_caption_probability=share)
    hidden = dataclasses.replace(hidden, mask_probability=1.0)
    packed = [
        [pack_text(tokens, "two red dogs", *DOG, np.random.default_rng(seed), c) for c in (shown, hidden)]
        for seed in range(40)
    ]
    count = 0
    for theirs, row in packed:
        assert all(np.array_equal(theirs[name], row[name]) for name in theirs if name != "masked_ids")
        end = row["mask"].sum()
        np.testing.assert_array_equal(theirs["masked_ids"][: end - length], row["masked_ids"][: end - length])
        caption = row["masked_ids"][end - length : end]
        count += (caption == special.mask).all()
        assert (caption == special.mask).all() or np.array_equal(caption, row["ids"][end - length : end])
    assert count == 40 * share if share in (0, 1) else 10 < count < 30


def test_a_caption_can_be_closed_so_that_its_end_is_learned():
    tokens = tokenizer.load("tiny")
    special = PackingTokens.of(tokens)
    row = pack_text(tokens, "a dog", *DOG, np.ones(5), PackingConfig(caption_end=True))
    last = row["mask"].sum() - 1
    assert row["ids"][last] == row["icg_label"][last] == special.sep
    assert row["icg_label"][0] == special.start and row["msp_label"].max() == box_text.NO_LABEL


def test_coordinates_are_written_short_and_unclipped():
    assert spatial_text(("a",), ((-0.0001, 0.5, 1.0432, 0.12345),)) == " a: [-0.0, 0.5, 1.043, 0.123]"
    assert spatial_text((), ()) == ""


def test_wrong_draws_and_foreign_tokenizers_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="3 draws were given for 5 maskable elements; give one for each"):
        pack_text(tokenizer.load("tiny"), "", *DOG, np.ones(3))
    with pytest.raises(UserError, match="packing.mask_probability"):
        PackingConfig(mask_probability=1.5)
    with pytest.raises(UserError, match="packing.tag_mask_probability is 2; give a finite number >= 0 and <= 1"):
        PackingConfig(tag_mask_probability=2)
    with pytest.raises(UserError, match="packing.hide_caption_probability is -0.1"):
        PackingConfig(hide_caption_probability=-0.1)
    words = {"[PAD]": 0, "[SEP]": 1, "[UNK]": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    with pytest.raises(UserError, match=r"the question tokenizer has no token \[CLS\]; give 'tiny' or a folder"):
        PackingTokens.of(tokenizer.Tokenizer(backend, ("[PAD]", "[SEP]", "[UNK]", None)))
