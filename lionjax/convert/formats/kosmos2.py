# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2 (arXiv 2306.14824) as published on Hugging Face."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_hf_config
from lionjax.convert.formats.config_fields import language_model_fields
from lionjax.convert.formats.config_table import ConfigTable
from lionjax.convert.formats.hf_language import one_head_size
from lionjax.convert.formats.hf_vision import CLIP, CLIP_VISION_TABLE, clip_vision_from_hf
from lionjax.convert.formats.hf_vlm import has_resampler
from lionjax.convert.formats.vision_tower import CLIP_224

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM


_TEXT_SIZES = {"width": "embed_dim", "depth": "layers", "num_heads": "attention_heads", "mlp_dim": "ffn_dim"}
TEXT_FIELDS = language_model_fields(
    _TEXT_SIZES
    | {"vocab_size": "vocab_size", "norm_eps": "layer_norm_eps", "dropout": "dropout"}
    | {"scale_embeddings": "scale_embedding"},
    {"vocab_size": 65037, "embed_dim": 2048, "layers": 24, "attention_heads": 32, "ffn_dim": 8192, "dropout": 0.1}
    | {"layer_norm_eps": 1e-5, "scale_embedding": True, "activation_function": "gelu"},
    "activation_function",
    pad=1,
    bos=0,
    eos=2,
)
TEXT_TABLE = ConfigTable(
    ("kosmos_2_text_model",),
    TEXT_FIELDS,
    fixed={"tie_word_embeddings": (True,)},
    # Positions are computed, so max_position_embeddings limits nothing.
    inert=("max_position_embeddings", "attention_dropout", "activation_dropout", "layerdrop", "is_decoder"),
    aliases={"num_attention_heads": "attention_heads", "hidden_size": "embed_dim", "num_hidden_layers": "layers"},
)
VISION_TABLE = dataclasses.replace(CLIP_VISION_TABLE, model_types=("kosmos_2_vision_model",), computed=CLIP_224)
TABLE = ConfigTable(
    ("kosmos-2",),
    computed={"latent_query_num": 64},
    fixed={"tie_word_embeddings": (True,)},
    parts=("text_config", "vision_config"),
)


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.connectors.perceiver import ImageToTextProjectionConfig
    from lionjax.models.language.decoder import KOSMOS2_TEXT
    from lionjax.models.vlm.visual_prefix import KOSMOS2

    s = TABLE.read(hf_config)
    vision = clip_vision_from_hf(VISION_TABLE, s["vision_config"], "vision_config")
    fields = TEXT_TABLE.read_fields(TEXT_TABLE.read(s["text_config"], "text_config"))
    width, heads = fields["width"], fields["num_heads"]
    language = dataclasses.replace(
        KOSMOS2_TEXT, **fields, **one_head_size(fields), position_offset=fields["pad_token_id"] + 1
    )
    return dataclasses.replace(
        KOSMOS2,
        vision=dataclasses.replace(vision, post_layernorm=False),
        language=language,
        resampler=ImageToTextProjectionConfig(vision.width, width, heads, s["latent_query_num"]),
        vision_norm_eps=vision.norm_eps,
    )


def _config_to_hf(c: VisualPrefixLM) -> dict:
    t = c.language
    if not c.vision.pre_layernorm:
        return lionjax_hf_config(c, "kosmos2")
    return {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "model_type": "kosmos-2",
        "latent_query_num": c.resampler.num_query_tokens,
        "tie_word_embeddings": True,
        "vision_config": CLIP.config_to_hf(c.vision) | {"model_type": "kosmos_2_vision_model"},
        "text_config": {"model_type": "kosmos_2_text_model", "attention_dropout": t.dropout} | TEXT_FIELDS.write(t),
    }


KOSMOS_2 = CheckpointFormat(
    "kosmos2",
    ("kosmos-2",),
    lambda c: has_resampler(c, "ImageToTextProjectionConfig"),
    _config_from_hf,
    _config_to_hf,
    ignore_patterns=(
        r"text_model\.model\.embed_positions\.weights(?#computed)",
        r"vision_model\.model\.embeddings\.position_ids(?#position indices)",
    ),
)
