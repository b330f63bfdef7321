# SPDX-License-Identifier: Apache-2.0
"""`lionjax generate DIR --guide CLIP_DIR`: captions of released folders, sums of images, and bad input."""

import json

import numpy as np
import pytest
import small_clip
import tiny_released
from PIL import Image

import lionjax
from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data import contrastive_tokenizers, tokenizer
from lionjax.data.tokenizer import Tokenizer
from lionjax.inference import dual_encoder, guided_captions
from lionjax.inference.guidance import GuidanceConfig
from lionjax.inference.zerocap import ZeroCapConfig, combine_images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ZEROCAP = ("--method", "zerocap", "--k", "12", "--beams", "2", "--steps", "2", "--new-tokens", "4")
ZEROCAP_CONFIG = ZeroCapConfig(4, 2, 2, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a GPT-2, a CLIP, three images) as files; the GPT-2 has 40 positions."""
    folder = tmp_path_factory.mktemp("guide")
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    tokenizer = tiny_released.opt_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2
    )
    small_clip.shaken(transformers.GPT2LMHeadModel(config)).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    (folder / "clip").mkdir()
    small_clip.save_folder(folder / "clip")
    files = [folder / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)).save(file)
    return folder / "gpt2", folder / "clip", list(map(str, files))


def run(capsys, folders, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a caption of the first image."""
    language, clip, files = folders
    code = cli.main(["generate", str(language), "--guide", str(clip), "--image", files[0], *map(str, words)])
    return code, *capsys.readouterr()


def captions(capsys, folders, *words) -> list[dict]:
    code, out, err = run(capsys, folders, "--json", *words)
    assert code == 0, err
    found = json.loads(out)
    assert found["text"] == found["captions"][0]["text"]
    return found["captions"]


@pytest.mark.slow
def test_captions_are_those_of_the_functions_for_an_image_and_for_a_sum_of_images(capsys, folders):
    language, clip, files = folders
    model, encoder = lionjax.load(language), dual_encoder.load(clip)
    image_NE = encoder.image_projections(files)
    for options, weights in (((), (1, 0, 0)), (("--plus", files[1], "--minus", files[2]), (1, 1, -1))):
        image_BE = combine_images(image_NE, weights)[None]
        (magic,) = captions(capsys, folders, *options, "--k", 8, "--new-tokens", 6, "--prompt", "the cats")
        config = GuidanceConfig(6, 8)
        (expected,) = guided_captions.magic_captions(model, encoder, image_BE, "the cats", config)
        assert magic["text"] == expected.text
        assert magic["similarity"] == pytest.approx(expected.similarity, abs=1e-5)
        beams = captions(capsys, folders, *options, *ZEROCAP)
        (expected,) = guided_captions.zerocap_captions(model, encoder, image_BE, "Image of a", ZEROCAP_CONFIG)
        assert [beam["text"] for beam in beams] == [caption.text for caption in expected]
        assert beams[0]["similarity"] == max(beam["similarity"] for beam in beams)


@pytest.mark.slow
def test_one_candidate_and_no_image_weight_are_greedy_decoding(capsys, folders):
    model = lionjax.load(folders[0])
    (answer,) = model.complete(["the cats"])
    text = " ".join(answer.text.split())
    for options in (("--k", 1), ("--k", 9, "--alpha", 0, "--beta", 0)):
        (found,) = captions(capsys, folders, *options, "--new-tokens", 5, "--prompt", "the cats")
        assert text.startswith(found["text"]) and found["text"]


@pytest.mark.slow
def test_forbidden_tokens_and_the_end_of_a_caption_are_those_asked_for(capsys, folders, tmp_path):
    model = lionjax.load(folders[0])
    (first, *_) = captions(capsys, folders, *ZEROCAP)
    ids = model.processor.tokenizer.encode(" " + first["text"])
    (tmp_path / "forbidden.json").write_text(json.dumps(sorted(set(ids))))
    np.save(tmp_path / "forbidden.npy", np.array(sorted(set(ids))))
    found = [
        captions(capsys, folders, *ZEROCAP, "--forbid", tmp_path / f"forbidden.{kind}") for kind in ("json", "npy")
    ]
    assert found[0] == found[1] and found[0][0] != first
    (tmp_path / "bad.json").write_text('["cat"]')
    code, _, err = run(capsys, folders, *ZEROCAP, "--forbid", tmp_path / "bad.json")
    assert code == 2 and "holds no token ids" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--k", 500), "num_candidates is 500; the model has only 340 words"),
        (("--method", "zerocap"), "num_candidates is 512; the model has only 340 words"),
        (("--beams", 3), "--beams is not used by --method magic"),
        ((*ZEROCAP, "--alpha", 0.5), "--alpha is not used by --method zerocap"),
        (("--alpha", 3), "degeneration_penalty is 3"),
        (("--box", "0,0,1,1"), "--box is not used with --guide"),
        (("--minus", "IMAGE"), "the sum of the images is zero"),
        ((*ZEROCAP, "--end", "the cats"), "'the cats' is not one token"),
        ((*ZEROCAP, "--new-tokens", 60), "tokens do not fit the 40 learned positions"),
    ],
)
def test_bad_input_is_one_sentence(capsys, folders, words, message):
    words = [folders[2][0] if word == "IMAGE" else word for word in words]
    code, _, err = run(capsys, folders, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_options_of_guidance_need_a_clip_and_a_prompt_is_needed_without_one(capsys, folders):
    language, clip, files = folders
    for words, message in ((("--alpha", "0.1"), "--alpha needs a CLIP"), ((), "required: --prompt")):
        assert cli.main(["generate", str(language), *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["generate", str(language), "--guide", str(clip)]) == 2
    assert "no image to describe" in capsys.readouterr().err
    assert cli.main(["generate", str(clip), "--guide", str(clip), "--image", files[0]]) == 2
    assert "cannot generate text" in capsys.readouterr().err


def test_a_caption_ends_with_a_token_alone_or_behind_a_word_and_with_the_models_own_end(folders):
    model = lionjax.load(folders[0])
    tokens, config = model.processor.tokenizer, ZeroCapConfig()
    assert guided_captions.with_end_text(config, model).end_token_ids == (*tokens.encode("."), tokens.eos_id)
    tiny = tokenizer.load("tiny")
    assert len(tiny.encode(".")) == 2 and guided_captions._one_token(tiny, ".") == tiny.encode("a star.")[-1:]
    assert guided_captions._one_token(tiny, "a star") == guided_captions._one_token(tiny, "") == []


def test_tokenizers_of_different_languages_are_refused_and_so_is_an_empty_caption(folders):
    model = lionjax.load(folders[0])
    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in "\u0430\u0431\u0432")]
    russian = Tokenizer(contrastive_tokenizers.siglip_backend(pieces, 1, b"", True), ("</s>", "</s>", "<unk>", None))
    with pytest.raises(UserError, match="reads 0 of .* words of the language model's tokenizer"):
        guided_captions.check_texts_match(model.processor.tokenizer, russian)
    with pytest.raises(UserError, match="the caption of image 2 of 2 is empty"):
        guided_captions._require_text(["a dog", " "])
