# SPDX-License-Identifier: Apache-2.0
"""The refiner: the original's strings for its probabilities, which features it keeps, what its folder holds."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_detector
import small_ram
from golden import folders
from small_detector import picture

from lionjax import cli, convert
from lionjax.convert.formats.ram import RAM
from lionjax.convert.formats.sam import SAM
from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.images import MAX_PIXELS
from lionjax.data.regions import from_bfloat16_bits, to_bfloat16_bits
from lionjax.inference import segmenter, tagger
from lionjax.inference.detector import QueryOutputs
from lionjax.inference.segmenter import Segmenter
from lionjax.inference.tagger import TagResult
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.pipelines import refiner
from lionjax.pipelines.refiner import Refiner, RefinerConfig

DEFAULTS = RefinerConfig()


def random_params(shapes, scale=1.0):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: scale * rng.standard_normal(leaf.shape).astype(np.float32), shapes)


class Fixed:
    """Stands for tagger and detector: gives what it was made with."""

    def __init__(self, tags, outputs, tokens, width=36):
        self.tags, self.outputs, self.tokenizer, self.digest = tags, outputs, tokens, "abc"
        self.config, self.captions = dataclasses.replace(small_detector.TINY, width=width - 4), []

    def tag(self, images):
        return self.tags

    def forward(self, images, captions):
        self.captions += captions
        return self.outputs


def fixed_refiner(tags, outputs, tokens, config=DEFAULTS, sam=None, width=36):
    parts = Fixed(tags, outputs, tokens, width)
    return Refiner(parts, parts, sam, config)


@pytest.mark.parametrize("folder", folders("lyrics"))
def test_boxes_names_and_features_of_a_whole_run_are_the_originals(folder):
    arrays, whole = np.load(folder / "arrays.npz"), json.loads((folder / "refiner.json").read_text())
    setting = json.loads((folder / "config.json").read_text())["refiner"]
    config = RefinerConfig(setting["box_threshold"], setting["text_threshold"], setting["nms_iou"])
    ids, mask = arrays["detector.input_ids"], arrays["detector.attention_mask"]
    outputs = [
        QueryOutputs(1 / (1 + np.exp(-logits[:, :length])), box, feature, tuple(row[:length]))
        for logits, box, feature, row, length in zip(
            *(arrays[f"detector.{name}"] for name in ("pred_logits", "pred_boxes", "hidden_state")), ids, mask.sum(1)
        )
    ]
    split = ([text.split(" | ") for text in whole[key]] for key in ("tags_en", "tags_zh"))
    tags = [TagResult(tuple(en), tuple(zh), (0.9,) * len(en)) for en, zh in zip(*split)]
    images, tokens = [picture(9, 9)] * len(tags), tokenizer.load(str(folder))
    for key, language in (("box_text", "en"), ("box_text_zh", "zh")):
        made = fixed_refiner(tags, outputs, tokens, dataclasses.replace(config, language=language))
        found = made.refine(images)
        assert [regions.spatial_text for regions in found] == whole[key]
        assert made.detector.captions == whole["captions_for_detector"]
        for regions, output in zip(found, outputs):
            assert regions.features_KD.shape == output.feature_QD.shape
            order = np.lexsort(regions.features_KD.T), np.lexsort(output.feature_QD.T)
            np.testing.assert_array_equal(regions.features_KD[order[0]], output.feature_QD[order[1]])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer.load(str(small_detector.save_vocabulary(tmp_path_factory.mktemp("words"))))


def three_queries(num_tokens=6):
    """[CLS] dog , cat . [SEP]: query 2 finds a cat, query 0 a dog with less certainty, query 1 nothing."""
    prob_QL = np.zeros((4, num_tokens), np.float32)
    prob_QL[0, 1], prob_QL[1, 1], prob_QL[2, 3], prob_QL[3, 5] = 0.4, 0.22, 0.6, 0.24
    prob_QL[2, 2] = 0.21  # between the two thresholds
    box_Q4 = np.array([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.3, 0.3], [0, 0, 0.1, 0.1]], np.float32)
    return QueryOutputs(prob_QL, box_Q4, np.arange(4 * 36, dtype=np.float32).reshape(4, 36), ())


DOG_CAT = TagResult(("dog", "cat"), (), (0.9, 0.9))


def test_kept_features_are_those_of_the_boxes_then_the_strongest_others(tokens):
    (regions,) = fixed_refiner([DOG_CAT], [three_queries()], tokens).refine([picture(9, 9)])
    assert regions.names == ("cat", "dog") and regions.phrases == ("| cat", "dog") and regions.tags == DOG_CAT.tags
    assert regions.features_KD[:, 0].tolist() == [72, 0, 108, 36]
    assert regions.spatial_text == " cat: [0.75, 0.75, 1.05, 1.05] dog: [0.4, 0.4, 0.6, 0.6]"
    assert regions.scores == pytest.approx((0.6, 0.4)) and regions.digest == "abc"
    few = fixed_refiner([DOG_CAT], [three_queries()], tokens, RefinerConfig(max_regions=3)).refine([picture(9, 9)])
    assert few[0].features_KD[:, 0].tolist() == [72, 0, 108] and few[0].boxes == regions.boxes


def test_an_image_without_tags_has_no_boxes_but_features_and_is_said(tokens, caplog):
    made = fixed_refiner([TagResult((), (), ()), DOG_CAT], [three_queries(3 + 3)] * 2, tokens)
    empty, full = made.refine([picture(9, 9)] * 2)
    assert empty.boxes == empty.names == () and empty.spatial_text == "" and len(empty.features_KD) == 4
    assert len(full.boxes) == 2 and made.detector.captions == [".", "dog, cat."]
    assert "1 of 2 images have no tag, so nothing is detected there" in caplog.text


def test_boxes_whose_only_token_is_the_captions_own_sep_are_dropped(tokens):
    output = three_queries()
    output.prob_QL[0] = [0, 0, 0, 0, 0, 0.5]  # the original raises IndexError
    output.prob_QL[2] = 0
    (regions,) = fixed_refiner([DOG_CAT], [output], tokens).refine([picture(9, 9)])
    assert regions.boxes == () and regions.features_KD[0, 0] == 0


def test_in_chinese_boxes_without_a_tag_are_dropped_even_all_of_them(tokens):
    tags = TagResult(("Dog", "cat"), ("狗", "猫"), (0.9, 0.9))
    output = three_queries()
    config = RefinerConfig(language="zh")
    (regions,) = fixed_refiner([tags], [output], tokens, config).refine([picture(9, 9)])
    assert regions.names == ("猫",) and regions.features_KD[:, 0].tolist() == [72, 0, 108, 36]
    output.prob_QL[2] = 0
    (regions,) = fixed_refiner([tags], [output], tokens, config).refine([picture(9, 9)])
    assert regions.names == () and regions.spatial_text == ""  # the original raises
    with pytest.raises(UserError, match="0 Chinese tags for 2 tags"):
        fixed_refiner([DOG_CAT], [output], tokens, config).refine([picture(9, 9)])


@pytest.mark.parametrize("name", ["box_threshold", "text_threshold", "nms_iou"])
def test_settings_out_of_range_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} is 1.5; give a number in 0..1"):
        RefinerConfig(**{name: 1.5})
    (tmp_path / refiner.SETTINGS_FILE).write_text(json.dumps({name: -1}))
    with pytest.raises(UserError, match=f"{name} is -1"):
        refiner.read_config(tmp_path)


def test_settings_are_read_from_the_folder_and_unknown_ones_refused(tmp_path):
    assert refiner.read_config(tmp_path) == RefinerConfig()
    config = RefinerConfig(0.1, 0.05, 0.5, "zh", 10)
    refiner.save_config(config, tmp_path)
    assert refiner.read_config(tmp_path) == config
    (tmp_path / refiner.SETTINGS_FILE).write_text('{"threshold": 0.1}')
    with pytest.raises(UserError, match="refiner.json has the setting 'threshold'; give some of box_threshold,"):
        refiner.read_config(tmp_path)
    with pytest.raises(UserError, match="language is 'de'; give 'en' or 'zh'"):
        RefinerConfig(language="de")
    with pytest.raises(UserError, match="has no folder tagger/; a refiner has its tagger in tagger/"):
        refiner.refiner_factory(tmp_path)


@pytest.fixture(scope="module")
def sam():
    config = SamConfig(32, 8, 16, 2, 2, 16, 2, (1,), 32, mask_input_channels=4, decoder_num_heads=2, decoder_mlp_dim=16)
    config = dataclasses.replace(config, iou_head_mlp_dim=8)
    return Segmenter(config, random_params(SAM.abstract_params(config), 0.3))


@pytest.mark.slow
def test_rows_of_segments_are_the_image_embedding_averaged_over_the_mask_of_the_box(sam):
    image, boxes = picture(40, 20), [(0.1, 0.2, 0.6, 0.9), (-0.1, 0.0, 1.2, 1.0)]
    rows_KD = sam.segment_features(image, boxes)
    side = sam.config.image_size
    pixels = segmenter.preprocess_sam_image(image, side)[None]
    square = np.array([[[3.2, 11.2, 19.2, 22.4], [0, 8, 32, 24]]], np.float32)  # the image fills rows 8 to 24

    @jax.jit
    def run(params):
        return Sam(sam.config).apply(
            {"params": params}, method=lambda m: (m.encode(pixels), m(pixels, box_BK4=square)[0])
        )

    embedding, logits = (np.asarray(array)[0] for array in run(sam.params))
    logits = logits[:, 0]
    weight = (1 / (1 + np.exp(-logits))).reshape(2, 4, 4, 4, 4).mean((2, 4))
    expected = (weight[..., None] * embedding).sum((1, 2)) / weight.sum((1, 2))[:, None]
    np.testing.assert_allclose(rows_KD[:, :-4], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rows_KD[:, -4:], [[0.35, 0.55, 0.5, 0.7], [0.5, 0.5, 1, 1]], atol=1e-6)
    assert sam.segment_features(image, []).shape == (0, 36)
    mask_HW = sam.segment(image, boxes[0])  # the logits of the image's part of the square, at the image's size
    assert mask_HW.shape == (image.height, image.width) and mask_HW.dtype == bool
    top, left, height, width = segmenter.Letterbox(*image.size).pixel_rect(side)
    full_HW = np.asarray(jax.image.resize(logits[0], (side, side), "linear"))[top : top + height, left : left + width]
    rows, columns = (np.arange(n) * m // n for n, m in ((image.height, height), (image.width, width)))
    assert (mask_HW == (full_HW[np.ix_(rows, columns)] > 0)).mean() > 0.9 and 0 < mask_HW.mean() < 1


def test_segments_of_kept_boxes_are_further_rows_and_need_a_sam_of_the_same_width(sam, tokens, monkeypatch):
    monkeypatch.setattr(Segmenter, "segment_features", lambda self, image, boxes: np.full((len(boxes), 36), 7.0))
    given = ([DOG_CAT], [three_queries()], tokens)
    (regions,) = fixed_refiner(*given, RefinerConfig(use_sam=True, max_regions=3), sam).refine([picture(9, 9)])
    assert regions.features_KD[:, 0].tolist() == [72, 0, 108, 7, 7]
    assert regions.digest == f"abc+{sam.digest}"
    with pytest.raises(UserError, match="use_sam is true but the refiner has no segmenter"):
        fixed_refiner(*given, RefinerConfig(use_sam=True))
    with pytest.raises(UserError, match="rows of SAM's segments have 36 numbers and the detector's queries 40"):
        fixed_refiner(*given, RefinerConfig(use_sam=True), sam, width=40)


@pytest.fixture
def folder(tmp_path):
    """A refiner's folder with a random tagger, detector and settings by which some boxes are kept."""
    root = tmp_path / "refiner"
    convert.to_torch(small_ram.TINY, random_params(RAM.abstract_params(small_ram.TINY)), root / "tagger")
    (root / "tagger" / tagger.TAG_LIST_FILE).write_text("\n".join(small_ram.WORDS))
    (root / "tagger" / tagger.THRESHOLD_FILE).write_text("0.3\n" * 5)
    convert.save(small_detector.TINY, small_detector.params(), root / "detector")
    small_detector.save_vocabulary(root / "detector")
    (root / "detector" / "origin").mkdir(exist_ok=True)
    small_detector.save_images(root / "detector" / "origin")
    refiner.save_config(RefinerConfig(0.0, 0.0, 0.3), root)
    return root


@pytest.mark.slow
def test_the_command_keeps_in_records_what_the_refiner_finds(folder, tmp_path):
    images = [picture(48, 48, seed) for seed in range(2)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    picture(1, 30).save(tmp_path / "2.png")
    rows = [{"image": f"{number}.png", "question": "what?", "answer": "x"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "build", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--refiner", str(folder), "--regions", "7"]) == 0
    opened = ArrayRecordDataset(str(tmp_path / "out")).open("train", MAX_PIXELS)
    assert (
        len(opened) == 2
        and "2.png: an image is 1 x 30 pixels" in next(tmp_path.glob("out/*/*/*/left_out.txt")).read_text()
    )
    whole = refiner.refiner_factory(folder)()  # on the same devices, so that nothing is compiled again
    for number, expected in enumerate(whole(images)):
        kept = opened.load_regions(number)
        assert kept.names == expected.names and kept.tags == expected.tags and kept.digest == expected.digest
        assert 0 < len(kept.boxes) < 12
        np.testing.assert_allclose(kept.boxes, expected.boxes, atol=1e-4)
        bits = to_bfloat16_bits(expected.features_KD[:7])
        np.testing.assert_allclose(kept.features_KD, from_bfloat16_bits(bits), rtol=0.02, atol=1e-3)
        assert opened.load_record(number)[1].image_info.tags == expected.tags


def test_a_tag_list_of_the_tagger_is_checked_before_anything_is_read(folder, tmp_path, capsys):
    (folder / "tagger" / tagger.TAG_LIST_FILE).unlink()
    words = ["data", "build", "scenes", "--out", str(tmp_path / "out"), "--refiner", str(folder)]
    assert cli.main(words) == 2
    assert "has no ram_tag_list.txt" in capsys.readouterr().err
    assert cli.main([*words, "--tagger", str(folder / "tagger")]) == 2
    assert "build with --tagger or with --refiner" in capsys.readouterr().err
