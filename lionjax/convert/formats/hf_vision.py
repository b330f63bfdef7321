# SPDX-License-Identifier: Apache-2.0
"""Published ViTs: CLIP's as Hugging Face's folder and as OpenAI's names, and EVA's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_vision_params, require_supported
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.swin import SwinConfig
    from lionjax.models.vision.vit import ViTConfig

CLIP_FILE = "clip_vit_L.pth"  # LAVIS's, with OpenAI's names; it tells nothing of itself


def _matches_vit(c: ViTConfig, is_clip: bool) -> bool:
    return type(c).__name__ == "ViTConfig" and c.pre_layernorm == is_clip


def _vit_abstract_params(c: ViTConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.vit import ViT

    return abstract_vision_params(ViT(c), c.image_size, mesh)


def _clip_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.vit import ViTConfig

    hf_config = hf_config.get("vision_config", hf_config)
    act = hf_config.get("hidden_act", "quick_gelu")
    require_supported(act in ("quick_gelu", "gelu"), f"hidden_act {act!r}", "quick_gelu or gelu")
    return ViTConfig(
        hf_config.get("image_size", 224),
        hf_config.get("patch_size", 32),
        hf_config.get("hidden_size", 768),
        hf_config.get("num_hidden_layers", 12),
        hf_config.get("num_attention_heads", 12),
        hf_config.get("intermediate_size", 3072),
        hf_config.get("layer_norm_eps", 1e-5),
        act,
        attention_biases="qkvo",
        patch_bias=False,
        pre_layernorm=True,
        post_layernorm=True,
    )


def _clip_config_to_hf(c: ViTConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": c.activation,
    }


def _clip_weight_map(c: ViTConfig) -> tuple:
    from lionjax.core.weight_map import with_prefix
    from lionjax.models.vision import vit

    return with_prefix("vision_model.", "", vit.clip_weight_map(c))


def _eva_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.vit import EVA_VIT_G

    return EVA_VIT_G


def _eva_weight_map(c: ViTConfig) -> tuple:
    from lionjax.models.vision import vit

    return vit.eva_weight_map(c)


def _openai_clip_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.vit import CLIP_VIT_L

    return dataclasses.replace(CLIP_VIT_L, image=224)


def _infer_openai_clip_config(c: ViTConfig, names: Collection[str]) -> Any:
    """How many layers there are, and whether the norm behind them is: LAVIS runs one less, without."""
    block = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\..*")
    depth = 1 + max((int(found[1]) for name in names if (found := block.fullmatch(name))), default=0)
    return dataclasses.replace(c, depth=depth, post_layernorm="ln_post.weight" in names)


def _openai_clip_weight_map(c: ViTConfig) -> tuple:
    from lionjax.models.vision import vit

    return vit.openai_clip_weight_map(c)


EVA_IGNORE_PATTERN = r"(blocks\.39\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.)).*(?#a 40th block and heads)"
# LAVIS runs either tower without its last block and what is behind it.
LAVIS_IGNORE_PATTERN = (
    r"visual_encoder\.(blocks\.39\.|transformer\.resblocks\.23\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.|"
    r"class_embedding|positional_embedding|conv1\.|ln_pre\.|transformer\.)).*(?#a last block and heads)"
)

CLIP = CheckpointFormat(
    "clip",
    ("clip", "clip_vision_model"),
    lambda c: _matches_vit(c, True),
    _clip_config_from_hf,
    _clip_config_to_hf,
    _clip_weight_map,
    _vit_abstract_params,
    # Of a whole CLIP the vision tower is read.
    ignore_patterns=(
        r"vision_model\.embeddings\.position_ids(?#they only count)",
        r"((text_model|(text|visual)_projection)\..*|logit_scale)(?#of the comparison with texts)",
    ),
    base_model_prefix="vision_model.",
)
# Written again as Hugging Face's.
OPENAI_CLIP = CheckpointFormat(
    "openai_clip",
    (),
    lambda c: False,
    _openai_clip_config_from_hf,
    _clip_config_to_hf,
    _openai_clip_weight_map,
    _vit_abstract_params,
    ignore_patterns=(r"proj(?#of the comparison with texts)",),
    inner_prefix="visual.",
    infer_from_keys=_infer_openai_clip_config,
)
EVA = CheckpointFormat(
    "eva",
    (),
    lambda c: _matches_vit(c, False),
    _eva_config_from_hf,
    lambda c: {"model_type": "eva"},
    _eva_weight_map,
    _vit_abstract_params,
    ignore_patterns=(EVA_IGNORE_PATTERN,),
)
VISION_FORMATS = (CLIP, OPENAI_CLIP, EVA)


def _swin_config_from_hf(hf_config: dict) -> Any:
    """Where a setting is missing transformers means that of the tiny Swin."""
    from lionjax.models.vision.swin import SwinConfig

    act, sizes = hf_config.get("hidden_act", "gelu"), (hf_config.get("image_size", 224), hf_config.get("patch_size", 4))
    require_supported(act in ("gelu", "relu"), f"hidden_act {act!r}", "gelu or relu")
    require_supported(all(type(size) is int for size in sizes), f"image and patch sizes {sizes}", "squares")
    require_supported(not hf_config.get("use_absolute_embeddings"), "absolute positions", "a Swin with relative ones")
    return SwinConfig(
        *sizes,
        hf_config.get("embed_dim", 96),
        tuple(hf_config.get("depths", (2, 2, 6, 2))),
        tuple(hf_config.get("num_heads", (3, 6, 12, 24))),
        hf_config.get("window_size", 7),
        float(hf_config.get("mlp_ratio", 4.0)),
        "qkvo" if hf_config.get("qkv_bias", True) else "o",
        hf_config.get("layer_norm_eps", 1e-5),
        act,
        float(hf_config.get("drop_path_rate", 0.1)),
    )


def _swin_config_to_hf(c: SwinConfig) -> dict:
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "embed_dim": c.width,
        "depths": list(c.depths),
        "num_heads": list(c.num_heads),
        "window_size": c.window_size,
        "mlp_ratio": c.mlp_ratio,
        "qkv_bias": "q" in c.attention_biases,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": c.activation,
        "drop_path_rate": c.drop_path_rate,
    }


def _swin_weight_map(c: SwinConfig) -> tuple:
    from lionjax.core.weight_map import with_prefix
    from lionjax.models.vision import swin

    return with_prefix("swin.", "", swin.hf_weight_map(c))


def _swin_abstract_params(c: SwinConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.swin import Swin

    return abstract_vision_params(Swin(c), c.image_size, mesh)


SWIN = CheckpointFormat(
    "swin",
    ("swin",),
    lambda c: type(c).__name__ == "SwinConfig",
    _swin_config_from_hf,
    _swin_config_to_hf,
    _swin_weight_map,
    _swin_abstract_params,
    # Older files hold the index of places, many a head for ImageNet's classes or for hidden patches.
    ignore_patterns=(
        r"swin\.encoder\..*\.relative_position_index(?#it is computed)",
        r"swin\.embeddings\.mask_token(?#for training)",
        r"(classifier|decoder)\..*(?#heads)",
    ),
    base_model_prefix="swin.",
)
