# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2 (arXiv 2306.14824) as published on Hugging Face."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_params, require_supported, token_id
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.hf_vlm import CLIP_224, lionjax_hf_config

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.connectors.perceiver import ImageToTextProjectionConfig
    from lionjax.models.language.decoder import KOSMOS2_TEXT
    from lionjax.models.vlm.visual_prefix import KOSMOS2

    t, vision = (
        hf_config.get("text_config") or {},
        CLIP.config_from_hf(CLIP_224 | (hf_config.get("vision_config") or {})),
    )
    act = t.get("activation_function", "gelu")
    require_supported(act == "gelu", f"activation_function {act!r}", "gelu")
    require_supported(t.get("scale_embedding", True), "scale_embedding false", "scale_embedding true")
    require_supported(not t.get("add_cross_attention"), "add_cross_attention true", "add_cross_attention false")
    width, heads = t.get("embed_dim", 2048), t.get("attention_heads", 32)
    pad = token_id(t, "pad_token_id", 1)
    language = dataclasses.replace(
        KOSMOS2_TEXT,
        vocab_size=t.get("vocab_size", 65037),
        width=width,
        depth=t.get("layers", 24),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=t.get("ffn_dim", 8192),
        norm_eps=t.get("layer_norm_eps", 1e-5),
        dropout=t.get("dropout", 0.1),
        pad_token_id=pad,
        position_offset=pad + 1,
        bos_token_id=token_id(t, "bos_token_id", 0),
        eos_token_id=token_id(t, "eos_token_id", 2),
    )
    return dataclasses.replace(
        KOSMOS2,
        vision=dataclasses.replace(vision, post_layernorm=False),
        language=language,
        resampler=ImageToTextProjectionConfig(vision.width, width, heads, hf_config.get("latent_query_num", 64)),
        vision_norm_eps=vision.norm_eps,
    )


def _config_to_hf(c: VisualPrefixLM) -> dict:
    t = c.language
    if not c.vision.pre_layernorm:
        return lionjax_hf_config(c, "kosmos-2")
    return {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "model_type": "kosmos-2",
        "latent_query_num": c.resampler.num_query_tokens,
        "tie_word_embeddings": True,
        "vision_config": CLIP.config_to_hf(c.vision) | {"model_type": "kosmos_2_vision_model"},
        "text_config": {
            "model_type": "kosmos_2_text_model",
            "vocab_size": t.vocab_size,
            "embed_dim": t.width,
            "layers": t.depth,
            "ffn_dim": t.mlp_dim,
            "attention_heads": t.num_heads,
            "activation_function": "gelu",
            "layer_norm_eps": t.norm_eps,
            "dropout": t.dropout,
            "attention_dropout": t.dropout,
            "scale_embedding": True,
            "pad_token_id": t.pad_token_id,
            "bos_token_id": t.bos_token_id,
            "eos_token_id": t.eos_token_id,
        },
    }


def _matches(c: VisualPrefixLM) -> bool:
    return type(c).__name__ == "VisualPrefixLM" and type(c.resampler).__name__ == "ImageToTextProjectionConfig"


KOSMOS_2 = CheckpointFormat(
    "kosmos2",
    ("kosmos-2",),
    _matches,
    _config_from_hf,
    _config_to_hf,
    lambda c: c.weight_map(),
    abstract_params,
    ignore_patterns=(
        r"text_model\.model\.embed_positions\.weights(?#computed)",
        r"vision_model\.model\.embeddings\.position_ids(?#position indices)",
    ),
)
