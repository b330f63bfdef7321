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

TINY = Path(__file__).parent / "assets" / "tokenizer.json"
TINY_SIZE = 1024
SOFT_PROMPT = "<extra_id_0>"
# T5 puts its sentinels last; the tiny one puts everything special first, in this order, so that ids are easy to know.
SPECIAL = (
    *("<pad>", "</s>", "<unk>"),
    *(f"<extra_id_{i}>" for i in range(16)),
    *("<at>", "<boxes>", "<im_patch>", "<im_start>", "<im_end>"),
)
FILES = ("tokenizer.json", "spiece.model", "vocab.txt")
Names = tuple[str, str, str, str | None]  # what pads, ends, is unknown, and starts
T5_NAMES: Names = ("<pad>", "</s>", "<unk>", None)
# LLaMA's with a piece that pads, T5's, BERT's, LLaMA's as it was published, and SmolLM2's.
NAMES: tuple[Names, ...] = (
    ("<pad>", "</s>", "<unk>", "<s>"),
    T5_NAMES,
    ("[PAD]", "[SEP]", "[UNK]", "[CLS]"),
    ("<unk>", "</s>", "<unk>", "<s>"),
    ("<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
)
SPACE = "\u2581"  # what SentencePiece writes for a space


class Tokenizer:
    """Text to ids and back, with the few ids that a model must know."""

    def __init__(self, backend: tokenizers.Tokenizer, names: Names, exact: bool = False):
        self.backend, self.exact = backend, exact
        self.pad_id, self.end_id, self.unknown_id = (self.id(piece) for piece in names[:3])
        self.start = [self.id(names[3])] if names[3] else []
        self.size = backend.get_vocab_size()
        # What users write is only ever text, even where it spells a special piece.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True

    def id(self, piece: str) -> int:
        """The id of one piece, spelled as in the vocabulary."""
        number = self.backend.token_to_id(piece)
        if number is None:
            raise UserError(f"the tokenizer has no piece {piece!r}; use one that has it")
        return number

    @property
    def soft_prompt_id(self) -> int | None:
        """The id of `<extra_id_0>`, for which LION puts a learned vector; None where there is none."""
        return self.backend.token_to_id(SOFT_PROMPT)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. Special pieces such as `</s>` are read as such only when asked for."""
        # The first word gets the space that other words have; a text that brings its own keeps both.
        text = f" {text}" if self.exact and text.startswith(" ") else text
        backend = self.backend if special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def frame(self, ids: list[int], length: int, keep: Literal["front", "back"] = "front") -> list[int]:
        """At most `length` ids between the start (BERT's `[CLS]`, LLaMA's `<s>`, T5 has none) and the end piece."""
        room = max(length - len(self.start) - 1, 0)
        kept = ids[:room] if keep == "front" else ids[max(len(ids) - room, 0) :]
        return [*self.start, *kept, self.end_id]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text up to the first end token; special pieces are left out unless asked for."""
        kept = []
        for number in ids:
            if int(number) == self.end_id and not special:
                break
            kept.append(int(number))
        return self.backend.decode(kept, skip_special_tokens=not special)


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer `"tiny"`, or that of a local file or folder (tokenizer.json, spiece.model, vocab.txt).

    A folder of converted weights is one: what came with them is kept there.
    """
    if name == "tiny":
        return Tokenizer(tokenizers.Tokenizer.from_file(str(TINY)), T5_NAMES, exact=True)
    path = file_of(name)
    try:
        if path.suffix == ".json":
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            backend = _bert(path) if path.suffix == ".txt" else _t5(path)
    except Exception as error:  # the library raises bare Exception for files it cannot read
        raise UserError(f"{path} is not a tokenizer that can be read ({error})") from error
    for names in NAMES:
        if all(backend.token_to_id(piece) is not None for piece in names if piece):
            return Tokenizer(backend, names)
    raise UserError(
        f"{path} has neither T5's <pad> </s> <unk>, nor LLaMA's <s> </s> <unk>, nor BERT's [PAD] [SEP] [UNK] [CLS], "
        "nor SmolLM2's <|im_start|> <|im_end|> <|endoftext|>"
    )


def file_of(name: str) -> Path:
    """The file behind a name that `load` takes; UserError when there is none."""
    return TINY if name == "tiny" else _find(Path(name))


def _find(path: Path) -> Path:
    # What came with converted weights lies in the folder `origin` beside them.
    inside = [path / folder / name for folder in ("", "origin") for name in FILES]
    for file in (path, *inside):
        if file.is_file():
            return file
    wanted = f"a folder with {', '.join(FILES[:-1])} or {FILES[-1]}"
    raise UserError(f"there is no tokenizer at {str(path)!r}; give 'tiny' or {wanted}")


def _bert(path: Path) -> tokenizers.Tokenizer:
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


def _t5(path: Path) -> tokenizers.Tokenizer:
    """T5's SentencePiece file, with the hundred sentinels counted down from the last id as T5 has them."""
    pieces, charsmap = read_sentencepiece(path.read_bytes())
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


def read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """The (piece, score) rows and the normaliser's table of a SentencePiece model, read straight from its protobuf."""
    pieces, charsmap = [], b""
    for field, value in _fields(data):
        if field == 1:
            row = dict(_fields(value))
            score = struct.unpack("<f", row[2])[0] if 2 in row else 0.0
            pieces.append((row[1].decode("utf-8"), score))
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and raw values of one protobuf message; numbers of varying length come back empty."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
            yield key >> 3, b""
            continue
        length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(data):
            raise UserError("it ends in the middle of a piece")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at
