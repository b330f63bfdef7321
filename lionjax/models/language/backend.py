# SPDX-License-Identifier: Apache-2.0
"""One interface for language models inside a VLM: the encoder-decoder (T5) and the causal decoder implement it.

A VLM embeds its inputs and calls `forward` in training, `prefill` and `extend` in generation; it never asks which of
the two it has.
"""

from __future__ import annotations

from typing import Any, Protocol

from lionjax.core.types import Array, Cache
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config


class LanguageBackend(Protocol):
    """Embeddings (B, L, D) in, hidden states out. Masks are 1 on real tokens."""

    def embed(self, ids_BL: Array, dtype: Any = ...) -> Array:
        """Token embeddings (B, L, D)."""

    def embed_next(self, token_B: Array, cache: Cache) -> Array:
        """Embeddings (B, D) of the tokens just generated, in the cache's dtype."""

    def forward(
        self, x_BLD: Array, mask_BL: Array, target_BMD: Array, target_mask_BM: Array, task_B: Array, keys=(None, None)
    ) -> tuple[Array, Array | None]:
        """States (B, M, D) that predict each target token, and the states that have read it (None where not kept).

        `keys` drive dropout in what reads the input and in what reads the target."""

    def prefill(self, x_BLD: Array, mask_BL: Array, cache_length: int, task_B: Array) -> tuple[Array, Cache]:
        """Read the input: the state (B, D) that predicts the first token, and a cache for `cache_length` more."""

    def extend(self, x_BD: Array, cache: Cache) -> tuple[Array, Cache]:
        """Read one more embedding per row: the state (B, D) that predicts the next token."""

    def logits(self, state_BMD: Array) -> Array:
        """(..., D) -> (..., V) in float32."""


def is_encoder_decoder(c: T5Config | DecoderConfig) -> bool:
    """Whether the prompt is read by an encoder and the answer by a decoder of its own."""
    return isinstance(c, T5Config)


def language_model(c: T5Config | DecoderConfig) -> T5 | Decoder:
    """The flax module of a language model's sizes."""
    return T5(c) if isinstance(c, T5Config) else Decoder(c)
