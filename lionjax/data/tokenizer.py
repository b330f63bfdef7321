# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to ids and back, with the `tokenizers` library (no torch, no transformers).

`load("tiny")` is the byte-pair tokenizer shipped with the package. `load(folder)` reads the tokenizer of a local
folder, in one of the kinds of files that `tokenizer_files.py` lists, such as `tokenizer.json` or `tokenizer.model`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import tokenizers

from lionjax.core.types import UserError
from lionjax.data.tokenizer_files import FILE_NAMES, load_backend, published_files
from lionjax.data.tokenizer_files import parse_sentencepiece_model as parse_sentencepiece_model

TINY_TOKENIZER_FILE = Path(__file__).parent / "assets" / "tokenizer.json"
TINY_VOCAB_SIZE = 1024
SOFT_PROMPT_TOKEN = "<extra_id_0>"
# The tiny tokenizer has its special tokens first, in this order (T5 has its sentinels last), so their ids are fixed.
SPECIAL_TOKENS = (
    *("<pad>", "</s>", "<unk>"),
    *(f"<extra_id_{i}>" for i in range(16)),
    *("<at>", "<boxes>", "<im_patch>", "<im_start>", "<im_end>"),
)
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
    """The tokenizer `"tiny"`, or one of a local file or folder (see `tokenizer_files`).

    A folder of converted weights works too: its subfolder `origin` holds the tokenizer files. Raises UserError for a
    missing or unreadable file, and for a tokenizer with unknown special tokens.
    """
    if name == "tiny":
        return Tokenizer(
            tokenizers.Tokenizer.from_file(str(TINY_TOKENIZER_FILE)), T5_SPECIAL_TOKENS, keep_leading_space=True
        )
    path = tokenizer_file(name)
    try:
        backend = load_backend(path)
    except UserError as error:
        if str(path.parent) in str(error):
            raise
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error
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


def tokenizer_files(name: str) -> dict[str, Path]:
    """{name that transformers looks for: file} of a tokenizer that `load` accepts, with its settings files."""
    return {"tokenizer.json": TINY_TOKENIZER_FILE} if name == "tiny" else published_files(tokenizer_file(name))


def _find_tokenizer_file(path: Path) -> Path:
    # `lionjax convert` stores the tokenizer files of converted weights in the subfolder `origin`.
    candidates = [path / folder / name for folder in ("", "origin") for name in FILE_NAMES]
    for file in (path, *candidates):
        if file.is_file():
            return file
    expected = f"a folder with {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]}"
    raise UserError(f"there is no tokenizer at {str(path)!r}; give 'tiny' or {expected}")
