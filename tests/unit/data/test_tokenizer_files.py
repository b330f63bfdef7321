# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files as models publish them give the ids of transformers' classes."""

import json
import struct

import pytest
import shared_data
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.data.tokenizer_files import SentencePieceModel, load_backend, parse_sentencepiece, published_files

transformers = pytest.importorskip("transformers")
from transformers.tokenization_utils_base import generate_merges

REAL = shared_data.ROOT / "tokenizers"
MISTRAL, GPT2_VOCAB, GPT2_MERGES = (
    REAL / name for name in ("mistral_v1_tokenizer.model", "gpt2_encoder.json", "gpt2_vocab.bpe")
)
needs_mistral = shared_data.needs(f"tokenizers/{MISTRAL.name}")
needs_gpt2 = shared_data.needs(f"tokenizers/{GPT2_VOCAB.name}", f"tokenizers/{GPT2_MERGES.name}")
TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "Describe the image.",
    " leading space",
    "  two leading, three   between, trailing  ",
    "line one\nline two\n\n\tindented\r\nend",
    "A naïve café — 12.5 % of the visitors… Ünïcödé",
    "日本語のテキスト and 中文, русский, العربية, हिन्दी",
    "emoji 🦁🏳️‍🌈 and \u200b zero width, \u00a0 no-break",
    "don't you're I'll WE'VE 3rd 1,234,567.89 x=3*y**2;",
    "USER: <image>\nWhat is this? ASSISTANT: A lion.</s>",
    "<s>[INST] hi [/INST]</s> <unk> <|endoftext|>",
    "\u2581already\u2581escaped",
    "a" * 50 + " " * 20 + "b",
)


def check_same_ids(backend, theirs, texts=TEXTS):
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, repr(text)


# SentencePiece


def field(number: int, value: int | float | bytes) -> bytes:
    """A protobuf field."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_file(pieces, is_bpe=True, charsmap=b"", **normalizer) -> bytes:
    """A SentencePiece file of (piece, score, type) rows."""
    rows = b"".join(field(1, field(1, p.encode()) + field(2, float(s)) + field(3, k)) for p, s, k in pieces)
    flags = {"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    settings = field(2, charsmap) + b"".join(field(flags[name], int(value)) for name, value in normalizer.items())
    return rows + field(2, field(3, 2 if is_bpe else 1)) + field(3, settings)


@pytest.fixture(scope="module")
def llama_pieces():
    """(piece, score, type) of a small LLaMA vocabulary: specials, bytes, and learned pieces with falling scores."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    learned = sorted(backend.get_vocab().keys() - {"</s>", "<s>", "<unk>"}, key=backend.get_vocab().get)
    merged = [piece for piece in learned if len(piece) > 1]
    letters = [piece for piece in learned if len(piece) == 1]
    head = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    head += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] + [("<mine>", 0.0, 4)]
    return head + [(piece, -float(i), 1) for i, piece in enumerate(merged + letters)]


def llama_tokenizer(pieces, **settings):
    """transformers' class with the vocabulary and added tokens of a SentencePiece file, and merges by its scores."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == 1}
    added = [tokenizers.AddedToken(p, normalized=False, special=kind == 3) for p, _, kind in pieces if kind in (3, 4)]
    return transformers.LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab, scores), additional_special_tokens=added, **settings
    )


def sentencepiece_ids(pieces, text: str) -> list[int]:
    """SentencePiece's own algorithm: the adjacent pair of highest score is merged, the leftmost first."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind in (1, 6)}
    score = {piece: score for piece, score, kind in pieces if kind == 1}
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(-score[a + b], k) for k, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in score]
        if not pairs:
            break
        _, k = min(pairs)
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    byte_pieces = ([f"<0x{byte:02X}>" for byte in s.encode()] if s not in ids else [s] for s in symbols)
    return [ids[piece] for parts in byte_pieces for piece in parts]


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_a_tokenizer_model_alone_gives_the_ids_of_llamas_class(tmp_path, llama_pieces, settings):
    data = sentencepiece_file(llama_pieces, remove_extra_whitespaces=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = load_backend(tmp_path / "tokenizer.model")
    check_same_ids(backend, llama_tokenizer(llama_pieces, **settings), (*TEXTS, "a <mine> b<mine>"))
    ours = tokenizer.load(str(tmp_path))
    assert (ours.bos_ids, ours.eos_id, ours.unk_id) == ([1], 2, 0)
    for text in TEXTS[4:9]:
        if settings.get("add_prefix_space", True):
            assert ours.decode(ours.encode(text)) == text.removeprefix(" ")


def test_merges_follow_the_scores_and_not_the_order_of_the_file(tmp_path):
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("bc", -9.0, 1), ("ab", -1.0, 1)]
    rows += [(letter, -20.0, 1) for letter in "\u2581abc"]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(rows, add_dummy_prefix=False))
    assert load_backend(tmp_path / "tokenizer.model").encode("abc").tokens == ["ab", "c"]


def test_extra_spaces_are_removed_where_the_model_says_so(tmp_path, llama_pieces):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(llama_pieces, remove_extra_whitespaces=True))
    backend = load_backend(tmp_path / "tokenizer.model")
    assert backend.encode("  a   b ").ids == backend.encode("a b").ids


@pytest.mark.slow
@needs_mistral
def test_the_real_mistral_file_gives_the_ids_of_llamas_class():
    model = parse_sentencepiece(MISTRAL.read_bytes())
    assert model.is_bpe and model.add_dummy_prefix and not model.remove_extra_whitespaces and not model.charsmap
    backend = load_backend(MISTRAL)
    check_same_ids(backend, llama_tokenizer(model.pieces))
    for text in TEXTS:
        if text and text[0] not in " \u2581" and "<s>" not in text and "</s>" not in text:
            assert backend.encode(text).ids == sentencepiece_ids(model.pieces, text), repr(text)
    ours = tokenizer.load(str(MISTRAL))
    assert ours.encode("Hello world") == [22557, 1526] and ours.vocab_size == 32000
    assert ours.encode("Hello  world") == [22557, 28705, 1526]  # two spaces: the run of spaces is merged last
    assert list(published_files(MISTRAL)) == ["tokenizer.model"]


def test_added_tokens_get_the_ids_of_their_files(tmp_path, llama_pieces):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(llama_pieces, remove_extra_whitespaces=False))
    size = len(llama_pieces)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 1, "<im_start>": size}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    decoder = {str(size + 2): {"content": "<box>", "special": False, "normalized": False, "lstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    ours = tokenizer.load(str(tmp_path))
    assert [ours.token_to_id(t) for t in ("<im_start>", "<pad>", "<box>")] == [size, size + 1, size + 2]
    assert ours.pad_id == size + 1 and ours.vocab_size == size + 3
    ids = ours.encode("a <box><im_start>", parse_special=True)
    assert ids[-2:] == [size + 2, size] and len(ids) == 3
    assert size + 1 not in ours.encode("<pad>") and size + 2 in ours.encode("<box>")
    assert set(published_files(tmp_path / "tokenizer.model")) == {
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
    tokenizer.load.cache_clear()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": size + 1}))
    with pytest.raises(UserError, match=f"'<im_start>' the id {size + 1}, but it has {size}"):
        tokenizer.load(str(tmp_path))


def test_a_tiktoken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UserError, match="tiktoken vocabulary"):
        tokenizer.load(str(tmp_path))


# Byte-level BPE


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A folder with vocab.json and merges.txt of a small byte-level BPE."""
    folder = tmp_path_factory.mktemp("byte_level")
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(TEXTS * 2, 400, 2, False, ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>"])
    backend.save_model(str(folder))
    return folder


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}, {"bos_token": "</s>", "unk_token": "</s>"}])
def test_vocab_json_and_merges_give_the_ids_of_gpt2s_class(tmp_path, byte_level, settings):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((byte_level / name).read_bytes())
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    added = {str(size): {"content": "<image>", "special": True, "normalized": False}}
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = load_backend(tmp_path / "vocab.json")
    check_same_ids(backend, transformers.GPT2Tokenizer.from_pretrained(tmp_path), (*TEXTS, "a <image>b"))
    assert backend.token_to_id("<image>") == size
    assert backend.decode(backend.encode("line one\n ünï 🦁").ids).lstrip() == "line one\n ünï 🦁"
    assert {"vocab.json", "merges.txt"} < set(published_files(tmp_path / "vocab.json"))


@needs_gpt2
def test_the_real_gpt2_files_give_the_ids_of_gpt2s_class(tmp_path):
    (tmp_path / "vocab.json").write_bytes(GPT2_VOCAB.read_bytes())
    (tmp_path / "merges.txt").write_bytes(GPT2_MERGES.read_bytes())
    backend = load_backend(tmp_path / "vocab.json")
    lines = GPT2_MERGES.read_text("utf-8").splitlines()[1:]
    theirs = transformers.GPT2Tokenizer(
        json.loads(GPT2_VOCAB.read_text()), [tuple(line.split()) for line in lines if line]
    )
    check_same_ids(backend, theirs)
    assert backend.encode("Hello world").ids == [15496, 995]


def llama3_like() -> tokenizers.Tokenizer:
    """A tokenizer.json in the form of LLaMA-3's: a split by its expression, byte-level BPE, whole words first."""
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 2, trainer)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"])
    return backend


def test_llama3s_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
    llama3_like().save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    backend = load_backend(tmp_path / "tokenizer.json")
    check_same_ids(backend, theirs, (*TEXTS, "<|begin_of_text|><|start_header_id|>user\n\nhi<|eot_id|>"))


# WordPiece


@pytest.mark.parametrize(
    "settings", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_a_vocab_txt_follows_its_settings_as_berts_class(tmp_path, settings):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "The",
        "##s",
        "image",
        "cafe",
        "café",
        "日",
        "日本",
        "a",
        ".",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, **settings)
    check_same_ids(load_backend(tmp_path / "vocab.txt"), theirs, (*TEXTS, "The images.", "the Café cafe", "日本 a"))


# What is no tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"", "cannot be read as a tokenizer"),
        (b"\xff\x00\xfe", "cannot be read as a tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        tokenizer.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_vocabulary_without_merges_is_named(tmp_path, byte_level):
    (tmp_path / "vocab.json").write_bytes((byte_level / "vocab.json").read_bytes())
    with pytest.raises(UserError, match="needs its merges: put merges.txt beside it"):
        tokenizer.load(str(tmp_path))


def test_damaged_settings_beside_a_tokenizer_are_named(tmp_path, byte_level):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((byte_level / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is no JSON object"):
        tokenizer.load(str(tmp_path))


def test_a_sentencepiece_file_keeps_its_flags():
    rows = [("<unk>", 0.0, 2), ("a", -1.5, 1)]
    data = sentencepiece_file(
        rows, is_bpe=False, charsmap=b"xyz", add_dummy_prefix=False, remove_extra_whitespaces=False
    )
    assert parse_sentencepiece(data) == SentencePieceModel(tuple(rows), b"xyz", False, False, False)
