# SPDX-License-Identifier: Apache-2.0
"""Words to numbers and back: one small class over three kinds of tokenizer.

`load("tiny")` is the byte-pair tokenizer shipped with the package, which `train` makes. `load(folder)` reads T5's
(spiece.model) or BERT's (vocab.txt) from a local folder, or whatever a `tokenizer.json` there describes. Neither
torch nor transformers is needed.
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
# T5 puts its sentinels last; the tiny one puts everything special first, in this order, so that ids are easy to know.
SPECIAL_TOKENS = (
    *("<pad>", "</s>", "<unk>"),
    *(f"<extra_id_{i}>" for i in range(16)),
    *("<at>", "<boxes>", "<im_patch>", "<im_start>", "<im_end>"),
)
FILE_NAMES = ("tokenizer.json", "spiece.model", "vocab.txt")
SpecialTokens = tuple[str, str, str, str | None]  # what pads, ends, is unknown, and starts
T5_SPECIAL_TOKENS: SpecialTokens = ("<pad>", "</s>", "<unk>", None)
# LLaMA's with a piece that pads, T5's, BERT's, LLaMA's as it was published, and SmolLM2's.
KNOWN_SPECIAL_TOKENS: tuple[SpecialTokens, ...] = (
    ("<pad>", "</s>", "<unk>", "<s>"),
    T5_SPECIAL_TOKENS,
    ("[PAD]", "[SEP]", "[UNK]", "[CLS]"),
    ("<unk>", "</s>", "<unk>", "<s>"),
    ("<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
)
SPIECE_UNDERLINE = "\u2581"  # what SentencePiece writes for a space


class Tokenizer:
    """Text to ids and back, with the few ids that a model must know."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: SpecialTokens, keep_leading_space: bool = False):
        self.backend, self.keep_leading_space = backend, keep_leading_space
        self.pad_id, self.eos_id, self.unk_id = (self.token_to_id(piece) for piece in special_tokens[:3])
        self.bos_ids = [self.token_to_id(special_tokens[3])] if special_tokens[3] else []
        self.vocab_size = backend.get_vocab_size()
        # What users write is only ever text, even where it spells a special piece.
        self._text_only_backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._text_only_backend.encode_special_tokens = True

    def token_to_id(self, token: str) -> int:
        """The id of one piece, spelled as in the vocabulary."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no piece {token!r}; use one that has it")
        return number

    @property
    def soft_prompt_id(self) -> int | None:
        """The id of `<extra_id_0>`, for which LION puts a learned vector; None where there is none."""
        return self.backend.token_to_id(SOFT_PROMPT_TOKEN)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text. Special pieces such as `</s>` are read as such only when asked for."""
        # The first word gets the space that other words have; a text that brings its own keeps both.
        text = f" {text}" if self.keep_leading_space and text.startswith(" ") else text
        backend = self.backend if parse_special else self._text_only_backend
        return backend.encode(text, add_special_tokens=False).ids

    def truncate_and_add_special(
        self, ids: list[int], max_length: int, keep: Literal["front", "back"] = "front"
    ) -> list[int]:
        """At most `length` ids between the start (BERT's `[CLS]`, LLaMA's `<s>`, T5 has none) and the end piece."""
        room = max(max_length - len(self.bos_ids) - 1, 0)
        kept = ids[:room] if keep == "front" else ids[max(len(ids) - room, 0) :]
        return [*self.bos_ids, *kept, self.eos_id]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text up to the first end token; special pieces are left out unless asked for."""
        kept = []
        for number in ids:
            if int(number) == self.eos_id and not keep_special:
                break
            kept.append(int(number))
        return self.backend.decode(kept, skip_special_tokens=not keep_special)


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer `"tiny"`, or that of a local file or folder (tokenizer.json, spiece.model, vocab.txt).

    A folder of converted weights is one: what came with them is kept there.
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
        raise UserError(f"{path} is not a tokenizer that can be read ({error})") from error
    for names in KNOWN_SPECIAL_TOKENS:
        if all(backend.token_to_id(piece) is not None for piece in names if piece):
            return Tokenizer(backend, names)
    raise UserError(
        f"{path} has neither T5's <pad> </s> <unk>, nor LLaMA's <s> </s> <unk>, nor BERT's [PAD] [SEP] [UNK] [CLS], "
        "nor SmolLM2's <|im_start|> <|im_end|> <|endoftext|>"
    )


def tokenizer_file(name: str) -> Path:
    """The file behind a name that `load` takes; UserError when there is none."""
    return TINY_TOKENIZER_FILE if name == "tiny" else _find_tokenizer_file(Path(name))


def _find_tokenizer_file(path: Path) -> Path:
    # What came with converted weights lies in the folder `origin` beside them.
    inside = [path / folder / name for folder in ("", "origin") for name in FILE_NAMES]
    for file in (path, *inside):
        if file.is_file():
            return file
    wanted = f"a folder with {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]}"
    raise UserError(f"there is no tokenizer at {str(path)!r}; give 'tiny' or {wanted}")


def _load_bert(path: Path) -> tokenizers.Tokenizer:
    """BERT uncased, with the piece `[DEC]` that LAVIS adds (id 30522 in the real one)."""
    words = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {word: i for i, word in enumerate(words)}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if missing := [piece for piece in special if piece not in vocabulary]:
        raise UserError(f"it lacks {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([*special, "[DEC]"])
    return backend


def _load_t5(path: Path) -> tokenizers.Tokenizer:
    """T5's SentencePiece file, with the hundred sentinels counted down from the last id as T5 has them."""
    pieces, charsmap = parse_sentencepiece_model(path.read_bytes())
    # Some copies of the file carry a row for <s> or the sentinels themselves, which would shift every id.
    skip = {"<pad>", "</s>", "<unk>", "<s>"}
    words = [p for p in pieces if p[0] not in skip and not p[0].startswith("<extra_id_")][:31997]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = head + words + [(piece, 0.0) for piece in sentinels]
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
    """The (piece, score) rows and the normaliser's table of a SentencePiece model, read straight from its protobuf."""
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
    """Field numbers and raw values of one protobuf message; numbers of varying length come back empty."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _read_varint(data, at)
            yield key >> 3, b""
            continue
        length, at = _read_varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(data):
            raise UserError("it ends in the middle of a piece")
        yield key >> 3, data[at : at + length]
        at += length


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
        if data[offset - 1] < 128:
            return value, offset
