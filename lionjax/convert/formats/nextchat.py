# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat's release, and SAM by itself: as Meta's file and as a folder of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, abstract
from lionjax.convert.formats.hf_language import LLAMA
from lionjax.convert.formats.sam import SAM, SEGMENT_ANYTHING
from lionjax.core import config as configs

if TYPE_CHECKING:
    from lionjax.models.vlm.nextchat import NextChat


def _nextchat_config(s: dict) -> Any:
    """The release says what its language model is; its CLIP and SAM are known. Our own files say everything."""
    from lionjax.models.vlm.nextchat import NextChat

    if "system" in s:
        return configs.from_json(json.dumps(s["system"]))
    language = LLAMA.config(s)
    patch, _, _, trigger, location = range(language.vocab - 5, language.vocab)  # added last, in this order
    return dataclasses.replace(
        NextChat(),
        language=language,
        feature_layer=s.get("mm_vision_select_layer", -2),
        projector_depth=s.get("mm_depth", 1),
        image_token=patch,
        trigger_token=trigger,
        location_token=location,
    )


def _nextchat_settings(c: NextChat) -> dict:
    own = {
        "architectures": ["NextChatForSegLM"],
        "model_type": "nextchat",
        "mm_depth": c.projector_depth,
        "mm_hidden_size": c.vision.width,
        "mm_vision_select_layer": c.feature_layer,
        "use_mm_proj": True,
    }
    return LLAMA.settings(c.language) | own | {"system": json.loads(configs.to_json(c))}


NEXTCHAT = Published(
    "nextchat",
    ("nextchat",),
    lambda c: type(c).__name__ == "NextChat",
    _nextchat_config,
    _nextchat_settings,
    lambda c: c.torch_rows(),
    abstract,
    ignore=(
        *LLAMA.ignore,
        r"model\.vision_tower\.vision_model\.embeddings\.position_ids(?#they only count)",
        r"sam\.model\.pixel_(mean|std)(?#those of all pictures)",
    ),
)
POINTING = (NEXTCHAT, SAM, SEGMENT_ANYTHING)
