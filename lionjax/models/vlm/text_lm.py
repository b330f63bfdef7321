# SPDX-License-Identifier: Apache-2.0
"""A language model alone as a model that answers: it reads the prompt and no image.

Its parameters are those of the language model itself, at the same paths, so that a converted GPT-2, LLaMA, SmolLM2, OPT
or T5 is opened as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lionjax.core.types import VLM, Array, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping
from lionjax.models.language.backend import LanguageBackend, is_encoder_decoder, language_model
from lionjax.models.language.decoder import SMOLLM2_135M, DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vlm.visual_prefix_weights import language_weight_map
from lionjax.nn import losses
from lionjax.nn.layers import split_key

MAX_ANSWER_TOKENS = 128
MAX_PROMPT_TOKENS = 2048  # of a model without learned positions


@dataclasses.dataclass(frozen=True)
class TextLM(VLM):
    """Config of the model. Images of a batch are not read."""

    language: DecoderConfig | T5Config = SMOLLM2_135M
    dtype: str = "float32"  # of the computation

    @property
    def info(self) -> ModelInfo:
        c = self.language
        return ModelInfo(
            vocab_size=c.vocab_size,
            embedding_rows=c.padded_vocab_size,
            end_token=c.eos_token_id,
            is_encoder_decoder=is_encoder_decoder(c),
            image_size=1,  # of the blank image in its place
            reads_images=False,
            has_features=False,
            default_processor=self._default_processor(),
        )

    def _default_processor(self) -> dict[str, Any]:
        """Fields of ProcessorConfig: the prompt is tokenized as it is, by the tokenizer's own rules."""
        is_encoder = is_encoder_decoder(self.language)
        positions = 0 if is_encoder else self.language.max_positions - self.language.position_offset
        answer = min(MAX_ANSWER_TOKENS, positions // 2) if positions > 0 else MAX_ANSWER_TOKENS
        return {
            "use_tags": False,
            "prompt_tokenization": "whole",
            "reader": "encoder" if is_encoder else "decoder",
            "max_prompt_tokens": positions - answer if positions > 0 else MAX_PROMPT_TOKENS,
            "max_target_tokens": answer,
        }

    def _apply(self, params: Params, run: Callable[[LanguageBackend], Any]) -> Any:
        return language_model(self.language).apply({"params": params}, method=run)

    def init(self, key: Array, batch: Batch) -> Params:
        """Random parameters of the language model."""
        return language_model(self.language).init(key, method=lambda model: self._forward(model, batch, None))["params"]

    def loss(self, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, Metrics]:
        """Mean cross entropy of the target's tokens, and metrics."""
        logits_BMV = self.logits(params, batch, key)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)

    def logits(self, params: Params, batch: Batch, key: Array | None = None) -> Array:
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return self._apply(params, lambda model: self._forward(model, batch, key))

    def _forward(self, model: LanguageBackend, batch: Batch, key: Array | None) -> Array:
        prompt_BLD, target_BMD = (model.embed(ids, self.dtype) for ids in (batch.prompt_BL, batch.target_BM))
        state_BMD, _ = model.forward(
            prompt_BLD, batch.prompt_mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, split_key(key, 2)
        )
        return model.logits(state_BMD)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[Array, Cache]:
        """Logits (B, V) of the first answer token, and a cache of the prompt with `cache_length` free slots."""

        def run(model: LanguageBackend) -> tuple[Array, Cache]:
            prompt_BLD = model.embed(batch.prompt_BL, self.dtype)
            state_BD, cache = model.prefill(prompt_BLD, batch.prompt_mask_BL, cache_length, batch.task_B)
            return model.logits(state_BD), cache

        return self._apply(params, run)

    def extend(self, params: Params, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""

        def run(model: LanguageBackend) -> tuple[Array, Cache]:
            state_BD, new_cache = model.extend(model.embed_next(token_B, cache), cache)
            return model.logits(state_BD), new_cache

        return self._apply(params, run)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of Hugging Face's class of the language model."""
        return language_weight_map(self.language)
