# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl as published: one folder with its own config.json."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, abstract, refuse_unless
from lionjax.convert.formats.hf_language import LLAMA
from lionjax.convert.formats.hf_vlm import own_settings

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import Prefix

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def _config(s: dict) -> Any:
    from lionjax.models.connectors.perceiver import AbstractorConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B

    v, a = s.get("vision_config") or {}, s.get("visual_abstractor_config") or {}
    act, width = v.get("hidden_act", "quick_gelu"), v.get("hidden_size", 1024)
    refuse_unless(act in ("gelu", "quick_gelu"), f"hidden_act {act!r}", "gelu or quick_gelu")
    same = a.get("hidden_size", 1024) == a.get("encoder_hidden_size", 1024) == width
    refuse_unless(same, "an abstractor of another width than its tower", "one as wide")
    eps = v.get("layer_norm_eps", 1e-6)
    return dataclasses.replace(
        MPLUG_OWL_7B,
        vision=ViTConfig(
            v.get("image_size", 224),
            v.get("patch_size", 14),
            width,
            v.get("num_hidden_layers", 24),
            v.get("num_attention_heads", 16),
            v.get("intermediate_size", 4096),
            eps,
            act,
            "qkvo",
            False,
            True,
        ),
        latents=AbstractorConfig(
            width,
            a.get("num_hidden_layers", 6),
            a.get("num_attention_heads", 16),
            a.get("intermediate_size", 4096),
            s.get("num_query_tokens", 64),
            inner_eps=a.get("layer_norm_eps", 1e-6),
            dropout=a.get("attention_probs_dropout_prob", 0.1),
        ),
        language=LLAMA.config(LLAMA_7B | (s.get("text_config") or {})),
        vision_eps=eps,
    )


def _settings(c: Prefix) -> dict:
    v, a = c.vision, c.latents
    if c.encodes or not v.norm_before:
        return own_settings(c, "mplug-owl")
    return {
        "architectures": ["MplugOwlForConditionalGeneration"],
        "model_type": "mplug-owl",
        "num_query_tokens": a.queries,
        "text_config": LLAMA.settings(c.language),
        "vision_config": {
            "model_type": "mplug_owl_vision_model",
            "image_size": v.image,
            "patch_size": v.patch,
            "hidden_size": v.width,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.heads,
            "intermediate_size": v.hidden,
            "hidden_act": v.activation,
            "layer_norm_eps": v.eps,
        },
        "visual_abstractor_config": {
            "model_type": "mplug_owl_visual_abstract",
            "hidden_size": a.width,
            "encoder_hidden_size": a.width,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "intermediate_size": a.hidden,
            "layer_norm_eps": a.inner_eps,
            "attention_probs_dropout_prob": a.dropout,
        },
    }


def _describes(c: Prefix) -> bool:
    return type(c).__name__ == "Prefix" and type(c.latents).__name__ == "AbstractorConfig"


OWL = Published(
    "mplug_owl",
    ("mplug-owl",),
    _describes,
    _config,
    _settings,
    lambda c: c.torch_rows(),
    abstract,
    ignore=(
        r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
        r"vision_model\.embeddings\.position_ids(?#they only count)",
    ),
)
