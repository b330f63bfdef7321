# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl (arXiv 2304.14178) as published: a folder with its own config.json."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_hf_config
from lionjax.convert.formats.config_fields import BLOCK_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, require_equal
from lionjax.convert.formats.hf_language import LLAMA
from lionjax.convert.formats.hf_vision import CLIP_LAYERS, CLIP_VISION_TABLE, VIT_FIELDS
from lionjax.convert.formats.hf_vlm import has_resampler
from lionjax.convert.formats.vision_tower import CLIP_224

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

ABSTRACTOR_FIELDS = ConfigFields(
    BLOCK_SIZES | {"sub_ln_eps": "layer_norm_eps", "dropout": "attention_probs_dropout_prob"},
    {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 4096}
    | {"layer_norm_eps": 1e-6, "attention_probs_dropout_prob": 0.1},
)
ABSTRACTOR_TABLE = ConfigTable(("mplug_owl_visual_abstract",), ABSTRACTOR_FIELDS, {"encoder_hidden_size": 1024})
VISION_TABLE = ConfigTable(
    ("mplug_owl_vision_model",),
    VIT_FIELDS,
    CLIP_224 | {"layer_norm_eps": 1e-6},
    fixed=CLIP_VISION_TABLE.fixed,
    inert=("attention_dropout", "use_flash_attn"),
)
TABLE = ConfigTable(
    ("mplug-owl",),
    computed={"num_query_tokens": 64},
    inert=("use_decoder_only_language_model", "tie_word_embeddings"),
    parts=("vision_config", "visual_abstractor_config", "text_config"),
)


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.connectors.perceiver import AbstractorConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B

    s = TABLE.read(hf_config)
    vit_fields = VISION_TABLE.read_fields(VISION_TABLE.read(s["vision_config"], "vision_config"))
    a = ABSTRACTOR_TABLE.read(s["visual_abstractor_config"], "visual_abstractor_config")
    for field in ("hidden_size", "encoder_hidden_size"):
        path = f"visual_abstractor_config.{field}"
        require_equal(path, a[field], "vision_config.hidden_size", vit_fields["width"])
    return dataclasses.replace(
        MPLUG_OWL_7B,
        vision=ViTConfig(**vit_fields, **CLIP_LAYERS | {"post_layernorm": False}),
        resampler=AbstractorConfig(**ABSTRACTOR_TABLE.read_fields(a), num_query_tokens=s["num_query_tokens"]),
        language=LLAMA.config_from_hf(s["text_config"] or {}, "text_config"),
        vision_norm_eps=vit_fields["norm_eps"],
    )


def _config_to_hf(c: VisualPrefixLM) -> dict:
    v, a = c.vision, c.resampler
    if c.is_encoder_decoder or not v.pre_layernorm:
        return lionjax_hf_config(c, "mplug_owl")
    return {
        "architectures": ["MplugOwlForConditionalGeneration"],
        "model_type": "mplug-owl",
        "num_query_tokens": a.num_query_tokens,
        "text_config": LLAMA.config_to_hf(c.language),
        "vision_config": {"model_type": "mplug_owl_vision_model"} | VIT_FIELDS.write(v),
        "visual_abstractor_config": {"model_type": "mplug_owl_visual_abstract", "encoder_hidden_size": a.width}
        | ABSTRACTOR_FIELDS.write(a),
    }


MPLUG_OWL = CheckpointFormat(
    "mplug_owl",
    ("mplug-owl",),
    lambda c: has_resampler(c, "AbstractorConfig"),
    _config_from_hf,
    _config_to_hf,
    ignore_patterns=(
        r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
        r"vision_model\.embeddings\.position_ids(?#position indices)",
    ),
)
