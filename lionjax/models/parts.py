# SPDX-License-Identifier: Apache-2.0
"""Access to the submodels of a model: its language model and vision tower, with their parameter paths.

A model is a `VLM` or, in conversion, a config of a single submodel such as `T5Config` or `ViTConfig`.
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
from lionjax.models.vlm.text_lm import TextLM

LANGUAGE = (T5Config, DecoderConfig, BertConfig)


def can_generate(model: Any) -> bool:
    """Whether this is a `VLM` that generates text."""
    return isinstance(model, VLM) and model.info.generates


def as_answering(model: Any) -> Any:
    """The model, or a `TextLM` of a language model that can answer alone."""
    return TextLM(model) if isinstance(model, T5Config | DecoderConfig) else model


def part_of(model: Any, kinds: tuple[type, ...], field: str) -> tuple[str, Any] | None:
    """(parameter prefix, config) of the model or of its field `field`, whichever is one of `kinds`; else None."""
    if isinstance(model, kinds):
        return "", model
    if field not in {f.name for f in dataclasses.fields(model)}:
        return None
    part = getattr(model, field)
    prefix = "" if isinstance(model, TextLM) else f"{field}/"
    return (prefix, part) if isinstance(part, kinds) else None


def replace_part(model: Any, prefix: str, part: Any) -> Any:
    """The model with `part` as the config at `prefix`, or `part` itself for an empty prefix."""
    return dataclasses.replace(model, **{prefix.rstrip("/"): part}) if prefix else part


def language_of(model: Any) -> tuple[str, Any]:
    """(prefix, config) of the language model. Raises UserError if there is none."""
    part = part_of(model, LANGUAGE, "language")
    if part is None:
        raise UserError(f"a {type(model).__name__} has no vocabulary, so that no tokens can be added")
    return part


def token_tables(language: Any) -> dict[str, int]:
    """{path: axis of the vocabulary} of the parameters with one row or column for each token."""
    if isinstance(language, BertConfig):
        return {"words/table": 0}
    tied = isinstance(language, DecoderConfig) and language.tie_embeddings
    return {"embedding/table": 0} | ({} if tied else {"head/kernel": 1})


def table_rows(language: Any) -> int:
    """Size of the vocabulary axis of `token_tables`, with padding for a mesh."""
    return language.padded_vocab_size if isinstance(language, T5Config | DecoderConfig) else language.vocab_size


def vit_of(model: Any) -> tuple[str, ViTConfig]:
    """(prefix, config) of the ViT. Raises UserError if there is none."""
    part = part_of(model, (ViTConfig,), "vision")
    if part is None:
        raise UserError(f"a {type(model).__name__} has no ViT, so that no position table can be resampled")
    return part


def swin_of(model: Any) -> tuple[str, SwinConfig] | None:
    """(prefix, config) of the Swin transformer, or None."""
    return part_of(model, (SwinConfig,), "swin")


def image_size_of(model: Any) -> int | None:
    """Side in pixels of the images that the ViT or Swin reads; None for a model without one."""
    part = part_of(model, (ViTConfig,), "vision") or swin_of(model)
    return None if part is None else part[1].image_size
