# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2 (arXiv 2306.14824) as published on Hugging Face."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_hf_config, require_supported
from lionjax.convert.formats.config_fields import TOKEN_IDS, ConfigFields
from lionjax.convert.formats.hf_language import one_head_size
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.hf_vlm import CLIP_224

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM


_TEXT_SIZES = {"width": "embed_dim", "depth": "layers", "num_heads": "attention_heads", "mlp_dim": "ffn_dim"}
TEXT_FIELDS = ConfigFields(
    _TEXT_SIZES | {"vocab_size": "vocab_size", "norm_eps": "layer_norm_eps", "dropout": "dropout"}, token_ids=TOKEN_IDS
)


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
    fields = TEXT_FIELDS.read(t, TEXT_FIELDS.write(KOSMOS2_TEXT))
    width, heads = fields["width"], fields["num_heads"]
    language = dataclasses.replace(
        KOSMOS2_TEXT, **fields, **one_head_size(fields), position_offset=fields["pad_token_id"] + 1
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
            "activation_function": "gelu",
            "attention_dropout": t.dropout,
            "scale_embedding": True,
        }
        | TEXT_FIELDS.write(t),
    }


def _matches(c: VisualPrefixLM) -> bool:
    return type(c).__name__ == "VisualPrefixLM" and type(c.resampler).__name__ == "ImageToTextProjectionConfig"


KOSMOS_2 = CheckpointFormat(
    "kosmos2",
    ("kosmos-2",),
    _matches,
    _config_from_hf,
    _config_to_hf,
    ignore_patterns=(
        r"text_model\.model\.embed_positions\.weights(?#computed)",
        r"vision_model\.model\.embeddings\.position_ids(?#position indices)",
    ),
)
