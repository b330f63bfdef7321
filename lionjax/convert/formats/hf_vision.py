# SPDX-License-Identifier: Apache-2.0
"""Published ViTs: CLIP's as Hugging Face's folder and as OpenAI's names, and EVA's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, abstract_of_picture, refuse_unless
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.swin import SwinConfig
    from lionjax.models.vision.vit import ViTConfig

CLIP_FILE = "clip_vit_L.pth"  # LAVIS's, with OpenAI's names; it tells nothing of itself


def _of_vit(c: ViTConfig, clip: bool) -> bool:
    return type(c).__name__ == "ViTConfig" and c.norm_before == clip


def _vit_abstract(c: ViTConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.vit import ViT

    return abstract_of_picture(ViT(c), c.image, mesh)


def _clip_config(s: dict) -> Any:
    from lionjax.models.vision.vit import ViTConfig

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


def _clip_settings(c: ViTConfig) -> dict:
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


def _clip_rows(c: ViTConfig) -> tuple:
    from lionjax.core.weight_map import under
    from lionjax.models.vision import vit

    return under("vision_model.", "", vit.clip_rows(c))


def _eva_config(s: dict) -> Any:
    from lionjax.models.vision.vit import EVA_VIT_G

    return EVA_VIT_G


def _eva_rows(c: ViTConfig) -> tuple:
    from lionjax.models.vision import vit

    return vit.eva_rows(c)


def _openai_config(s: dict) -> Any:
    from lionjax.models.vision.vit import CLIP_VIT_L

    return dataclasses.replace(CLIP_VIT_L, image=224)


def _openai_told(c: ViTConfig, names: Collection[str]) -> Any:
    """How many layers there are, and whether the norm behind them is: LAVIS runs one less, without."""
    block = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\..*")
    depth = 1 + max((int(found[1]) for name in names if (found := block.fullmatch(name))), default=0)
    return dataclasses.replace(c, depth=depth, norm_after="ln_post.weight" in names)


def _openai_rows(c: ViTConfig) -> tuple:
    from lionjax.models.vision import vit

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


def _swin_config(s: dict) -> Any:
    """Where a setting is missing transformers means that of the tiny Swin."""
    from lionjax.models.vision.swin import SwinConfig

    act, sizes = s.get("hidden_act", "gelu"), (s.get("image_size", 224), s.get("patch_size", 4))
    refuse_unless(act in ("gelu", "relu"), f"hidden_act {act!r}", "gelu or relu")
    refuse_unless(all(type(size) is int for size in sizes), f"image and patch sizes {sizes}", "squares")
    refuse_unless(not s.get("use_absolute_embeddings"), "absolute positions", "a Swin with relative ones")
    return SwinConfig(
        *sizes,
        s.get("embed_dim", 96),
        tuple(s.get("depths", (2, 2, 6, 2))),
        tuple(s.get("num_heads", (3, 6, 12, 24))),
        s.get("window_size", 7),
        float(s.get("mlp_ratio", 4.0)),
        "qkvo" if s.get("qkv_bias", True) else "o",
        s.get("layer_norm_eps", 1e-5),
        act,
        float(s.get("drop_path_rate", 0.1)),
    )


def _swin_settings(c: SwinConfig) -> dict:
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": c.image,
        "patch_size": c.patch,
        "embed_dim": c.width,
        "depths": list(c.depths),
        "num_heads": list(c.heads),
        "window_size": c.window,
        "mlp_ratio": c.ratio,
        "qkv_bias": "q" in c.biases,
        "layer_norm_eps": c.eps,
        "hidden_act": c.activation,
        "drop_path_rate": c.drop_path,
    }


def _swin_rows(c: SwinConfig) -> tuple:
    from lionjax.core.weight_map import under
    from lionjax.models.vision import swin

    return under("swin.", "", swin.hugging_face_rows(c))


def _swin_abstract(c: SwinConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.swin import Swin

    return abstract_of_picture(Swin(c), c.image, mesh)


SWIN = Published(
    "swin",
    ("swin",),
    lambda c: type(c).__name__ == "SwinConfig",
    _swin_config,
    _swin_settings,
    _swin_rows,
    _swin_abstract,
    # Older files hold the index of places, many a head for ImageNet's classes or for hidden patches.
    ignore=(
        r"swin\.encoder\..*\.relative_position_index(?#it is computed)",
        r"swin\.embeddings\.mask_token(?#for training)",
        r"(classifier|decoder)\..*(?#heads)",
    ),
    base="swin.",
)
