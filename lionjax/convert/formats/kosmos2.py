# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2 as Hugging Face publishes it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, abstract, refuse_unless, token
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.hf_vlm import CLIP_224, own_settings

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import Prefix


def _config(s: dict) -> Any:
    from lionjax.models.connectors.perceiver import ProjectionConfig
    from lionjax.models.language.decoder import KOSMOS2_TEXT
    from lionjax.models.vlm.visual_prefix import KOSMOS2

    t, vision = s.get("text_config") or {}, CLIP.config(CLIP_224 | (s.get("vision_config") or {}))
    act = t.get("activation_function", "gelu")
    refuse_unless(act == "gelu", f"activation_function {act!r}", "gelu")
    refuse_unless(t.get("scale_embedding", True), "words as they are", "one that scales its words")
    refuse_unless(not t.get("add_cross_attention"), "attention to an encoder", "one without")
    width, heads = t.get("embed_dim", 2048), t.get("attention_heads", 32)
    pad = token(t, "pad_token_id", 1)
    language = dataclasses.replace(
        KOSMOS2_TEXT,
        vocab=t.get("vocab_size", 65037),
        width=width,
        layers=t.get("layers", 24),
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=t.get("ffn_dim", 8192),
        eps=t.get("layer_norm_eps", 1e-5),
        dropout=t.get("dropout", 0.1),
        pad_token=pad,
        position_offset=pad + 1,
        start_token=token(t, "bos_token_id", 0),
        end_token=token(t, "eos_token_id", 2),
    )
    return dataclasses.replace(
        KOSMOS2,
        vision=dataclasses.replace(vision, norm_after=False),
        language=language,
        latents=ProjectionConfig(vision.width, width, heads, s.get("latent_query_num", 64)),
        vision_eps=vision.eps,
    )


def _settings(c: Prefix) -> dict:
    t = c.language
    if not c.vision.norm_before:
        return own_settings(c, "kosmos-2")
    return {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "model_type": "kosmos-2",
        "latent_query_num": c.latents.queries,
        "tie_word_embeddings": True,
        "vision_config": CLIP.settings(c.vision) | {"model_type": "kosmos_2_vision_model"},
        "text_config": {
            "model_type": "kosmos_2_text_model",
            "vocab_size": t.vocab,
            "embed_dim": t.width,
            "layers": t.layers,
            "ffn_dim": t.hidden,
            "attention_heads": t.heads,
            "activation_function": "gelu",
            "layer_norm_eps": t.eps,
            "dropout": t.dropout,
            "attention_dropout": t.dropout,
            "scale_embedding": True,
            "pad_token_id": t.pad_token,
            "bos_token_id": t.start_token,
            "eos_token_id": t.end_token,
        },
    }


def _describes(c: Prefix) -> bool:
    return type(c).__name__ == "Prefix" and type(c.latents).__name__ == "ProjectionConfig"


KOSMOS = Published(
    "kosmos2",
    ("kosmos-2",),
    _describes,
    _config,
    _settings,
    lambda c: c.torch_rows(),
    abstract,
    ignore=(
        r"text_model\.model\.embed_positions\.weights(?#computed)",
        r"vision_model\.model\.embeddings\.position_ids(?#they only count)",
    ),
)
