# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to ids and back, with the `tokenizers` library (no torch, no transformers).

`load("tiny")` is the byte-pair tokenizer shipped with the package, `load("tiny_wordpiece")` one like BERT's, for
detectors and MQ-Formers. `load(folder)` reads the tokenizer of a local folder, in one of the kinds of files that
`tokenizer_files.py` lists, such as `tokenizer.json` or `tokenizer.model`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tokenizers

from lionjax.core.types import UserError
from lionjax.data.tokenizer_files import FILE_NAMES, load_backend, published_files
from lionjax.data.tokenizer_files import parse_sentencepiece_model as parse_sentencepiece_model

TINY_TOKENIZER_FILE = Path(__file__).parent / "assets" / "tokenizer.json"
TINY_VOCAB_SIZE = 1024
TINY_WORDPIECE_FILE = Path(__file__).parent / "assets" / "tiny_wordpiece" / "vocab.txt"
SHIPPED_FILES = {"tiny": TINY_TOKENIZER_FILE, "tiny_wordpiece": TINY_WORDPIECE_FILE}
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
    """Text to ids and back, with the ids of the special tokens. Raises UserError if a special token is missing.

    `bos_ids` begin a text, by default the start token. `added_tokens`: {id: text} of the tokens beside the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: SpecialTokens,
        keep_leading_space: bool = False,
        bos_ids: Sequence[int] | None = None,
    ):
        self.backend, self.keep_leading_space = backend, keep_leading_space
        self.pad_id, self.eos_id, self.unk_id = (self.token_to_id(piece) for piece in special_tokens[:3])
        self.bos_ids = [self.token_to_id(special_tokens[3])] if special_tokens[3] else []
        self.bos_ids = self.bos_ids if bos_ids is None else list(bos_ids)
        self.vocab_size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token_id: token.content for token_id, token in added.items()}
        special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
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

    def encode_with_offsets(self, text: str, parse_special: bool = False) -> tuple[list[int], list[int]]:
        """(ids, position in the text at which each token begins); `parse_special` as in `encode`."""
        shift = int(self.keep_leading_space and text.startswith(" "))
        backend = self.backend if parse_special else self._text_only_backend
        encoding = backend.encode(" " * shift + text, add_special_tokens=False)
        return encoding.ids, [max(start - shift, 0) for start, _ in encoding.offsets]

    def spells_special_token(self, text: str) -> bool:
        """Whether a text contains a special token, written out."""
        return self._special_pattern.search(text) is not None

    def split_special_tokens(self, text: str) -> list[str | int]:
        """The text cut at special tokens, which are given as ids; no empty texts."""
        parts: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            parts += [text[end : match.start()], self.token_to_id(match[0])]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

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
def load(name: str, from_files: bool = False) -> Tokenizer:
    """A shipped tokenizer (`"tiny"`, `"tiny_wordpiece"`), or that of a local file or folder (see `tokenizer_files`).

    A folder of converted weights works too: its subfolder `origin` holds the tokenizer files. Start, end and padding
    token are those of a known set, by their spelling; with `from_files`, or where no set is known, those that the
    settings files beside the tokenizer name (see `special_tokens_from_files`). Raises UserError for a missing or
    unreadable file, and for a tokenizer whose end token is not known.
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
    known = (known for known in KNOWN_SPECIAL_TOKENS if all(backend.token_to_id(t) is not None for t in known if t))
    known_tokens = next(known, None)
    if known_tokens is None or (from_files and path.suffix != ".txt"):
        special_tokens, bos_ids = special_tokens_from_files(path, backend, known_tokens)
        return Tokenizer(backend, special_tokens, bos_ids=bos_ids)
    return Tokenizer(backend, known_tokens)


def tokenizer_file(name: str) -> Path:
    """The tokenizer file of a name that `load` accepts. Raises UserError if there is none."""
    return SHIPPED_FILES.get(name) or _find_tokenizer_file(Path(name))


def tokenizer_files(name: str) -> dict[str, Path]:
    """{name that transformers looks for: file} of a tokenizer that `load` accepts, with its settings files."""
    return {"tokenizer.json": TINY_TOKENIZER_FILE} if name == "tiny" else published_files(tokenizer_file(name))


def describe_difference(old: Tokenizer, new: Tokenizer) -> str | None:
    """A clause on the first difference by which two tokenizers give other ids, None where they give the same."""
    before, after = (one.backend.get_vocab(with_added_tokens=True) for one in (old, new))
    if before != after:
        token = min(token for token in before.keys() | after.keys() if before.get(token) != after.get(token))
        ids = ("none" if ids.get(token) is None else ids[token] for ids in (before, after))
        return "its token {!r} has the id {} in the run's tokenizer and {} in this one".format(token, *ids)
    for role in ("pad_id", "eos_id", "unk_id", "bos_ids"):
        if getattr(old, role) != getattr(new, role):
            return f"its {role} is {getattr(old, role)} in the run's tokenizer and {getattr(new, role)} in this one"
    if old.keep_leading_space != new.keep_leading_space or _encoding_rules(old) != _encoding_rules(new):
        return "it has the vocabulary of the run's tokenizer, but other rules to split a text"
    return None


def _encoding_rules(tokens: Tokenizer) -> dict:
    """What a tokenizer's file says about encoding a text; the rest of it we do not use."""
    content = json.loads(tokens.backend.to_str())
    return {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def special_tokens_from_files(
    path: Path, backend: tokenizers.Tokenizer, known_tokens: SpecialTokens | None
) -> tuple[SpecialTokens, Sequence[int]]:
    """(special tokens, ids that begin a text) of a tokenizer, as its own settings files say.

    Start: what the post-processor of tokenizer.json puts before a text, else `bos_token` of tokenizer_config.json if
    its `add_bos_token` is set. End: `eos_token` of tokenizer_config.json or special_tokens_map.json, else what the
    post-processor appends, else `eos_token_id` of generation_config.json or config.json, else that of `known_tokens`.
    Padding likewise, by default the end token. Raises UserError where no file names an end token.
    """
    files = (_read_json(path.parent / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    names = {key: value for settings in files for key, value in settings.items() if value is not None}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    ids = {}
    for settings in (_read_json(path.parent / "config.json"), _read_json(path.parent / "generation_config.json")):
        for part in (settings.get("text_config") or {}, settings):
            ids |= {key: value for key, value in part.items() if key.endswith("_token_id") and value is not None}

    def named(role: str) -> str | None:
        """The token of a role in the files, None where they name none or one that the vocabulary lacks."""
        token_id = ids.get(f"{role}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        by_id = backend.id_to_token(token_id) if isinstance(token_id, int) and token_id >= 0 else None
        token = tokens.get(f"{role}_token")
        return token if isinstance(token, str) and backend.token_to_id(token) is not None else by_id

    before, after = _added_by_post_processor(backend)
    eos = named("eos") if "eos_token" in tokens or not after else backend.id_to_token(after[-1])
    eos = eos or (known_tokens[1] if known_tokens else None)
    if eos is None:
        raise UserError(
            f"no file beside {path} names an end token, and it has none of a known kind; add a tokenizer_config.json "
            "with eos_token"
        )
    # A file alone does not say how a text begins, nor does LLaMA's tokenizer.model: with the start token of its kind.
    is_silent = backend.post_processor is None and (not tokens or path.suffix == ".model")
    start = known_tokens[3] if known_tokens and is_silent and tokens.get("add_bos_token") is not False else None
    bos = named("bos") or start
    if not before and bos and (tokens.get("add_bos_token") is True or start):
        before = [backend.token_to_id(bos)]
    pad, unk = named("pad") or eos, named("unk") or (known_tokens[2] if known_tokens else eos)
    return (pad, eos, unk, None), before


def _added_by_post_processor(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """(ids before a text, ids behind it) that the tokenizer's post-processor adds."""
    text, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (k for k in range(len(whole) - len(text) + 1) if whole[k : k + len(text)] == text)
    start = next(starts, 0)
    return whole[:start], whole[start + len(text) :]


def _read_json(file: Path) -> dict:
    """The object in a JSON file, {} where there is no such file. Raises UserError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _find_tokenizer_file(path: Path) -> Path:
    # `lionjax convert` stores the tokenizer files of converted weights in the subfolder `origin`.
    candidates = [path / folder / name for folder in ("", "origin") for name in FILE_NAMES]
    for file in (path, *candidates):
        if file.is_file():
            return file
    expected = f"a folder with {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]}"
    raise UserError(f"there is no tokenizer at {str(path)!r}; give 'tiny' or {expected}")
