# SPDX-License-Identifier: Apache-2.0
"""Interface of the language model inside a VLM, implemented by the encoder-decoder (T5) and the causal decoder.

A VLM embeds its inputs and calls `forward` in training, `prefill` and `extend` in generation, with either of the two.
"""

from __future__ import annotations

from typing import Any, Protocol

from lionjax.core.types import Array, Cache
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config


class LanguageBackend(Protocol):
    """Maps embeddings (B, L, D) to hidden states. Masks are 1 on real tokens."""

    def embed(self, ids_BL: Array, dtype: Any = ...) -> Array:
        """Token embeddings (B, L, D)."""

    def embed_next(self, token_B: Array, cache: Cache) -> Array:
        """Embeddings (B, D) of the tokens just generated, in the dtype of the cache."""

    def forward(
        self, x_BLD: Array, mask_BL: Array, target_BMD: Array, target_mask_BM: Array, task_B: Array, keys=(None, None)
    ) -> tuple[Array, Array | None]:
        """States (B, M, D) that predict each target token, and states (B, M, D) after it, None if not computed.

        `keys` drive dropout in the encoder (or the decoder-only model) and in the decoder of an encoder-decoder."""

    def prefill(self, x_BLD: Array, mask_BL: Array, cache_length: int, task_B: Array) -> tuple[Array, Cache]:
        """The state (B, D) that predicts the first token, and a cache of the input with `cache_length` free slots."""

    def extend(self, x_BD: Array, cache: Cache) -> tuple[Array, Cache]:
        """The state (B, D) that predicts the token after the input `x_BD`, and the cache with that input."""

    def logits(self, state_BMD: Array) -> Array:
        """Logits (..., V) in float32 of states (..., D)."""


def is_encoder_decoder(c: T5Config | DecoderConfig) -> bool:
    """Whether the language model is an encoder-decoder (T5)."""
    return isinstance(c, T5Config)


def language_model(c: T5Config | DecoderConfig) -> T5 | Decoder:
    """The flax module of a language model config."""
    return T5(c) if isinstance(c, T5Config) else Decoder(c)
