# SPDX-License-Identifier: Apache-2.0
"""The parts of a model by kind: its language model and its vision tower, where they lie among the parameters.

A model is a `VLM` or one part alone, such as a `T5Config` or a `ViTConfig`, as conversion handles them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lionjax.core.types import VLM, UserError
from lionjax.models.language.bert import BertConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.swin import SwinConfig
from lionjax.models.vision.vit import ViTConfig

LANGUAGE = (T5Config, DecoderConfig, BertConfig)


def can_generate(model: Any) -> bool:
    """Whether this is a whole model that answers, and not a part of one."""
    return isinstance(model, VLM) and model.info.generates


def part_of(model: Any, kinds: tuple[type, ...], field: str) -> tuple[str, Any] | None:
    """(prefix of its parameters, its config) of the model itself or of a field of it, if that is one of the kinds."""
    if isinstance(model, kinds):
        return "", model
    if field not in {f.name for f in dataclasses.fields(model)}:
        return None
    part = getattr(model, field)
    return (f"{field}/", part) if isinstance(part, kinds) else None


def replace_part(model: Any, prefix: str, part: Any) -> Any:
    """The model with another config for the part at `prefix`; the part itself where that is empty."""
    return dataclasses.replace(model, **{prefix.rstrip("/"): part}) if prefix else part


def language_of(model: Any) -> tuple[str, Any]:
    """(prefix, config) of the language model. Raises UserError where there is none."""
    found = part_of(model, LANGUAGE, "language")
    if found is None:
        raise UserError(f"a {type(model).__name__} has no vocabulary to which words could be added")
    return found


def token_tables(language: Any) -> dict[str, int]:
    """{path: axis of the vocabulary} of the parameters with one row per token."""
    if isinstance(language, BertConfig):
        return {"words/table": 0}
    tied = isinstance(language, DecoderConfig) and language.tie_embeddings
    return {"embedding/table": 0} | ({} if tied else {"head/kernel": 1})


def table_rows(language: Any) -> int:
    """Rows of those tables, with the ones that pad them for a mesh."""
    return language.padded_vocab_size if isinstance(language, T5Config | DecoderConfig) else language.vocab


def vit_of(model: Any) -> tuple[str, ViTConfig]:
    """(prefix, config) of the ViT. Raises UserError where there is none."""
    found = part_of(model, (ViTConfig,), "vision")
    if found is None:
        raise UserError(f"a {type(model).__name__} has no ViT whose positions could be resampled")
    return found


def swin_of(model: Any) -> tuple[str, SwinConfig] | None:
    """(prefix, config) of the Swin, or None."""
    return part_of(model, (SwinConfig,), "swin")
