# SPDX-License-Identifier: Apache-2.0
"""Ranking texts with CLIP and SigLIP: folders as they come, tokenizers to the id, images, scores, and bad input."""

import gzip
import json
import shutil

import numpy as np
import pytest
import small_clip
from PIL import Image
from shared_data import ROOT, needs

from lionjax import cli, convert
from lionjax.core.types import UserError
from lionjax.data import contrastive_tokenizers, tokenizer
from lionjax.inference import dual_encoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

REAL_MERGES = "tokenizers/clip_bpe_simple_vocab_16e6.txt.gz"
TEXTS = ("a photo of a cat", "A  Red dog!", "don't\n 22 cats", "<|endoftext|> a dog", "naïve café", "x" * 40, "dog?!")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return small_clip.save_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pictures(tmp_path):
    rng, files = np.random.default_rng(3), []
    for number, shape in enumerate(((31, 50), (40, 23))):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(files[-1])
    return files


def test_texts_that_begin_alike_have_the_embeddings_of_each_alone(clip_folder):
    encoder = dual_encoder.load(clip_folder)
    beginnings = ("", "a photo of a dog", "a photo of a cat and", "2")
    words = (" cat", " dog", "s", "", " red", "don't", "\u00e9", "<|endoftext|>", ".")
    texts = [f"{beginning}{word}" for beginning in beginnings for word in words] * 2
    many = [f"a photo of {letter}{other}" for letter in "abcdefghijklmnopqr" for other in "abcdefghijklmnopqr"]
    for group in (texts, many, ["a dog"]):
        alone = encoder.embed_texts(group, allow_empty=True)
        np.testing.assert_allclose(encoder.embed_candidates(group), alone, atol=1e-5)


def test_clip_text_has_the_ids_of_transformers_and_a_cut_text_keeps_its_end(clip_folder, tmp_path):
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(clip_folder), dual_encoder.load(clip_folder)
    length = ours.config.text.max_positions
    assert max(len(theirs(text)["input_ids"]) for text in TEXTS) > length  # one of them is cut
    for text in TEXTS:
        (ids,) = ours.encode([text])
        expected = theirs(text, truncation=True, max_length=length)["input_ids"]
        assert ids[: len(expected)].tolist() == expected and expected[-1] == ours.config.text.eos_token_id
        assert set(ids[len(expected) :].tolist()) <= {ours.config.text.eos_token_id}
    assert tokenizer.load(str(clip_folder)).decode(theirs("a red dog")["input_ids"][1:-1]) == "a red dog "
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved = tokenizer.load(str(tmp_path), from_files=True)
    for text in TEXTS:
        assert [*saved.bos_ids, *saved.encode(text, parse_special=True), saved.eos_id] == theirs(text)["input_ids"]


def test_openai_merges_imply_the_vocabulary(tmp_path, clip_folder):
    vocabulary, merges = small_clip.clip_vocabulary()
    lines = ["bpe_simple_vocab", *(" ".join(pair) for pair in merges)]
    file = tmp_path / contrastive_tokenizers.OPENAI_MERGES_FILE
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    ours, theirs = tokenizer.load(str(tmp_path), from_files=True), tokenizer.load(str(clip_folder), from_files=True)
    assert ours.backend.get_vocab() == theirs.backend.get_vocab()
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos_ids, ours.eos_id) == (theirs.bos_ids, theirs.eos_id)


@pytest.mark.shared_data
@needs(REAL_MERGES)
def test_the_real_vocabulary_gives_the_ids_of_the_release(tmp_path):
    shutil.copy(ROOT / REAL_MERGES, tmp_path / contrastive_tokenizers.OPENAI_MERGES_FILE)
    ours = tokenizer.load(str(tmp_path), from_files=True)
    ids = [*ours.bos_ids, *ours.encode("a photo of a cat"), ours.eos_id]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] and ours.vocab_size == 49408
    model = json.loads(ours.backend.to_str())["model"]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for text in (*TEXTS, "naïve café ½ 日本語 😀 we've", "Ångström İstanbul ß", "it's 2024!!! #tag @me"):
        assert [*ours.bos_ids, *ours.encode(text, parse_special=True), ours.eos_id] == theirs(text)["input_ids"]


def test_siglip_text_is_lower_case_without_punctuation_and_padded_with_the_end():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -2.0), ("▁", -3.0), ("s", -3.0)]
    backend = contrastive_tokenizers.siglip_backend(pieces, 2, b"", lower=True)
    assert backend.encode("  A, (Cats)!  ").ids == [3, 4, 6]
    assert backend.encode("a</s>z").ids == [3, 1, 5, 2]  # a special token stays one


# Random models of a few numbers amplify rounding errors; `tests/parity/test_clip.py` compares them closely.
def test_images_and_texts_have_transformers_embeddings_and_probabilities(clip_folder, pictures):
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    images, texts = [Image.open(file) for file in pictures], ["a photo of a cat", "a dog", "red"]
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip_folder)(images, return_tensors="pt")
    words = transformers.CLIPTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**pixels, **words)
    ours = dual_encoder.load(clip_folder)
    np.testing.assert_allclose(ours.embed_images(pictures), theirs.image_embeds, atol=5e-4)
    np.testing.assert_allclose(ours.embed_texts(texts), theirs.text_embeds, atol=5e-4)
    np.testing.assert_allclose(ours.logits(pictures, texts), theirs.logits_per_image, atol=5e-3)
    np.testing.assert_allclose(
        ours.scorer(pictures)([texts, texts[::-1]]),
        [theirs.logits_per_image[0], theirs.logits_per_image[1].flip(0)],
        atol=5e-3,
    )
    for ranking, probs_M in zip(ours.rank(pictures, texts), theirs.logits_per_image.softmax(dim=1)):
        assert [texts[k] for k in ranking.order] == list(ranking.texts)
        np.testing.assert_allclose(ranking.probabilities, probs_M.sort(descending=True).values, atol=5e-3)


def test_siglip_ranks_by_each_pairs_own_sigmoid(tmp_path, pictures):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = small_clip.siglip_model(rng)
    model.save_pretrained(tmp_path)
    backend = contrastive_tokenizers.siglip_backend([("</s>", 0), ("<unk>", 0), ("▁a", -1), ("▁cat", -1)], 1, b"", True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(tmp_path)
    side = model.config.vision_config.image_size
    transformers.SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path)
    ours, texts = dual_encoder.load(tmp_path), ["a cat", "A cat, a cat."]
    length = model.config.text_config.max_position_embeddings
    ids = [fast(text)["input_ids"] + [0] for text in texts]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    np.testing.assert_array_equal(ours.encode(texts), ids)
    processor = transformers.SiglipImageProcessor.from_pretrained(tmp_path)
    pixels = processor([Image.open(file) for file in pictures], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**pixels, input_ids=ids)
    np.testing.assert_allclose(ours.logits(pictures, texts), theirs.logits_per_image, atol=5e-3)
    for ranking, probs_M in zip(ours.rank(pictures, texts), theirs.logits_per_image.sigmoid()):
        np.testing.assert_allclose(ranking.probabilities, probs_M.sort(descending=True).values, atol=5e-3)


def test_rank_prints_the_texts_of_each_image_also_from_converted_weights(clip_folder, pictures, tmp_path, capsys):
    convert.convert(clip_folder, tmp_path / "jax", "jax")
    texts = ["a photo of a cat", "a dog"]
    arguments = ["--image", *map(str, pictures), "--texts", *texts]
    assert cli.main(["rank", str(tmp_path / "jax"), *arguments, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    rankings = dual_encoder.load(clip_folder).rank(pictures, texts)
    for entry, file, ranking in zip(entries, pictures, rankings, strict=True):
        assert entry["image"] == str(file) and [row["text"] for row in entry["texts"]] == list(ranking.texts)
        assert [row["probability"] for row in entry["texts"]] == list(ranking.probabilities)
    assert cli.main(["rank", str(tmp_path / "jax"), *arguments]) == 0
    assert rankings[0].texts[0] in capsys.readouterr().out.splitlines()[0]


def test_bad_input_is_one_sentence(clip_folder, pictures, tmp_path, capsys):
    ours = dual_encoder.load(clip_folder)
    with pytest.raises(UserError, match="there are no texts to rank"):
        ours.rank(pictures, [])
    with pytest.raises(UserError, match="a text is '  '; give a text with at least one word"):
        ours.embed_texts(["a dog", "  "])
    with pytest.raises(UserError, match="texts is the single text 'a dog'"):
        ours.rank(pictures, "a dog")
    with pytest.raises(UserError, match="an image is 9 x 1 pixels; the image tower needs at least 2"):
        ours.embed_images([np.zeros((1, 9, 3), np.uint8)])
    bare = tmp_path / "bare"
    shutil.copytree(clip_folder, bare)
    (bare / "vocab.json").unlink()
    with pytest.raises(UserError, match="bare has no tokenizer"):
        dual_encoder.load(bare)
    shutil.copy(tokenizer.TINY_TOKENIZER_FILE, bare / "tokenizer.json")
    with pytest.raises(UserError, match="use the tokenizer that belongs to these weights"):
        dual_encoder.load(bare)
    other = tmp_path / "mixed"
    small_clip.siglip_model(np.random.default_rng(0)).save_pretrained(other)
    shutil.copy(clip_folder / "config.json", other / "config.json")
    assert cli.main(["rank", str(other), "--image", str(pictures[0]), "--texts", "a"]) == 2
    assert "visual_projection" in capsys.readouterr().err
    assert cli.main(["rank", str(clip_folder), "--image", str(pictures[0]), "--texts", " "]) == 2
