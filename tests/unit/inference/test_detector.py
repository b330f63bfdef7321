# SPDX-License-Identifier: Apache-2.0
"""Detection: batches do not matter, options change what is found, wrong input is refused in a sentence."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import small_detector
from PIL import Image
from small_detector import canned, picture

from lionjax import cli, convert
from lionjax.core.types import UserError
from lionjax.data import region_phrases, tokenizer
from lionjax.inference import detector
from lionjax.inference.detector import DetectorImages
from lionjax.models.vision import grounding_dino
from lionjax.models.vision.grounding_dino import GroundingDino
from lionjax.models.vision.grounding_dino_weights import original_weight_map


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return small_detector.detector(tmp_path_factory.mktemp("detector"))


def test_nms_and_remove_combined_change_boxes_and_phrases(found, monkeypatch):
    ids = region_phrases.encode_caption(found.tokenizer, "red ball. dog.")[0]  # [CLS] red ball . dog . [SEP]
    prob_QL = np.zeros((3, len(ids)))
    prob_QL[0, [1, 2, 4]] = 0.6, 0.5, 0.4
    prob_QL[1, 4], prob_QL[2, 2] = 0.5, 0.2
    box_Q4 = [[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.39], [0.1, 0.1, 0.1, 0.1]]
    made = canned(found, prob_QL, box_Q4, monkeypatch)
    (plain,) = made.detect([picture(40, 40)], "red ball. dog", 0.3, 0.3)
    assert plain.phrases == ("red ball dog", "dog") and plain.scores == pytest.approx((0.6, 0.5))
    np.testing.assert_allclose(plain.boxes_K4[0], [0.3, 0.3, 0.7, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(plain.features_KD[:, 0], [0, 36])
    (single,) = made.detect([picture(40, 40)], "red ball. dog", 0.3, 0.3, nms_iou=0.5, remove_combined=True)
    assert single.phrases == ("red ball",)
    (nothing,) = made.detect([picture(40, 40)], "red ball. dog", 0.99)
    assert nothing.boxes_K4.shape == (0, 4) and nothing.phrases == nothing.scores == ()


@pytest.mark.slow
def test_an_image_gets_the_same_result_in_a_batch_of_unequal_ones_as_alone(found, monkeypatch):
    monkeypatch.setattr(detector, "BATCH_SIZES", (4,))  # one compilation
    images = [picture(50, 40, 1), picture(48, 42, 2), picture(52, 41, 3)]  # all are padded to one size
    assert len({found.padded_shape(image) for image in images}) == 1
    prompts = ["red ball.", "dog. cat. a zoo.", "dogs"]
    together = found.forward(images, prompts)
    c, images_of = small_detector.TINY, found.images
    for image, prompt, output in zip(images, prompts, together):
        (alone,) = found.forward([image], [prompt])
        for name in ("prob_QL", "box_Q4", "feature_QD"):
            np.testing.assert_allclose(getattr(output, name), getattr(alone, name), atol=2e-5, err_msg=name)
    height, width = found.padded_shape(images[0])
    pixels = found.preprocess(images[0])
    image_1HWC, mask_1HW = np.zeros((1, height, width, 3), np.float32), np.zeros((1, height, width), bool)
    inside = (0, slice(pixels.shape[0]), slice(pixels.shape[1]))
    image_1HWC[inside], mask_1HW[inside] = (pixels / 255 - np.array(images_of.mean)) / np.array(images_of.std), True
    ids = np.array([together[0].ids], np.int32)
    run = jax.jit(lambda *inputs: GroundingDino(c).apply({"params": found.params}, *inputs))
    direct = run(image_1HWC, mask_1HW, ids, np.ones_like(ids))
    np.testing.assert_allclose(together[0].box_Q4, direct.boxes_BQ4[0], atol=2e-5)
    np.testing.assert_allclose(together[0].feature_QD, direct.features_BQD[0], atol=2e-4)
    np.testing.assert_allclose(together[0].prob_QL, jax.nn.sigmoid(direct.logits_BQL[0]), atol=2e-5)


def test_images_prompts_and_thresholds_that_cannot_be_used_are_refused_in_a_sentence(found):
    image = picture(40, 40)
    for name in ("box_threshold", "text_threshold", "nms_iou"):
        with pytest.raises(UserError, match=f"{name} is 1.5; give a number in 0..1"):
            found.detect([image], "a cat.", **{name: 1.5})
    with pytest.raises(UserError, match="an image is 1 x 40 pixels; the detector needs at least 2"):
        found.detect([image, picture(1, 40)], "a cat.")
    with pytest.raises(UserError, match="too narrow: it gives the detector .* positions for its 900 queries"):
        wide = dataclasses.replace(found, config=dataclasses.replace(found.config, num_queries=900))
        wide.detect([picture(40, 2)], "a cat.")
    with pytest.raises(UserError, match="images is a single Image; give a list"):
        found.detect(image, "a cat.")
    with pytest.raises(UserError, match="2 prompts were given for 1 images"):
        found.detect([image], ["a cat.", "a dog."])
    with pytest.raises(UserError, match="the prompt is ' . '; give names separated by full stops"):
        found.detect([image], " . ")


def test_the_command_prints_boxes_writes_json_and_draws(found, monkeypatch, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for file, size in zip(files, [(40, 20), (30, 30)]):
        picture(*size).save(file)
    prob_QL = [[0, 0.4, 0.6, 0, 0], [0, 0.1, 0, 0, 0]]
    made = canned(found, prob_QL, [[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]], monkeypatch)
    monkeypatch.setattr(detector, "load", lambda folder: made)
    words = ["detect", "folder", "--image", *files, "--prompt", "red ball", "--out", str(tmp_path / "out.png")]
    assert cli.main(words) == 0
    line = "0.600  0.250 0.250 0.750 0.750  red ball"
    assert capsys.readouterr().out.splitlines() == [f"{file}  {line}" for file in files]
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 600  # two images beside each other
    assert cli.main([*words, "--json", "--text-threshold", "0.5"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["phrases"] for entry in entries] == [["ball"], ["ball"]]
    assert [entry["pixel_boxes"] for entry in entries] == [[[10, 5, 30, 15]], [[7.5, 7.5, 22.5, 22.5]]]
    assert cli.main([*words, "--box-threshold", "2"]) == 2
    assert capsys.readouterr().err == "lionjax: box_threshold is 2.0; give a number in 0..1\n"


def test_a_prompt_of_more_than_256_tokens_is_cut_with_a_warning(found, monkeypatch, caplog):
    made = canned(found, np.zeros((2, 256)), np.zeros((2, 4)), monkeypatch)
    (output,) = made.forward([picture(40, 40)], "cat. " * 200)
    assert len(output.ids) == 256 and output.num_cut == 146
    assert "the prompt has 402 tokens; the last 146 are cut" in caplog.text
    short = dataclasses.replace(made, config=dataclasses.replace(made.config, max_text_len=8))
    (output,) = short.forward([picture(40, 40)], "cat. dog. red ball.")  # 9 tokens
    assert (
        output.ids == tuple(found.tokenizer.bos_ids + found.tokenizer.encode("cat. dog. red ball."))
        and output.num_cut == 1
    )


def test_a_nan_is_refused_in_a_sentence(found, monkeypatch):
    broken = (np.full((1, 12, 4), np.nan), np.zeros((1, 12, 4)), np.zeros((1, 12, 36)))
    monkeypatch.setattr(detector, "_outputs", lambda *arguments: broken)
    with pytest.raises(UserError, match="non-finite boxes"):
        found.detect([picture(40, 40)], "a cat.")


def test_the_digest_depends_on_weights_and_image_settings(found):
    again = dataclasses.replace(found)
    assert again.digest == found.digest and len(found.digest) == 16
    others = [
        dataclasses.replace(found, params=small_detector.params(1)),
        dataclasses.replace(found, images=DetectorImages()),
    ]
    assert len({other.digest for other in (*others, found)}) == 3


def test_a_folder_is_loaded_with_its_tokenizer_and_image_settings_or_refused(found, tmp_path):
    folder = tmp_path / "ours"
    convert.save(small_detector.TINY, found.params, folder)
    with pytest.raises(UserError, match="ours has no tokenizer; copy BERT's vocab.txt"):
        detector.load(folder)
    small_detector.save_vocabulary(folder)
    (folder / "origin").mkdir(exist_ok=True)
    small_detector.save_images(folder / "origin")
    loaded = detector.load(folder)
    assert loaded.config == small_detector.TINY and loaded.images.fit == small_detector.IMAGES.fit
    assert loaded.tokenizer.encode("dogs.") == found.tokenizer.encode("dogs.")
    (folder / "vocab.txt").write_text("\n".join([*small_detector.PIECES, *map(str, range(20))]))
    tokenizer.load.cache_clear()
    with pytest.raises(UserError, match="the tokenizer has 38 tokens but the detector's word table has 24 rows"):
        detector.load(folder)
    other = dataclasses.replace(small_detector.TINY, delimiter_ids=(101, 102))
    with pytest.raises(UserError, match=r"a text with the ids \[2, 3\], but .* phrases end with \[101, 102"):
        detector.check_tokenizer(found.tokenizer, other)
    with pytest.raises(UserError, match="there is no folder"):
        detector.load(tmp_path / "none")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.slow
def test_a_released_file_is_read_by_its_name_and_one_with_code_is_refused(found, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(grounding_dino, "GROUNDING_DINO_SWIN_T", small_detector.TINY)
    state = convert.state_dict_from_params(original_weight_map(small_detector.TINY), found.params)
    file = small_detector.save_vocabulary(tmp_path / "dino") / "groundingdino_swint_ogc.pth"
    model = {f"module.{name}": torch.tensor(np.asarray(tensor)) for name, tensor in state.items()}
    torch.save({"model": model}, file)
    loaded = detector.load(file.parent)
    assert loaded.config == small_detector.TINY and loaded.images == DetectorImages()
    assert dataclasses.replace(loaded, images=found.images).digest == found.digest
    torch.save({"model": model, "evil": Payload(tmp_path / "was-here")}, file)
    with pytest.raises(UserError, match="it holds code"):
        detector.load(file.parent)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="groundingdino_swint_ogc.pth"):
        detector.load(file.parent)
    assert not (tmp_path / "was-here").exists()
