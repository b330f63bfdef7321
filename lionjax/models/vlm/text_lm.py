# SPDX-License-Identifier: Apache-2.0
"""A language model alone as a model that answers: it reads the prompt and no image.

Its parameters are those of the language model itself, at the same paths, so that a converted GPT-2, LLaMA, SmolLM2, OPT
or T5 is opened as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lionjax.core.errors import check_ranges
from lionjax.core.types import VLM, Array, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping
from lionjax.models.language.backend import LanguageBackend, is_encoder_decoder, language_model, row_layout, token_loss
from lionjax.models.language.decoder import SMOLLM2_135M, Decoder, DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vlm.visual_prefix_weights import language_weight_map
from lionjax.nn import losses
from lionjax.nn.kv_cache import append_to_cache
from lionjax.nn.layers import split_key

MAX_ANSWER_TOKENS = 128
MAX_PROMPT_TOKENS = 2048  # of a model without learned positions


@dataclasses.dataclass(frozen=True)
class TextLM(VLM):
    """Config of the model. Images of a batch are not read.

    `contrastive_margin`: margin of SimCTG's loss, which spreads the states of a text apart, so that contrastive search
    works (`nn.losses.contrastive_token_loss`; paper: 0.5); 0: the cross entropy alone.
    """

    language: DecoderConfig | T5Config = SMOLLM2_135M
    dtype: str = "float32"  # of the computation
    contrastive_margin: float = 0.0

    def __post_init__(self):
        check_ranges(self, contrastive_margin=">= 0")
        if self.contrastive_margin and is_encoder_decoder(self.language):
            raise ValueError("contrastive_margin is above 0 for an encoder-decoder; set it to 0 or take a decoder")

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
            row_layout=None if self.contrastive_margin else row_layout(c),
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
        return language_model(self.language).init(
            key, method=lambda model: model.logits(self._states(model, batch, None))
        )["params"]

    def loss(self, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, Metrics]:
        """Mean cross entropy of the target's tokens, with SimCTG's loss of their states if configured, and metrics."""

        def run(model: LanguageBackend):
            state_BMD = self._states(model, batch, key)
            return state_BMD, token_loss(model, state_BMD, batch.target_BM, batch.loss_mask_BM)

        state_BMD, (loss, metrics) = self._apply(params, run)
        if not self.contrastive_margin:
            return loss, metrics
        # The states that predict the targets are those of the prompt's last token and of all targets but the last.
        is_read_BM = jnp.pad(batch.target_mask_BM.astype(bool)[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        contrastive = losses.contrastive_token_loss(state_BMD, is_read_BM, self.contrastive_margin)
        return loss + contrastive, metrics | {"loss_tokens": loss, "loss_contrastive": contrastive}

    def logits(self, params: Params, batch: Batch, key: Array | None = None) -> Array:
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return self._apply(params, lambda model: model.logits(self._states(model, batch, key)))

    def _states(self, model: LanguageBackend, batch: Batch, key: Array | None) -> Array:
        """States (B, M, D) that predict each target token."""
        if batch.segment_BL is not None:
            row_BLD = model.embed(batch.prompt_BL, self.dtype)
            return model.forward_segments(row_BLD, batch.segment_BL, batch.target_index_BM, split_key(key, 2)[0])[0]
        prompt_BLD, target_BMD = (model.embed(ids, self.dtype) for ids in (batch.prompt_BL, batch.target_BM))
        state_BMD, _ = model.forward(
            prompt_BLD, batch.prompt_mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, split_key(key, 2)
        )
        return state_BMD

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

    def prefill_states(self, params: Params, batch: Batch, cache_length: int) -> tuple[Array, Array, Cache]:
        """As `prefill`, with the last hidden states (B, L, D) of the prompt's tokens in between; of a decoder only."""
        self._require_decoder()
        logits_BV, cache = self.prefill(params, batch, cache_length)

        def states(model: Decoder) -> Array:
            return model(model.embed(batch.prompt_BL, self.dtype), batch.prompt_mask_BL, batch.task_B)

        return logits_BV, self._apply(params, states), cache

    def extend_candidates(self, params: Params, token_BK: Array, cache: Cache) -> tuple[Array, Array, Any]:
        """See `VLM.extend_candidates`; all candidates are read in one pass over a cache that they share."""
        self._require_decoder()
        shape = token_BK.shape

        def run(model: Decoder) -> tuple[Array, Array, Any]:
            state_RD, new_kv = model.read_next(model.embed_next(token_BK.reshape(-1), cache), cache)
            logits_RV = model.logits(state_RD)
            return logits_RV.reshape(*shape, -1), state_RD.reshape(*shape, -1), new_kv

        return self._apply(params, run)

    def keep_candidate(self, cache: Cache, candidates: Any, index_B: Array) -> Cache:
        """The cache with the keys and values of one candidate of each row."""

        def chosen(leaf: Array) -> Array:
            rows = jnp.arange(len(index_B)) * (leaf.shape[1] // len(index_B)) + index_B
            return jnp.take(leaf, rows, axis=1)

        return append_to_cache(cache, jax.tree.map(chosen, candidates))

    def cached_context(self, cache: Cache) -> tuple[Array, Array]:
        """See `VLM.cached_context`: the slots of the prompt, then those of generated tokens; of a decoder only."""
        self._require_decoder()
        segments = cache.prompt, (cache.generated["k"], cache.generated["v"])
        return tuple(jnp.concatenate(parts, axis=3) for parts in zip(*segments))

    def with_context(self, cache: Cache, key_value: tuple[Array, Array]) -> Cache:
        """See `VLM.with_context`."""
        length = cache.prompt[0].shape[3]
        prompt = tuple(new[:, :, :, :length].astype(old.dtype) for old, new in zip(cache.prompt, key_value))
        generated = {k: new[:, :, :, length:].astype(cache.generated[k].dtype) for k, new in zip("kv", key_value)}
        return dataclasses.replace(cache, prompt=prompt, generated=generated)

    def _require_decoder(self) -> None:
        if is_encoder_decoder(self.language):
            raise self._lacks("states of candidates: its language model is an encoder-decoder; use a decoder")

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of Hugging Face's class of the language model."""
        return language_weight_map(self.language)
