# SPDX-License-Identifier: Apache-2.0
"""Published ViTs: CLIP's as Hugging Face's folder and as OpenAI's names, and EVA's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from lionjax.convert.published import Published, abstract_of_picture, refuse_unless
from lionjax.interfaces import Params

CLIP_FILE = "clip_vit_L.pth"  # LAVIS's, with OpenAI's names; it tells nothing of itself


def _of_vit(c: Any, clip: bool) -> bool:
    return type(c).__name__ == "ViTConfig" and c.norm_before == clip


def _vit_abstract(c: Any, mesh: Any = None) -> Params:
    from lionjax.vision.vit import ViT

    return abstract_of_picture(ViT(c), c.image, mesh)


def _clip_config(s: dict) -> Any:
    from lionjax.vision.vit import ViTConfig

    s = s.get("vision_config", s)
    act = s.get("hidden_act", "quick_gelu")
    refuse_unless(act in ("quick_gelu", "gelu"), f"hidden_act {act!r}", "quick_gelu or gelu")
    return ViTConfig(
        s.get("image_size", 224),
        s.get("patch_size", 32),
        s.get("hidden_size", 768),
        s.get("num_hidden_layers", 12),
        s.get("num_attention_heads", 12),
        s.get("intermediate_size", 3072),
        s.get("layer_norm_eps", 1e-5),
        act,
        biases="qkvo",
        patch_bias=False,
        norm_before=True,
        norm_after=True,
    )


def _clip_settings(c: Any) -> dict:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": c.image,
        "patch_size": c.patch,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "layer_norm_eps": c.eps,
        "hidden_act": c.activation,
    }


def _clip_rows(c: Any) -> tuple:
    from lionjax.vision import vit
    from lionjax.weight_rows import under

    return under("vision_model.", "", vit.clip_rows(c))


def _eva_config(s: dict) -> Any:
    from lionjax.vision.vit import EVA_VIT_G

    return EVA_VIT_G


def _eva_rows(c: Any) -> tuple:
    from lionjax.vision import vit

    return vit.eva_rows(c)


def _openai_config(s: dict) -> Any:
    from lionjax.vision.vit import CLIP_VIT_L

    return dataclasses.replace(CLIP_VIT_L, image=224)


def _openai_told(c: Any, names: Collection[str]) -> Any:
    """How many layers there are, and whether the norm behind them is: LAVIS runs one less, without."""
    block = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\..*")
    depth = 1 + max((int(found[1]) for name in names if (found := block.fullmatch(name))), default=0)
    return dataclasses.replace(c, depth=depth, norm_after="ln_post.weight" in names)


def _openai_rows(c: Any) -> tuple:
    from lionjax.vision import vit

    return vit.openai_rows(c)


EVA_IGNORES = r"(blocks\.39\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.)).*(?#a 40th block and heads)"
# LAVIS runs either tower without its last block and what is behind it.
LAVIS_IGNORES = (
    r"visual_encoder\.(blocks\.39\.|transformer\.resblocks\.23\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.|"
    r"class_embedding|positional_embedding|conv1\.|ln_pre\.|transformer\.)).*(?#a last block and heads)"
)

CLIP = Published(
    "clip",
    ("clip", "clip_vision_model"),
    lambda c: _of_vit(c, True),
    _clip_config,
    _clip_settings,
    _clip_rows,
    _vit_abstract,
    # Of a whole CLIP the vision tower is read.
    ignore=(
        r"vision_model\.embeddings\.position_ids(?#they only count)",
        r"((text_model|(text|visual)_projection)\..*|logit_scale)(?#of the comparison with texts)",
    ),
    base="vision_model.",
)
# Written again as Hugging Face's.
OPENAI_CLIP = Published(
    "openai_clip",
    (),
    lambda c: False,
    _openai_config,
    _clip_settings,
    _openai_rows,
    _vit_abstract,
    ignore=(r"proj(?#of the comparison with texts)",),
    inside="visual.",
    told=_openai_told,
)
EVA = Published(
    "eva",
    (),
    lambda c: _of_vit(c, False),
    _eva_config,
    lambda c: {"model_type": "eva"},
    _eva_rows,
    _vit_abstract,
    ignore=(EVA_IGNORES,),
)
TOWERS = (CLIP, OPENAI_CLIP, EVA)
