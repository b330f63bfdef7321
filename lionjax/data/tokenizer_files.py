# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files as models publish them, opened as `tokenizers.Tokenizer`.

| file | of |
|---|---|
| `tokenizer.json` | any model (byte-level BPE of GPT-2, OPT and LLaMA-3, SentencePiece of LLaMA, ...) |
| `tokenizer.model` | LLaMA, Vicuna, Mistral: SentencePiece BPE with byte fallback |
| `spiece.model` | T5, SigLIP: SentencePiece Unigram |
| `vocab.json` and `merges.txt` | GPT-2, OPT: byte-level BPE; CLIP: words with an end |
| `bpe_simple_vocab_16e6.txt.gz` | CLIP in OpenAI's code |
| `vocab.txt` | BERT: WordPiece |

Ids equal those of transformers' classes. Tokens of `added_tokens.json` and `tokenizer_config.json` are added.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from lionjax.core.files import check_downloaded
from lionjax.core.types import UserError
from lionjax.data.contrastive_tokenizers import (
    CLIP_END,
    CLIP_START,
    CLIP_WORD_END,
    OPENAI_MERGES_FILE,
    clip_backend,
    openai_clip_backend,
    siglip_backend,
)

FILE_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", OPENAI_MERGES_FILE, "vocab.txt")
MERGES_FILES = ("merges.txt", "vocab.bpe")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BYTE_LEVEL_SPECIAL_TOKENS = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of SentencePiece's pieces
LAVIS_DECODE_TOKEN = "[DEC]"  # LAVIS adds it to BERT's vocabulary
SENTENCEPIECE_BPE = 2  # model_type of a SentencePiece BPE
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The contents of a SentencePiece file."""

    pieces: tuple[tuple[str, float, int], ...]  # (piece, score, type)
    charsmap: bytes = b""  # precompiled normalizer table
    is_bpe: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of one of the files above; the others of its folder are read where its kind needs them.

    Raises UserError for a failed download, a missing merges file and added tokens that do not fit; other errors of
    damaged files are those of the libraries.
    """
    check_downloaded(path)
    if not path.stat().st_size:
        raise UserError("it is empty (0 bytes); download it again")
    settings, only_missing = read_settings(path.parent), False
    if path.suffix == ".gz":
        return openai_clip_backend(path)
    if path.suffix == ".txt":
        backend = _load_bert(path, settings)
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content.get("model"), dict):
            backend, only_missing = tokenizers.Tokenizer.from_file(str(path)), True
        else:
            backend = _load_byte_level(path, content, settings)
    else:
        backend = _load_sentencepiece(path, settings)
    _add_tokens(backend, settings, path, only_missing)
    return backend


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder, {} for those that are missing.

    The last is under the key "added_tokens". Raises UserError where one is damaged.
    """
    settings: dict[str, Any] = {}
    for name in SETTINGS_FILES:
        if not (folder / name).is_file():
            continue
        check_downloaded(folder / name)
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            settings |= {"added_tokens": dict(content)} if name == "added_tokens.json" else dict(content)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / name} is no JSON object: {error}") from error
    return settings


def published_files(path: Path) -> dict[str, Path]:
    """{name that transformers looks for: file} of a tokenizer file and of those of its folder that belong to it."""
    names = {".txt": "vocab.txt", ".json": "tokenizer.json", ".model": "spiece.model", ".gz": OPENAI_MERGES_FILE}
    files = {names[path.suffix]: path}
    if path.suffix == ".model" and parse_sentencepiece(path.read_bytes()).is_bpe:
        files = {"tokenizer.model": path}
    if path.suffix == ".json" and not isinstance(json.loads(path.read_text("utf-8")).get("model"), dict):
        files = {"vocab.json": path, "merges.txt": _find_merges(path)}
    return files | {name: file for name in SETTINGS_FILES if (file := path.parent / name).is_file() and file != path}


def special_token_texts(settings: dict[str, Any]) -> list[str]:
    """The texts of all special tokens that the settings name, such as `bos_token` and `additional_special_tokens`."""
    texts = []
    for name, value in settings.items():
        if name.endswith("_token") or name in ("additional_special_tokens", "extra_special_tokens"):
            for item in value if isinstance(value, list) else [value]:
                text = item.get("content") if isinstance(item, dict) else item
                texts += [text] if isinstance(text, str) else []
    return list(dict.fromkeys(texts))


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], path: Path, only_missing: bool) -> None:
    """Add the tokens that the settings give an id, in the order of their ids; `only_missing`: not known ones.

    Raises UserError where an added token gets another id.
    """
    special = set(special_token_texts(settings))
    tokens: dict[int, AddedToken] = {}
    for text, token_id in settings.get("added_tokens", {}).items():
        tokens[int(token_id)] = AddedToken(text, special=text in special, normalized=text not in special)
    for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
        tokens[int(token_id)] = AddedToken(token["content"], **flags)
    for token_id, token in sorted(tokens.items()):
        known_id = backend.token_to_id(token.content)
        if known_id is not None and only_missing:
            continue
        if known_id is None or token.content not in {t.content for t in backend.get_added_tokens_decoder().values()}:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
        if (found := backend.token_to_id(token.content)) != token_id:
            raise UserError(
                f"the files beside {path} give the token {token.content!r} the id {token_id}, but it has {found} with "
                "this vocabulary; take all tokenizer files from one release"
            )


def _load_sentencepiece(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    data = path.read_bytes()
    if TIKTOKEN_LINE.match(data):
        raise UserError(
            f"{path} is a tiktoken vocabulary, the original file of LLaMA-3; give the tokenizer.json of its Hugging "
            "Face folder"
        )
    model = parse_sentencepiece(data)
    if str(settings.get("tokenizer_class")).startswith("Siglip"):
        pieces = [(piece, score) for piece, score, _ in model.pieces]
        unk_id = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), 0)
        return siglip_backend(pieces, unk_id, model.charsmap, settings.get("do_lower_case", True))
    return _load_llama(model, settings) if model.is_bpe else _load_t5(model)


def _load_llama(model: SentencePieceModel, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """LLaMA's SentencePiece BPE with byte fallback, as transformers' LlamaTokenizer."""
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    unknown = next((piece for piece, _, kind in model.pieces if kind == UNKNOWN), None)
    bpe = models.BPE(vocabulary, _sentencepiece_merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    has_prefix = settings.get("add_prefix_space")
    has_prefix = model.add_dummy_prefix if has_prefix is None else has_prefix
    scheme = ("always" if settings.get("legacy") or steps else "first") if has_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    special = [piece for piece, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    return backend


def _sentencepiece_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE, which its file only implies: pieces of high score are merged first.

    At equal scores longer parts come first, so that a run of spaces grows from its left as in SentencePiece.
    """
    ids = {piece: i for i, (piece, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = []
    for piece, token_id in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-model.pieces[token_id][1], -len(left), -len(right), token_id, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _load_t5(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """T5's SentencePiece model with its 100 sentinels `<extra_id_i>`, whose ids count down from the last one."""
    # Some copies of the file contain <s> or the sentinels, which would shift all ids.
    skip = {"<pad>", "</s>", "<unk>", "<s>"}
    pieces = [(piece, score) for piece, score, _ in model.pieces]
    text_pieces = [p for p in pieces if p[0] not in skip and not p[0].startswith("<extra_id_")][:31997]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = head + text_pieces + [(piece, 0.0) for piece in sentinels]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    return backend


def _load_byte_level(path: Path, vocabulary: dict[str, int], settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """The byte-level BPE of GPT-2 and OPT, as transformers' GPT2Tokenizer; that of CLIP, as its CLIPTokenizer."""
    lines = _find_merges(path).read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if bad := next((pair for pair in merges if len(pair) != 2), None):
        raise UserError(f"{_find_merges(path)} has the line {' '.join(bad)!r}; each line must hold two tokens")
    if {CLIP_START, CLIP_END} <= vocabulary.keys() and any(piece.endswith(CLIP_WORD_END) for piece in vocabulary):
        return clip_backend(vocabulary, merges)
    has_prefix = bool(settings.get("add_prefix_space", False))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    backend.decoder = decoders.ByteLevel()
    special = special_token_texts(settings)
    if any(settings.get(f"{role}_token") is None for role in ("bos", "eos", "unk")):  # transformers' default
        special += ["<|endoftext|>"]
    known = [text for text in special if text in vocabulary]
    known = known or [text for text in BYTE_LEVEL_SPECIAL_TOKENS if text in vocabulary]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known])
    return backend


def _find_merges(vocabulary_file: Path) -> Path:
    for name in MERGES_FILES:
        if (file := vocabulary_file.parent / name).is_file():
            check_downloaded(file)
            return file
    raise UserError(f"{vocabulary_file} needs its merges: put merges.txt beside it")


def _load_bert(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece, uncased by default, with the token `[DEC]` that LAVIS adds (id 30522 for bert-base-uncased)."""
    pieces = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if missing := [piece for piece in special if piece not in vocabulary]:
        raise UserError(f"it lacks the special tokens {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([*special, LAVIS_DECODE_TOKEN])
    return backend


# SentencePiece's protobuf


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """The contents of a SentencePiece file. Raises UserError where it is truncated."""
    pieces, trainer, normalizer = [], {}, {}
    for field, value in _protobuf_fields(data):
        if field == 1:
            row = dict(_protobuf_fields(value))
            score = struct.unpack("<f", row[2])[0] if 2 in row else 0.0
            pieces.append((row[1].decode("utf-8"), score, row.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_protobuf_fields(value))
        elif field == 3:
            normalizer = dict(_protobuf_fields(value))
    return SentencePieceModel(
        tuple(pieces),
        normalizer.get(2, b""),
        trainer.get(3) == SENTENCEPIECE_BPE,
        bool(normalizer.get(3, True)),
        bool(normalizer.get(4, True)),
    )


def parse_sentencepiece_model(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """((piece, score) list, precompiled normalizer table) of a SentencePiece file."""
    model = parse_sentencepiece(data)
    return [(piece, score) for piece, score, _ in model.pieces], model.charsmap


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value) of a protobuf message: an int for a varint, else the raw bytes."""
    offset = 0
    while offset < len(data):
        key, offset = _read_varint(data, offset)
        wire_type = key & 7
        if wire_type == 0:
            value, offset = _read_varint(data, offset)
            yield key >> 3, value
            continue
        length, offset = _read_varint(data, offset) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], offset)
        if offset + length > len(data):
            raise UserError("the file is truncated")
        yield key >> 3, data[offset : offset + length]
        offset += length


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """(value, offset of the next byte) of a protobuf varint."""
    value = shift = 0
    while True:
        value |= (data[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
        if data[offset - 1] < 128:
            return value, offset
