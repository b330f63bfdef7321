# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl (arXiv 2304.14178) as published: a folder with its own config.json."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_hf_config, require_supported
from lionjax.convert.formats.config_fields import BLOCK_SIZES, ConfigFields
from lionjax.convert.formats.hf_language import LLAMA, LLAMA_7B
from lionjax.convert.formats.hf_vision import CLIP_LAYERS, VIT_FIELDS, read_vit_fields
from lionjax.convert.formats.hf_vlm import CLIP_224

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

ABSTRACTOR_FIELDS = ConfigFields(
    BLOCK_SIZES | {"sub_ln_eps": "layer_norm_eps", "dropout": "attention_probs_dropout_prob"}
)


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.connectors.perceiver import AbstractorConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B

    v, a = hf_config.get("vision_config") or {}, hf_config.get("visual_abstractor_config") or {}
    vit_fields = read_vit_fields(v, CLIP_224 | {"layer_norm_eps": 1e-6})
    width = vit_fields["width"]
    abstractor_widths = (a.get("hidden_size", 1024), a.get("encoder_hidden_size", 1024))
    require_supported(
        abstractor_widths == (width, width),
        f"abstractor widths {abstractor_widths} and a vision width of {width}",
        "an abstractor as wide as the vision tower",
    )
    return dataclasses.replace(
        MPLUG_OWL_7B,
        vision=ViTConfig(**vit_fields, **CLIP_LAYERS | {"post_layernorm": False}),
        resampler=AbstractorConfig(
            **ABSTRACTOR_FIELDS.read(a, ABSTRACTOR_FIELDS.write(AbstractorConfig())),
            num_query_tokens=hf_config.get("num_query_tokens", 64),
        ),
        language=LLAMA.config_from_hf(LLAMA_7B | (hf_config.get("text_config") or {})),
        vision_norm_eps=vit_fields["norm_eps"],
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
        "vision_config": {"model_type": "mplug_owl_vision_model"} | VIT_FIELDS.write(v),
        "visual_abstractor_config": {"model_type": "mplug_owl_visual_abstract", "encoder_hidden_size": a.width}
        | ABSTRACTOR_FIELDS.write(a),
    }


def _matches(c: VisualPrefixLM) -> bool:
    return type(c).__name__ == "VisualPrefixLM" and type(c.resampler).__name__ == "AbstractorConfig"


MPLUG_OWL = CheckpointFormat(
    "mplug_owl",
    ("mplug-owl",),
    _matches,
    _config_from_hf,
    _config_to_hf,
    ignore_patterns=(
        r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
        r"vision_model\.embeddings\.position_ids(?#position indices)",
    ),
)
