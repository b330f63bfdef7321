# SPDX-License-Identifier: Apache-2.0
"""Interface of the language model inside a VLM, implemented by the encoder-decoder (T5) and the causal decoder.

A VLM embeds its inputs and calls `forward` in training, `prefill` and `extend` in generation, with either of the two.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.types import Array, Cache, Metrics, RowLayout
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config
from lionjax.nn import losses


class LanguageBackend(Protocol):
    """Maps embeddings (B, L, D) to hidden states. Masks are 1 on real tokens."""

    c: T5Config | DecoderConfig

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


def row_layout(language: T5Config | DecoderConfig, **fields: Any) -> RowLayout | None:
    """The layout of rows with several examples; None for a language model that has none.

    An encoder-decoder has two texts in place of a row, and adapters or cross-attention belong to a whole row.
    """
    if isinstance(language, T5Config) or language.adapters is not None or language.cross_attention is not None:
        return None
    max_positions = language.max_positions and language.max_positions - language.position_offset
    return RowLayout(max_positions=max_positions, **fields)


def token_loss(
    language: T5 | Decoder, state_BMD: Array, target_BM: Array, loss_mask_BM: Array
) -> tuple[Array, Metrics]:
    """`losses.token_cross_entropy` of states that predict the targets.

    With `loss_chunk` in the language model's config, the logits of so many positions exist at once: they are computed
    chunk by chunk, and again in the backward pass.
    """
    length, chunk = target_BM.shape[1], language.c.loss_chunk
    if not 0 < chunk < length:
        return losses.token_cross_entropy(language.logits(state_BMD), target_BM, loss_mask_BM)

    def chunks(array):
        padding = ((0, 0), (0, -length % chunk), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, padding)
        return array.reshape(len(array), -1, chunk, *array.shape[2:]).swapaxes(0, 1)

    def add_chunk(module: T5 | Decoder, sums, inputs):
        state_BCD, target_BC, mask_BC = inputs
        new = losses.token_sums(module.logits(state_BCD), target_BC, mask_BC)
        return tuple(total + part for total, part in zip(sums, new)), None

    options = {"variable_broadcast": "params", "split_rngs": {"params": False}, "check_constancy_invariants": False}
    scan = nn.scan(nn.remat(add_chunk), **options)
    sums, _ = scan(language, (jnp.zeros(()),) * 3, tuple(map(chunks, (state_BMD, target_BM, loss_mask_BM))))
    return losses.mean_over_tokens(*sums)
