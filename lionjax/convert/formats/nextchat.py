# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat's release, and SAM by itself: as Meta's file and as a folder of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_params
from lionjax.convert.formats.hf_language import LLAMA
from lionjax.convert.formats.sam import SAM, SEGMENT_ANYTHING
from lionjax.core import config as configs

if TYPE_CHECKING:
    from lionjax.models.vlm.nextchat import NextChat


def _nextchat_config_from_hf(hf_config: dict) -> Any:
    """The release says what its language model is; its CLIP and SAM are known. Our own files say everything."""
    from lionjax.models.vlm.nextchat import NextChat

    if "system" in hf_config:
        return configs.from_json(json.dumps(hf_config["system"]))
    language = LLAMA.config_from_hf(hf_config)
    patch, _, _, trigger, location = range(language.vocab - 5, language.vocab)  # added last, in this order
    return dataclasses.replace(
        NextChat(),
        language=language,
        feature_layer=hf_config.get("mm_vision_select_layer", -2),
        projector_depth=hf_config.get("mm_depth", 1),
        image_token=patch,
        trigger_token_id=trigger,
        box_token_id=location,
    )


def _nextchat_config_to_hf(c: NextChat) -> dict:
    own = {
        "architectures": ["NextChatForSegLM"],
        "model_type": "nextchat",
        "mm_depth": c.projector_depth,
        "mm_hidden_size": c.vision.width,
        "mm_vision_select_layer": c.feature_layer,
        "use_mm_proj": True,
    }
    return LLAMA.config_to_hf(c.language) | own | {"system": json.loads(configs.to_json(c))}


NEXTCHAT = CheckpointFormat(
    "nextchat",
    ("nextchat",),
    lambda c: type(c).__name__ == "NextChat",
    _nextchat_config_from_hf,
    _nextchat_config_to_hf,
    lambda c: c.weight_map(),
    abstract_params,
    ignore_patterns=(
        *LLAMA.ignore_patterns,
        r"model\.vision_tower\.vision_model\.embeddings\.position_ids(?#they only count)",
        r"sam\.model\.pixel_(mean|std)(?#those of all pictures)",
    ),
)
REGION_FORMATS = (NEXTCHAT, SAM, SEGMENT_ANYTHING)
