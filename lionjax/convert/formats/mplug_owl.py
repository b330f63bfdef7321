# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl (arXiv 2304.14178) as published: a folder with its own config.json."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_params, require_supported
from lionjax.convert.formats.hf_language import LLAMA
from lionjax.convert.formats.hf_vlm import lionjax_hf_config

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.connectors.perceiver import AbstractorConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B

    v, a = hf_config.get("vision_config") or {}, hf_config.get("visual_abstractor_config") or {}
    act, width = v.get("hidden_act", "quick_gelu"), v.get("hidden_size", 1024)
    require_supported(act in ("gelu", "quick_gelu"), f"hidden_act {act!r}", "gelu or quick_gelu")
    abstractor_widths = (a.get("hidden_size", 1024), a.get("encoder_hidden_size", 1024))
    require_supported(
        abstractor_widths == (width, width),
        f"abstractor widths {abstractor_widths} and a vision width of {width}",
        "an abstractor as wide as the vision tower",
    )
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
        resampler=AbstractorConfig(
            width,
            a.get("num_hidden_layers", 6),
            a.get("num_attention_heads", 16),
            a.get("intermediate_size", 4096),
            hf_config.get("num_query_tokens", 64),
            sub_ln_eps=a.get("layer_norm_eps", 1e-6),
            dropout=a.get("attention_probs_dropout_prob", 0.1),
        ),
        language=LLAMA.config_from_hf(LLAMA_7B | (hf_config.get("text_config") or {})),
        vision_norm_eps=eps,
    )


def _config_to_hf(c: VisualPrefixLM) -> dict:
    v, a = c.vision, c.resampler
    if c.is_encoder_decoder or not v.pre_layernorm:
        return lionjax_hf_config(c, "mplug-owl")
    return {
        "architectures": ["MplugOwlForConditionalGeneration"],
        "model_type": "mplug-owl",
        "num_query_tokens": a.num_query_tokens,
        "text_config": LLAMA.config_to_hf(c.language),
        "vision_config": {
            "model_type": "mplug_owl_vision_model",
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "hidden_size": v.width,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.num_heads,
            "intermediate_size": v.mlp_dim,
            "hidden_act": v.activation,
            "layer_norm_eps": v.norm_eps,
        },
        "visual_abstractor_config": {
            "model_type": "mplug_owl_visual_abstract",
            "hidden_size": a.width,
            "encoder_hidden_size": a.width,
            "num_hidden_layers": a.depth,
            "num_attention_heads": a.num_heads,
            "intermediate_size": a.mlp_dim,
            "layer_norm_eps": a.sub_ln_eps,
            "attention_probs_dropout_prob": a.dropout,
        },
    }


def _matches(c: VisualPrefixLM) -> bool:
    return type(c).__name__ == "VisualPrefixLM" and type(c.resampler).__name__ == "AbstractorConfig"


MPLUG_OWL = CheckpointFormat(
    "mplug_owl",
    ("mplug-owl",),
    _matches,
    _config_from_hf,
    _config_to_hf,
    lambda c: c.weight_map(),
    abstract_params,
    ignore_patterns=(
        r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
        r"vision_model\.embeddings\.position_ids(?#position indices)",
    ),
)
