# SPDX-License-Identifier: Apache-2.0
"""Checks of a tokenizer's ids and of the image token against a model's word table (token embeddings).

An id without a row has no embedding, so it would give NaN logits; an image token that is also a word would put an image
in the place of that word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.convert.processor_files import open_tokenizer
from lionjax.core.types import UserError

IMAGE_TOKEN = "<image>"  # where neither tokenizer_config.json nor processor_config.json names another
NOT_IMAGES = ("<s>", "</s>", "<unk>", "<pad>", "[PAD]", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer by token. `special`: those that text never gives, such as `<s>` and `<image>`."""

    ids: Mapping[str, int]
    special: frozenset[int]
    source: str  # where it comes from, for errors
    image_token: str = IMAGE_TOKEN


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in a checkpoint's folder; None where it has no file that lists its ids."""
    ids: dict[str, int] = {}
    special: set[int] = set()
    if (file := folder / "tokenizer.json").is_file():
        backend = open_tokenizer(file)
        ids |= backend.get_vocab(with_added_tokens=True)
        special |= set(backend.get_added_tokens_decoder())
    elif (file := folder / "vocab.txt").is_file():
        ids |= {word: number for number, word in enumerate(file.read_text(encoding="utf-8").splitlines())}
    added = read_hf_config(folder / "added_tokens.json")
    ids |= {token: number for token, number in added.items() if isinstance(number, int)}
    special |= {number for number in added.values() if isinstance(number, int)}
    if not ids:
        return None
    return Vocabulary(ids, frozenset(special), f"the tokenizer in {folder}", image_token_name([folder]))


def image_token_name(folders: Iterable[Path]) -> str:
    """How the tokenizer of a folder spells the image token."""
    for folder in folders:
        for name in ("processor_config.json", "tokenizer_config.json"):
            token = read_hf_config(folder / name).get("image_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                return token
    return IMAGE_TOKEN


def check_token_ids(model_config: Any, vocabulary: Vocabulary | None, hf_config: Mapping[str, Any]) -> None:
    """Raise UserError where a token id or the image token id of a model does not fit its word table.

    The image token is checked for Hugging Face's classes (`hf_config` has a text_config). In the original LLaVA and in
    models trained here it may be a placeholder outside the table, or any token of the trained tokenizer.
    """
    from lionjax.models import parts

    part = parts.part_of(model_config, parts.LANGUAGE, "language")
    if part is None:
        return
    num_rows = part[1].vocab_size
    if vocabulary is not None:
        check_vocabulary(vocabulary, num_rows)
    if "text_config" in hf_config and parts.can_generate(model_config) and model_config.info.splices_images:
        check_image_token(model_config.info.image_token, vocabulary, num_rows)


def check_vocabulary(vocabulary: Vocabulary, num_rows: int, table: str = "word table") -> None:
    """Raise UserError where a token's id has no row in a table of `num_rows` rows."""
    token, number = max(vocabulary.ids.items(), key=lambda item: item[1])
    if number >= num_rows:
        raise UserError(
            f"{vocabulary.source} has the token {token!r} with id {number}, but the model's {table} has {num_rows} "
            f"rows (ids 0 to {num_rows - 1}); use the tokenizer that belongs to these weights"
        )


def check_image_token(image_token: int | None, vocabulary: Vocabulary | None, num_rows: int) -> None:
    """Raise UserError for an image token id without a row, or with the id of a word or of another special token.

    Ids below 0 are placeholders that no text has, such as the original LLaVA's -200.
    """
    if image_token is None or image_token < 0:
        return
    name = "image_token_index (the id of the image token)"
    if image_token >= num_rows:
        raise UserError(
            f"{name} is {image_token}, but the model's word table has {num_rows} rows (ids 0 to {num_rows - 1}); "
            "correct it in config.json"
        )
    if vocabulary is None:
        return
    own_id = vocabulary.ids.get(vocabulary.image_token)
    if own_id is not None and own_id != image_token:
        raise UserError(
            f"{name} is {image_token}, but {vocabulary.source} gives {vocabulary.image_token!r} the id {own_id}; "
            "give both the same id"
        )
    word = next((token for token, number in vocabulary.ids.items() if number == image_token), None)
    if word is not None and own_id is None and (image_token not in vocabulary.special or word in NOT_IMAGES):
        raise UserError(
            f"{name} is {image_token}, which {vocabulary.source} uses for {word!r}; give the id of a token that no "
            "text contains"
        )


def check_used_ids(ids: Mapping[str, Any], num_rows: int) -> None:
    """Raise UserError where an id of `ids` ({what it is: id, several ids or None}) has no row in the word table.

    -1 stands for "none", as in `GenerationConfig.eos_token_id`.
    """
    for name, value in ids.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if number is not None and not -1 <= number < num_rows:
                raise UserError(
                    f"{name} is {number}, but the model's word table has {num_rows} rows (ids 0 to {num_rows - 1}); "
                    "correct config.json or generation_config.json"
                )
