# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat (arXiv 2311.04498) as released; `REGION_FORMATS` also has SAM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import lionjax_config_format, lionjax_hf_config, read_lionjax_config
from lionjax.convert.formats.config_table import ConfigTable, require_equal
from lionjax.convert.formats.hf_language import LLAMA, LLAMA_TABLE, llama_from_settings
from lionjax.convert.formats.hf_vlm import MM_FIXED, MM_INERT
from lionjax.convert.formats.sam import SAM, SEGMENT_ANYTHING

if TYPE_CHECKING:
    from lionjax.models.vlm.nextchat import NextChat


TABLE = ConfigTable(
    ("nextchat",),
    LLAMA_TABLE.fields,
    LLAMA_TABLE.computed | {"mm_depth": 1, "mm_hidden_size": None, "mm_vision_select_layer": -2},
    fixed={**LLAMA_TABLE.fixed, **MM_FIXED},
    inert=(*LLAMA_TABLE.inert, *MM_INERT, "mm_vision_tower", "vision_tower"),
)


def _nextchat_config_from_hf(hf_config: dict) -> Any:
    """The config in a lionjax config.json, else the released CLIP and SAM around config.json's language model."""
    from lionjax.models.vlm.nextchat import NextChat

    if "system" in hf_config:
        return read_lionjax_config(hf_config)
    s = TABLE.read(hf_config)
    language = llama_from_settings(TABLE, s)
    require_equal("mm_hidden_size", s["mm_hidden_size"], "the width of its CLIP", NextChat().vision.width)
    # The release appends five tokens to the vocabulary; three of them are used.
    image, _, _, trigger, box = range(language.vocab_size - 5, language.vocab_size)
    return dataclasses.replace(
        NextChat(),
        language=language,
        feature_layer=s["mm_vision_select_layer"],
        projector_depth=s["mm_depth"],
        image_token_id=image,
        trigger_token_id=trigger,
        box_token_id=box,
    )


def _nextchat_config_to_hf(c: NextChat) -> dict:
    hf_config = lionjax_hf_config(c, "nextchat") | {
        "architectures": ["NextChatForSegLM"],
        "model_type": "nextchat",
        "mm_depth": c.projector_depth,
        "mm_hidden_size": c.vision.width,
        "mm_vision_select_layer": c.feature_layer,
        "use_mm_proj": True,
    }
    return LLAMA.config_to_hf(c.language) | hf_config


NEXTCHAT = lionjax_config_format(
    "nextchat",
    "NextChat",
    config_from_hf=_nextchat_config_from_hf,
    config_to_hf=_nextchat_config_to_hf,
    ignore_patterns=(
        *LLAMA.ignore_patterns,
        r"model\.vision_tower\.vision_model\.embeddings\.position_ids(?#position indices)",
        r"sam\.model\.pixel_(mean|std)(?#image normalization)",
    ),
)
REGION_FORMATS = (NEXTCHAT, SAM, SEGMENT_ANYTHING)
