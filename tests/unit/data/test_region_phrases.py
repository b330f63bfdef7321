# SPDX-License-Identifier: Apache-2.0
"""Captions, phrases, NMS and phrase to tag equal the released refiner's strings; the traps of its rules by name."""

import json

import numpy as np
import pytest
from golden import folders

from lionjax.core.types import UserError
from lionjax.data import region_phrases as rules
from lionjax.data import tokenizer
from lionjax.data.box_text import spatial_text
from lionjax.data.regions import ImageRegions, from_bfloat16_bits, to_bfloat16_bits

TAGS = ("ball", "dog", "French fries", "grass", "green grass", "red ball", "t-shirt")


def refine(tokens, setting, tags, chinese, language, prob_QL, box_Q4) -> str:
    """The spatial text of one image's token probabilities and boxes (center and size)."""
    kept_Q = prob_QL.max(axis=1) > setting["box_threshold"]
    prob_KL, box_K4 = prob_QL[kept_Q], rules.to_corners(box_Q4[kept_Q])
    order = rules.nms(box_K4, prob_KL.max(axis=1), setting["nms_iou"])
    phrases = [rules.tags_phrase(tokens, tags, prob_KL[k] > setting["text_threshold"]) for k in order]
    names = [rules.phrase_name(phrase, tags, chinese, language) for phrase in phrases]
    kept = [(name, box_K4[k]) for name, k in zip(names, order) if name]
    return spatial_text(*zip(*kept)) if kept else ""


@pytest.mark.parametrize("folder", folders("lyrics"))
def test_spatial_text_is_the_originals_string_for_string(folder):
    tokens, arrays = tokenizer.load(str(folder)), np.load(folder / "arrays.npz")
    setting = json.loads((folder / "config.json").read_text())["refiner"]
    for case in json.loads((folder / "refiner_cases.json").read_text()):
        for row, expected in enumerate(case["box_text"]):
            tags, chinese = (case[key][row].split(" | ") for key in ("tags_en", "tags_zh"))
            assert rules.tags_caption(tags) == case["caption_for_detector"][row]
            found = (arrays[f"cases.{case['name']}.{what}"][row] for what in ("probabilities", "boxes"))
            assert refine(tokens, setting, tags, chinese, case["language"], *found) == expected, case["name"]
    whole = json.loads((folder / "refiner.json").read_text())
    for row, caption in enumerate(whole["captions_for_detector"]):
        tags, chinese = (whole[key][row].split(" | ") for key in ("tags_en", "tags_zh"))
        ids, num_cut = rules.encode_caption(tokens, rules.tags_caption(tags))
        assert rules.tags_caption(tags) == caption and not num_cut
        assert ids == arrays["detector.input_ids"][row][: len(ids)].tolist()
        prob_QL = 1 / (1 + np.exp(-arrays["detector.pred_logits"][row]))
        for key, language in (("box_text", "en"), ("box_text_zh", "zh")):
            found = (prob_QL, arrays["detector.pred_boxes"][row])
            assert refine(tokens, setting, tags, chinese, language, *found) == whole[key][row]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] ball dog french fries grass green red t - shirt | , . ' rubik s cube ##es"
    file = tmp_path_factory.mktemp("words") / "vocab.txt"
    file.write_text("\n".join([*words.split(), "?"]))
    return tokenizer.load(str(file))


def test_an_image_without_tags_or_boxes_has_an_empty_text_and_no_tags_raise_one_sentence():
    assert ImageRegions(tags=("dog",)).spatial_text == ""
    with pytest.raises(UserError, match="no tag, so there is nothing to detect"):
        rules.tags_caption(())


@pytest.mark.parametrize(
    "phrase, name",
    [
        ("red ball", "red ball"),  # an exact match wins over the earlier tag "ball"
        ("grass red ball", "ball"),  # else the first tag of the list that begins or ends the phrase
        ("green grass | dog", "dog"),
        ("t - shirt", "t-shirt"),
        ("french fries", "french fries"),  # tags with capitals are never matched; the phrase stays
        ("big [SEP]", "big [SEP]"),
        ("[CLS] dog", "dog"),
        ("| grass", "grass"),
        ("fries dog green", "fries dog green"),  # a tag in the middle does not count
    ],
)
def test_a_phrase_takes_the_name_of_its_tag_by_the_originals_rules(phrase, name):
    assert rules.phrase_name(phrase, TAGS) == name
    chinese = tuple(f"{k}" for k in range(len(TAGS)))
    assert rules.phrase_name(phrase, TAGS, chinese, "zh") == (str(TAGS.index(name)) if name in TAGS else None)


def test_chinese_names_need_a_chinese_tag_for_each_tag():
    with pytest.raises(UserError, match="0 Chinese tags for 7 tags; add ram_tag_list_chinese.txt"):
        rules.phrase_name("dog", TAGS, (), "zh")


def test_hits_at_the_last_positions_of_the_caption_read_sep_or_nothing(tokens):
    tags = ("dog", "ball")  # [CLS] dog | ball [SEP], where the caption has [CLS] dog , ball . [SEP]
    assert rules.tags_phrase(tokens, tags, np.array([0, 1, 1, 1, 0, 0], bool)) == "dog | ball"
    assert rules.tags_phrase(tokens, tags, np.array([1, 0, 0, 1, 1, 1], bool)) == "[CLS] ball [SEP]"
    assert rules.tags_phrase(tokens, tags, np.array([0, 0, 0, 0, 0, 1], bool)) == ""  # the original: IndexError


def test_phrases_of_a_caption_join_pieces_and_leave_out_full_stops_and_special_tokens(tokens):
    caption = rules.detector_caption("  Dog. RUBIK'S cubees")
    assert caption == "dog. rubik's cubees." and rules.detector_caption("dog.") == "dog."
    ids, num_cut = rules.encode_caption(tokens, caption)
    assert num_cut == 0
    is_hit_L = np.arange(99) < len(ids) - 1
    assert rules.caption_phrase(tokens, ids, is_hit_L) == "dog rubik's cubees"
    assert rules.caption_phrase(tokens, ids, np.ones(99, bool)) == "dog rubik's cubees [SEP]"
    prob_L = np.zeros(99)
    prob_L[[1, 3, 7]] = 0.5, 0.6, 0.9  # dog, rubik, ##es
    separators = [tokens.token_to_id(piece) for piece in ("[CLS]", "[SEP]", ".", "?")]
    assert rules.caption_phrase(tokens, ids, prob_L > 0.4) == "dog rubikes"
    is_best_L = rules.within_best_phrase(ids, separators, prob_L)
    assert rules.caption_phrase(tokens, ids, (prob_L > 0.4) & is_best_L) == "rubikes"


def test_a_caption_of_more_than_256_tokens_is_cut_at_its_end(tokens):
    ids, num_cut = rules.encode_caption(tokens, "dog " * 300)
    assert len(ids) == 256 and num_cut == 46 and ids[-1] == tokens.token_to_id("dog")
    assert rules.encode_caption(tokens, "dog " * 254)[1] == 0


def test_nms_keeps_boxes_by_falling_score_and_drops_overlaps_above_the_limit():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.6], [0, 0, 1, 0.7], [2, 2, 3, 3], [5, 5, 5, 5]], np.float32)
    scores = np.array([0.5, 0.3, 0.4, 0.9, 0.1])
    assert rules.nms(boxes, scores, 0.6).tolist() == [3, 0, 1, 4]
    assert rules.nms(boxes, scores, 0.1).tolist() == [3, 0, 4]
    assert rules.nms(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.3", True, None])
def test_a_threshold_outside_0_1_raises_one_sentence(value):
    with pytest.raises(UserError, match="box_threshold is .*; give a number in 0..1"):
        rules.check_threshold("box_threshold", value)


def test_regions_survive_json_and_bfloat16():
    features_KD = np.array([[1.0, -2.5, 3.1415927, 1e-30, -0.0, 65504.0]], np.float32)
    bits = to_bfloat16_bits(features_KD)
    assert bits.dtype == np.uint16 and bits.shape == features_KD.shape
    import ml_dtypes

    np.testing.assert_array_equal(from_bfloat16_bits(bits), features_KD.astype(ml_dtypes.bfloat16).astype(np.float32))
    regions = ImageRegions(("dog",), ("狗",), ((-0.1, 0.2, 0.3, 1.1),), (0.5,), ("dog",), ("dog",), features_KD, "ab")
    again = ImageRegions.from_record(regions.to_record())
    np.testing.assert_array_equal(again.features_KD, from_bfloat16_bits(bits))
    assert ImageRegions.from_record({"truth": b""}) is None
    assert again.to_json() == regions.to_json() and again.spatial_text == " dog: [-0.1, 0.2, 0.3, 1.1]"
    with pytest.raises(UserError, match="kept regions of a record cannot be read"):
        ImageRegions.from_json("{}", features_KD)
