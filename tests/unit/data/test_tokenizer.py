# SPDX-License-Identifier: Apache-2.0
"""Words to numbers and back, for the tokenizer shipped here and for T5's and BERT's own files."""

import json
import re

import numpy as np
import pytest
import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from lionjax import convert
from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.data.scenes import tasks, world
from lionjax.tiny import tokenizer as tiny_tokenizer

REAL = shared_data.ROOT / "tokenizers"
T5, BERT = REAL / "t5_cc_all.32000.100extra.model", REAL / "bert_uncased_vocab.txt"
needs_t5 = shared_data.needs(f"tokenizers/{T5.name}")
needs_bert = shared_data.needs(f"tokenizers/{BERT.name}")
PRIVATE = "".join(private for *_, private in (*tiny_tokenizer.BOX_DECIMALS, *tiny_tokenizer.BOX_SEPARATORS))
TEXTS = (
    "translate English to German: The house is wonderful.",
    "Where is the red circle? Answer: [0.440,0.060,0.650,0.367]",
    "In the image <image>, can you locate  the man's  hat\nand tell me?",
    "A naïve café — 12.5 % of the visitors…",
)


@pytest.fixture(scope="module")
def tiny():
    return tokenizer.load("tiny")


def test_special_pieces_have_t5s_first_ids_and_the_soft_prompt_follows(tiny):
    ids = [tiny.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>", "<extra_id_0>")]
    assert ids == [0, 1, 2, 3] == [tiny.pad_id, tiny.eos_id, tiny.unk_id, tiny.soft_prompt_id]
    assert tiny.vocab_size == tokenizer.TINY_VOCAB_SIZE == 1024
    assert all(tiny.token_to_id(piece) < len(tokenizer.SPECIAL_TOKENS) for piece in ("<at>", "<boxes>", "<im_patch>"))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581" + PRIVATE, exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_from_the_tiny_tokenizer(text):
    tiny = tokenizer.load("tiny")
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text and tiny.unk_id not in ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " a",
        "  a",
        "   a",
        "a ",
        " a ",
        " ",
        "  ",
        "\ta",
        " \ta",
        "\n a",
        " [0.123,0.456,0.789,1.000]",
        " </s>",
        "a  b",
        " \u00e9",
    ],
)
def test_spaces_before_between_and_after_words_round_trip(tiny, text):
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text and tiny.unk_id not in ids


def test_a_leading_space_is_a_separate_piece(tiny):
    space, red = tiny.token_to_id(tokenizer.SPIECE_UNDERLINE), tiny.token_to_id(f"{tokenizer.SPIECE_UNDERLINE}red")
    assert tiny.encode("red") == [red]
    assert tiny.encode(" red") == [space, red]
    assert tiny.encode("red red") == [red, red]
    assert tiny.encode("") == [] and tiny.encode(" ") == [space, space]


@pytest.mark.slow
def test_every_text_of_the_scenes_round_trips_and_most_words_are_one_piece(tiny):
    rng, pieces, words = np.random.default_rng(0), 0, 0
    for index in range(40):
        scene = world.sample_scene("train", index)
        for task in tasks.TASKS:
            example = tasks.make_example(task, scene, rng)
            for text in (example.question, *example.answers):
                assert tiny.decode(tiny.encode(text)) == text
                for word in re.findall("[A-Za-z]+", text):
                    pieces, words = pieces + len(tiny.encode(word)), words + 1
    assert pieces / words < 1.05


def test_a_box_is_seventeen_pieces_in_any_context(tiny):
    box = len(tiny.encode("[0.123,0.456,0.789,1.000]"))
    assert box == 17
    assert len(tiny.encode("at [0.123,0.456,0.789,1.000]")) == 1 + box
    assert len(tiny.encode("[1.000,0.456,0.789,1.000][0.123,0.456,0.789,0.912]")) == 2 * box
    digits = {tiny.token_to_id(digit) for digit in "0123456789"}
    assert sum(i in digits for i in tiny.encode("[0.123,0.456,0.789,1.000]")) == 4


def test_each_coordinate_of_a_box_has_its_own_decimal_pieces(tiny):
    ids = np.array([tiny.encode(f"[0.{d}{d}5,0.{d}{d}5,1.{d}{d}5,0.{d}{d}5]") for d in range(10)])
    decimals = ids[:, [1, 2, 5, 6, 9, 10, 13, 14]]
    assert len(np.unique(decimals)) == decimals.size == 80
    assert tiny.encode("The [0.345,0.345,1.345,0.345] and")[1:18] == tiny.encode("[0.345,0.345,1.345,0.345]")
    assert not set(tiny.encode("0.345, 1.345; [3,4] (0.345,0.345)")) & set(decimals.flat)


def test_a_user_who_spells_a_special_piece_writes_plain_text(tiny):
    text = "is </s> or <extra_id_0> here <pad>?"
    ids = tiny.encode(text)
    assert not set(ids) & {0, 1, 2, 3} and tiny.decode(ids) == text
    assert {1, 3, 0} <= set(tiny.encode(text, parse_special=True))


def test_decoding_stops_at_the_end_piece_and_leaves_special_pieces_out(tiny):
    ids = [tiny.pad_id, *tiny.encode("a red ring"), tiny.eos_id, *tiny.encode("more"), 0, 0]
    assert tiny.decode(np.array(ids)) == "a red ring"
    assert "more" in tiny.decode(ids, keep_special=True)


def test_truncation_keeps_the_end_piece_and_cuts_the_requested_side(tiny):
    assert tiny.truncate_and_add_special([10, 11, 12], 3) == [10, 11, 1]
    assert tiny.truncate_and_add_special([10, 11, 12], 3, keep="back") == [11, 12, 1]
    assert tiny.truncate_and_add_special([10, 11, 12], 9) == [10, 11, 12, 1]


def test_training_again_gives_the_shipped_file_byte_for_byte(tmp_path):
    tiny_tokenizer.train_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.TINY_TOKENIZER_FILE.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("files", [{}, {"spiece.model": b"\x0a\xff\x01ab"}, {"vocab.txt": b"a\nb"}])
def test_a_folder_without_a_readable_tokenizer_raises_a_one_sentence_error(tmp_path, files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        tokenizer.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_of_converted_weights_has_the_tokenizer_that_came_with_them(tmp_path, tiny):
    source = tmp_path / "llama"
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.LlamaConfig(**sizes, vocab_size=tokenizer.TINY_VOCAB_SIZE)
    transformers.LlamaForCausalLM(settings).save_pretrained(source)
    (source / "tokenizer.json").write_bytes(tokenizer.TINY_TOKENIZER_FILE.read_bytes())
    convert.convert(source, tmp_path / "converted", "jax")
    known = tokenizer.load(str(tmp_path / "converted"))
    assert known.encode("a red circle") == tiny.encode("a red circle")


@needs_t5
def test_t5_ids_equal_transformers():
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(str(T5))
    pieces, charsmap = tokenizer.parse_sentencepiece_model(T5.read_bytes())
    drop = ("<pad>", "</s>", "<unk>", "<s>")
    words = [p for p in pieces if p[0] not in drop and "<extra_id_" not in p[0]]
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary, table = (head + words)[:32000], {"_spm_precompiled_charsmap": charsmap}
    theirs = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=100, **table)
    for text in TEXTS:
        ids = ours.truncate_and_add_special(ours.encode(text), 99)
        assert ids == theirs(text).input_ids
    assert ours.encode(TEXTS[0]) == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert (ours.pad_id, ours.eos_id, ours.soft_prompt_id, ours.vocab_size) == (0, 1, 32099, 32100)
    assert ours.token_to_id("<extra_id_99>") == 32000


@needs_bert
def test_bert_ids_equal_transformers_and_dec_comes_last():
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(str(BERT))
    vocabulary = {word: i for i, word in enumerate(BERT.read_text("utf-8").splitlines())}
    theirs = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True, truncation_side="left")
    for text in TEXTS:
        assert ours.truncate_and_add_special(ours.encode(text), 99) == theirs(text).input_ids
        cut = theirs(text, truncation=True, max_length=6).input_ids
        assert ours.truncate_and_add_special(ours.encode(text), 6, keep="back") == cut
    assert ours.token_to_id("[DEC]") == 30522 and ours.vocab_size == 30523
    assert ours.decode(ours.truncate_and_add_special(ours.encode("Where is it?"), 9)) == "where is it?"


@needs_t5
def test_sentencepiece_start_piece_gets_no_id():
    pieces, charsmap = tokenizer.parse_sentencepiece_model(T5.read_bytes())
    assert "<s>" in [piece for piece, _ in pieces] and charsmap
    assert tokenizer.load(str(T5)).backend.token_to_id("<s>") is None


def test_hugging_face_gives_the_same_ids_from_the_shipped_file(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.TINY_TOKENIZER_FILE))
    text = "What color is the star? [0.120,0.500,1.000,0.750]"
    assert theirs(text, add_special_tokens=False).input_ids == tiny.encode(text)
    assert json.loads(tokenizer.TINY_TOKENIZER_FILE.read_text())["model"]["byte_fallback"] is True
