# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to ids and back, with the `tokenizers` library (no torch, no transformers).

`load("tiny")` is the byte-pair tokenizer shipped with the package. `load(folder)` reads a `tokenizer.json`, T5's
`spiece.model` or BERT's `vocab.txt` from a local folder.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lionjax.core.types import UserError

TINY_TOKENIZER_FILE = Path(__file__).parent / "assets" / "tokenizer.json"
TINY_VOCAB_SIZE = 1024
SOFT_PROMPT_TOKEN = "<extra_id_0>"
# The tiny tokenizer has its special tokens first, in this order (T5 has its sentinels last), so their ids are fixed.
SPECIAL_TOKENS = (
    *("<pad>", "</s>", "<unk>"),
    *(f"<extra_id_{i}>" for i in range(16)),
    *("<at>", "<boxes>", "<im_patch>", "<im_start>", "<im_end>"),
)
FILE_NAMES = ("tokenizer.json", "spiece.model", "vocab.txt")
SpecialTokens = tuple[str, str, str, str | None]  # padding, end, unknown and start token
T5_SPECIAL_TOKENS: SpecialTokens = ("<pad>", "</s>", "<unk>", None)
# LLaMA with a padding token, T5, BERT, LLaMA as published, SmolLM2.
KNOWN_SPECIAL_TOKENS: tuple[SpecialTokens, ...] = (
    ("<pad>", "</s>", "<unk>", "<s>"),
    T5_SPECIAL_TOKENS,
    ("[PAD]", "[SEP]", "[UNK]", "[CLS]"),
    ("<unk>", "</s>", "<unk>", "<s>"),
    ("<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
)
SPIECE_UNDERLINE = "\u2581"  # SentencePiece's symbol for a space


class Tokenizer:
    """Text to ids and back, with the ids of the special tokens. Raises UserError if a special token is missing."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: SpecialTokens, keep_leading_space: bool = False):
        self.backend, self.keep_leading_space = backend, keep_leading_space
        self.pad_id, self.eos_id, self.unk_id = (self.token_to_id(piece) for piece in special_tokens[:3])
        self.bos_ids = [self.token_to_id(special_tokens[3])] if special_tokens[3] else []
        self.vocab_size = backend.get_vocab_size()
        # Special tokens in user text must be encoded as plain text.
        self._text_only_backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._text_only_backend.encode_special_tokens = True

    def token_to_id(self, token: str) -> int:
        """The id of one token, spelled as in the vocabulary. Raises UserError if the vocabulary lacks it."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no token {token!r}; use a tokenizer that has it")
        return token_id

    @property
    def soft_prompt_id(self) -> int | None:
        """The id of `<extra_id_0>`, whose embedding LION learns (soft prompt); None if the vocabulary lacks it."""
        return self.backend.token_to_id(SOFT_PROMPT_TOKEN)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text. Special tokens such as `</s>` are encoded as plain text unless `parse_special`."""
        # The backend prepends a space only if the text has none, so a leading space of the text needs a second one.
        text = f" {text}" if self.keep_leading_space and text.startswith(" ") else text
        backend = self.backend if parse_special else self._text_only_backend
        return backend.encode(text, add_special_tokens=False).ids

    def truncate_and_add_special(
        self, ids: list[int], max_length: int, keep: Literal["front", "back"] = "front"
    ) -> list[int]:
        """At most `max_length` ids, with start token (BERT's `[CLS]`, LLaMA's `<s>`; T5 has none) and end token."""
        room = max(max_length - len(self.bos_ids) - 1, 0)
        kept_ids = ids[:room] if keep == "front" else ids[max(len(ids) - room, 0) :]
        return [*self.bos_ids, *kept_ids, self.eos_id]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text up to the first end token, without special tokens; all of it with them if `keep_special`."""
        text_ids = []
        for token_id in ids:
            if int(token_id) == self.eos_id and not keep_special:
                break
            text_ids.append(int(token_id))
        return self.backend.decode(text_ids, skip_special_tokens=not keep_special)


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer `"tiny"`, or one of a local file or folder (tokenizer.json, spiece.model, vocab.txt).

    A folder of converted weights works too: its subfolder `origin` holds the tokenizer files. Raises UserError for a
    missing or unreadable file, and for a tokenizer with unknown special tokens.
    """
    if name == "tiny":
        return Tokenizer(
            tokenizers.Tokenizer.from_file(str(TINY_TOKENIZER_FILE)), T5_SPECIAL_TOKENS, keep_leading_space=True
        )
    path = tokenizer_file(name)
    try:
        if path.suffix == ".json":
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            backend = _load_bert(path) if path.suffix == ".txt" else _load_t5(path)
    except Exception as error:  # the library raises bare Exception for files it cannot read
        raise UserError(
            f"{path} cannot be read as a tokenizer ({error}); give one of {', '.join(FILE_NAMES)}"
        ) from error
    for special_tokens in KNOWN_SPECIAL_TOKENS:
        if all(backend.token_to_id(piece) is not None for piece in special_tokens if piece):
            return Tokenizer(backend, special_tokens)
    raise UserError(
        f"{path} has neither T5's <pad> </s> <unk>, nor LLaMA's <s> </s> <unk>, nor BERT's [PAD] [SEP] [UNK] [CLS], "
        "nor SmolLM2's <|im_start|> <|im_end|> <|endoftext|>; give a tokenizer with one of these sets"
    )


def tokenizer_file(name: str) -> Path:
    """The tokenizer file of a name that `load` accepts. Raises UserError if there is none."""
    return TINY_TOKENIZER_FILE if name == "tiny" else _find_tokenizer_file(Path(name))


def _find_tokenizer_file(path: Path) -> Path:
    # `lionjax convert` stores the tokenizer files of converted weights in the subfolder `origin`.
    candidates = [path / folder / name for folder in ("", "origin") for name in FILE_NAMES]
    for file in (path, *candidates):
        if file.is_file():
            return file
    expected = f"a folder with {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]}"
    raise UserError(f"there is no tokenizer at {str(path)!r}; give 'tiny' or {expected}")


def _load_bert(path: Path) -> tokenizers.Tokenizer:
    """BERT uncased with the token `[DEC]` that LAVIS adds (id 30522 for bert-base-uncased)."""
    pieces = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if missing := [piece for piece in special if piece not in vocabulary]:
        raise UserError(f"it lacks the special tokens {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([*special, "[DEC]"])
    return backend


def _load_t5(path: Path) -> tokenizers.Tokenizer:
    """T5's SentencePiece model with its 100 sentinels `<extra_id_i>`, whose ids count down from the last one."""
    pieces, charsmap = parse_sentencepiece_model(path.read_bytes())
    # Some copies of the file contain <s> or the sentinels, which would shift all ids.
    skip = {"<pad>", "</s>", "<unk>", "<s>"}
    text_pieces = [p for p in pieces if p[0] not in skip and not p[0].startswith("<extra_id_")][:31997]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = head + text_pieces + [(piece, 0.0) for piece in sentinels]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    return backend


def parse_sentencepiece_model(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """((piece, score) list, precompiled normalizer table) of a SentencePiece model, parsed from its protobuf."""
    pieces, charsmap = [], b""
    for field, value in _protobuf_fields(data):
        if field == 1:
            row = dict(_protobuf_fields(value))
            score = struct.unpack("<f", row[2])[0] if 2 in row else 0.0
            pieces.append((row[1].decode("utf-8"), score))
        elif field == 3:
            charsmap = dict(_protobuf_fields(value)).get(2, b"")
    return pieces, charsmap


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (field number, raw value) of a protobuf message; varint values are returned as empty bytes."""
    offset = 0
    while offset < len(data):
        key, offset = _read_varint(data, offset)
        wire_type = key & 7
        if wire_type == 0:
            _, offset = _read_varint(data, offset)
            yield key >> 3, b""
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
