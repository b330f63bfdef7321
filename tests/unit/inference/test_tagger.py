# SPDX-License-Identifier: Apache-2.0
"""RAM as a tagger: which tags count, folders as they come, pictures in and words out. Its numbers: test_golden."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from small_ram import TINY, WORDS
from weight_files import as_torch, assert_same

from lionjax import convert
from lionjax.convert.formats.ram import RAM
from lionjax.convert.io.reader import open_weights
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.inference import tagger
from lionjax.inference.tagger import TagVocabulary
from lionjax.models.vision import ram
from lionjax.models.vision.ram import Ram
from lionjax.nn import losses


@pytest.fixture(scope="module")
def params():
    rng, shapes = np.random.default_rng(0), RAM.abstract_params(TINY)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def folder(tmp_path, params):
    """A tagger under the original's names with its list; `dog` can never be said."""
    convert.to_torch(TINY, params, tmp_path / "ram")
    (tmp_path / "ram" / tagger.TAG_LIST_FILE).write_text("\n".join(WORDS))  # as the release's, without a last line end
    (tmp_path / "ram" / tagger.THRESHOLD_FILE).write_text("0.5\n0.01\n1.0\n0.65\n0.0\n")
    return tmp_path / "ram"


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (20, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_tag_needs_a_probability_above_its_threshold_and_excluded_tags_never_count():
    tags = TagVocabulary(tuple("abcdef"), np.array([0.65, 0.65, 1.0, 0.45, 0.45, 0.9], np.float32), excluded=(4,))
    share_BV = np.array([[0.65, 0.6500001, 1.0, 0.4500001, 0.99, 0.1], [1.0, 0.0, 1.0, 0.0, 1.0, 0.95]])
    assert tags.above_threshold(share_BV).tolist() == [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]


@pytest.mark.slow
def test_the_tags_of_a_picture_are_those_whose_probability_is_above_the_threshold(folder, picture, params):
    (found,) = tagger.load(folder).tag([picture])
    small = np.asarray(Image.open(picture).resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    image_BHWC = (small - [0.485, 0.456, 0.406])[None] / [0.229, 0.224, 0.225]
    logits_V = Ram(TINY).apply({"params": params}, image_BHWC.astype(np.float32))[0]
    share_V = 1 / (1 + np.exp(-np.asarray(logits_V, np.float64)))
    wanted = [w for w, share, least in zip(WORDS, share_V, (0.5, 0.01, 1.0, 0.65, 0.0)) if share > least]
    assert list(found.tags) == wanted and 0 < len(wanted) < 5 and "dog" not in wanted
    assert str(found) == " | ".join(wanted) and found.chinese == ()
    shares = [share_V[WORDS.index(word)] for word in wanted]
    np.testing.assert_allclose(found.probabilities, shares, rtol=1e-5)


@pytest.mark.slow
def test_tags_of_a_batch_equal_tags_of_each_image_alone(folder, picture):
    one = tagger.load(folder)
    given = [picture, Image.new("RGB", (9, 5), "#808080"), np.zeros((4, 4, 3), np.uint8)] * 6
    share_BV = one.probabilities(given)
    assert share_BV.shape == (18, 5) and one.tag([]) == []
    for image, share_V in zip(given[:3], share_BV[15:]):
        np.testing.assert_allclose(one.probabilities([image])[0], share_V, rtol=1e-5)
    with pytest.raises(UserError, match="images is a single PosixPath; give a list"):
        one.tag(picture)
    with pytest.raises(UserError, match="images is a single ndarray"):
        one.tag(given[2])


def test_a_released_ram_file_is_read_without_its_captioning_weights(tmp_path, folder, picture, params, monkeypatch):
    torch = pytest.importorskip("torch")
    state = convert.state_dict_from_params(ram.weight_map(TINY), params)
    old = {name.replace("tagging_head.", "vision_multi."): tensor for name, tensor in state.items()}
    more = {
        "tag_encoder.encoder.layer.0.output.dense.bias": np.ones(3, np.float32),
        "text_decoder.bert.embeddings.position_ids": np.arange(4),
    }
    (tmp_path / "release").mkdir()
    file = tmp_path / "release" / "ram_swin_large_14m.pth"
    torch.save({"model": as_torch(torch, old | more), "epoch": 5}, file)
    for name in (tagger.TAG_LIST_FILE, tagger.THRESHOLD_FILE):
        shutil.copy(folder / name, file.parent)
    monkeypatch.setattr(ram, "RAM_SWIN_L", TINY)
    assert tagger.load(file.parent).tag([picture]) == tagger.load(folder).tag([picture])

    coverage = convert.convert(file, tmp_path / "ours", "jax")
    assert set(coverage.ignored) == {*more, "epoch"}
    monkeypatch.undo()  # the sizes now stand in our own config, and the list came along
    assert tagger.load(tmp_path / "ours").tag([picture]) == tagger.load(folder).tag([picture])
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    assert_same(open_weights(tmp_path / "back"), state)
    assert (tmp_path / "back" / tagger.TAG_LIST_FILE).read_text() == "\n".join(WORDS)
    assert_same(trees.flatten(convert.from_torch(tmp_path / "back")[1]), trees.flatten(params))


def test_the_tag_list_can_be_replaced_and_tags_can_be_excluded(folder, picture, params):
    one = tagger.load(folder)
    label_VC = np.asarray(params["labels"])[[3, 1]]
    other = one.with_tags(["meadow", "kitten"], label_VC, thresholds=0.0)
    assert other.tag([picture])[0].tags == ("meadow", "kitten")
    same_BV = one.probabilities([picture])[:, [3, 1]]
    np.testing.assert_allclose(other.probabilities([picture]), same_BV, rtol=1e-5)
    np.testing.assert_array_equal(one.with_tags(["x", "y"], label_VC).vocabulary.threshold_V, np.float32(0.68))
    assert other.without(["meadow"]).tag([picture])[0].tags == ("kitten",)
    with pytest.raises(UserError, match="the tag list has no 'sea'"):
        other.without(["sea"])
    with pytest.raises(UserError, match=r"label_embed_VC has shape \(2, 6\); give \(3, 6\)"):
        one.with_tags(["a", "b", "c"], label_VC)


def test_chinese_tags_come_with_the_english_ones(folder, picture):
    (folder / tagger.CHINESE_TAG_LIST_FILE).write_text("\n".join("算猫狗草园"), encoding="utf-8")
    (found,) = tagger.load(folder).tag([picture])
    assert found.chinese == tuple("算猫狗草园"[WORDS.index(word)] for word in found.tags)


@pytest.mark.parametrize(
    "file, text, problem",
    [
        (tagger.TAG_LIST_FILE, None, "has no ram_tag_list.txt; copy the list"),
        (tagger.TAG_LIST_FILE, "a\nb\nc\nd\ne\nf", "5 thresholds for 6 tags"),
        (tagger.THRESHOLD_FILE, "1\n1\n1\nhigh\n1\n", "must have one number per line"),
        (tagger.THRESHOLD_FILE, "1\n1\nnan\n1\n1\n", "non-finite"),
        (tagger.THRESHOLD_FILE, "0.5\n", "1 thresholds for 5 tags"),
        (tagger.CHINESE_TAG_LIST_FILE, "猫\n", "1 Chinese tags for 5 tags"),
        (tagger.TAG_LIST_FILE, "a\nb\nc\nd\n\x00\udcff", "cannot be read as text"),
    ],
)
def test_an_unfitting_tag_list_is_refused_in_one_sentence(folder, file, text, problem):
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=problem):
        tagger.load(folder)


def test_a_list_of_another_length_than_the_weights_and_a_folder_of_another_model_are_refused(folder, tmp_path):
    for name in (tagger.TAG_LIST_FILE, tagger.THRESHOLD_FILE):
        (folder / name).write_text("1\n" * 4)
    with pytest.raises(UserError, match="the tag list has 4 tags but the weights have 5"):
        tagger.load(folder)
    from published_folders import small_folder

    other = small_folder(tmp_path)
    (other / tagger.TAG_LIST_FILE).write_text("a")
    with pytest.raises(UserError, match="holds a T5Config; give a folder with RAM's weights"):
        tagger.load(other)
    with pytest.raises(UserError, match="there is no folder"):
        tagger.load(tmp_path / "nothing")


def test_without_a_threshold_file_the_default_threshold_of_ram_applies(folder):
    (folder / tagger.THRESHOLD_FILE).unlink()
    np.testing.assert_array_equal(tagger.load(folder).vocabulary.threshold_V, np.full(5, np.float32(0.68)))


@pytest.mark.slow
def test_dropout_needs_a_key_and_changes_the_output(params):
    image_BHWC, c = np.ones((1, 16, 16, 3), np.float32), dataclasses.replace(TINY, dropout=0.5)
    still, moved = (Ram(c).apply({"params": params}, image_BHWC, key) for key in (None, jax.random.key(0)))
    np.testing.assert_array_equal(still, Ram(TINY).apply({"params": params}, image_BHWC))
    assert not np.allclose(still, moved)


def test_the_asymmetric_loss_and_its_gradient_are_the_formulas():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((3, 7)).astype(np.float32)
    target = (rng.random((3, 7)) < 0.4).astype(np.float32)
    x, y = torch.tensor(logits, requires_grad=True), torch.tensor(target)
    there, absent = torch.sigmoid(x), (1 - torch.sigmoid(x) + 0.05).clamp(max=1)
    total = y * there.clamp(min=1e-8).log() + (1 - y) * absent.clamp(min=1e-8).log()
    weight = (1 - there * y - absent * (1 - y)).pow(7 * (1 - y)).detach()
    loss = -(weight * total).sum()
    loss.backward()
    mine, gradient = jax.value_and_grad(losses.asymmetric_loss)(logits, target)
    np.testing.assert_allclose(mine, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-7)


def test_tags_of_the_tagger_precede_the_question_in_the_prompt_of_lion(folder, picture):
    (found,) = tagger.load(folder).tag([picture])
    processor = Processor(ProcessorConfig(image_size=28))
    words = processor.prompt.decode(processor.prompt.encode_prompt("What is it?", found.tags))
    assert f"following tags: [{', '.join(found.tags)}]. What is it?" in words
