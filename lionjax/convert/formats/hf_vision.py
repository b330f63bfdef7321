# SPDX-License-Identifier: Apache-2.0
"""Vision towers: CLIP (arXiv 2103.00020; Hugging Face's and OpenAI's names), EVA (arXiv 2211.07636) and Swin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import (
    CheckpointFormat,
    abstract_vision_params,
    class_format,
    lionjax_hf_config,
)
from lionjax.convert.formats.config_fields import BLOCK_SIZES, IMAGE_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, join
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.swin import SwinConfig
    from lionjax.models.vision.vit import ViTConfig

CLIP_FILE = "clip_vit_L.pth"  # LAVIS's file with OpenAI's names; recognized by its name, because it has no config


VIT_FIELDS = ConfigFields(
    IMAGE_SIZES | BLOCK_SIZES | {"norm_eps": "layer_norm_eps"},
    {
        "image_size": 224,
        "patch_size": 32,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    activation="hidden_act",
)
CLIP_VISION_TABLE = ConfigTable(
    ("clip_vision_model",),
    VIT_FIELDS,
    fixed={"num_channels": (3,)},
    inert=("attention_dropout", "dropout", "projection_dim", "vocab_size"),
)
# Only the vision tower of a CLIP is read. `vision_config_dict`, of earlier versions, replaces `vision_config`.
CLIP_TABLE = ConfigTable(
    ("clip",),
    inert=("text_config", "text_config_dict", "projection_dim", "logit_scale_init_value", "tie_word_embeddings"),
    parts=("vision_config", "vision_config_dict"),
)
CLIP_LAYERS = {"attention_biases": "qkvo", "patch_bias": False, "pre_layernorm": True, "post_layernorm": True}


def _matches_vit(c: ViTConfig, is_clip: bool) -> bool:
    return type(c).__name__ == "ViTConfig" and c.pre_layernorm == is_clip


def _vit_abstract_params(c: ViTConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.vit import ViT

    return abstract_vision_params(ViT(c), c.image_size, mesh)


def _clip_config_from_hf(hf_config: dict, path: str = "") -> Any:
    if hf_config.get("model_type", "") != "clip" and "vision_config" not in hf_config:
        return clip_vision_from_hf(CLIP_VISION_TABLE, hf_config, path)
    s = CLIP_TABLE.read(hf_config, path)
    part = "vision_config" if s["vision_config_dict"] is None else "vision_config_dict"
    return clip_vision_from_hf(CLIP_VISION_TABLE, s[part], join(path, part))


def clip_vision_from_hf(table: ConfigTable, hf_config: dict | None, path: str) -> Any:
    """The ViTConfig of a CLIP vision tower whose config, at `path` of a config.json, has the fields of `table`."""
    from lionjax.models.vision.vit import ViTConfig

    return ViTConfig(**table.read_fields(table.read(hf_config, path)), **CLIP_LAYERS)


def _clip_config_to_hf(c: ViTConfig) -> dict:
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"} | VIT_FIELDS.write(c)


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

    return dataclasses.replace(CLIP_VIT_L, image_size=224)


def _infer_openai_clip_config(c: ViTConfig, names: Collection[str]) -> Any:
    """`c` with the depth of the file, and post_layernorm where it has ln_post: LAVIS omits the last layer and norm."""
    block = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\..*")
    depth = 1 + max((int(match[1]) for name in names if (match := block.fullmatch(name))), default=0)
    return dataclasses.replace(c, depth=depth, post_layernorm="ln_post.weight" in names)


def _openai_clip_weight_map(c: ViTConfig) -> tuple:
    from lionjax.models.vision import vit

    return vit.openai_clip_weight_map(c)


EVA_IGNORE_PATTERN = r"(blocks\.39\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.)).*(?#40th block and heads)"
# LAVIS runs both towers without their last block and what follows it.
LAVIS_IGNORE_PATTERN = (
    r"visual_encoder\.(blocks\.39\.|transformer\.resblocks\.23\.|(?!cls_token|pos_embed|patch_embed\.|blocks\.|"
    r"class_embedding|positional_embedding|conv1\.|ln_pre\.|transformer\.)).*(?#last block and heads)"
)

CLIP = CheckpointFormat(
    "clip",
    ("clip", "clip_vision_model"),
    lambda c: _matches_vit(c, True),
    _clip_config_from_hf,
    _clip_config_to_hf,
    _clip_weight_map,
    _vit_abstract_params,
    # Only the vision tower of a CLIP is read.
    ignore_patterns=(
        r"vision_model\.embeddings\.position_ids(?#position indices)",
        r"((text_model|(text|visual)_projection)\..*|logit_scale)(?#text tower and contrastive projections)",
    ),
    base_model_prefix="vision_model.",
    module_names=((r"^vision_model\.", ""),),
)
# Read only; written as CLIP, with Hugging Face's names.
OPENAI_CLIP = CheckpointFormat(
    "openai_clip",
    (),
    lambda c: False,
    _openai_clip_config_from_hf,
    _clip_config_to_hf,
    _openai_clip_weight_map,
    _vit_abstract_params,
    ignore_patterns=(r"proj(?#contrastive projection)",),
    inner_prefix="visual.",
    infer_from_keys=_infer_openai_clip_config,
)
EVA = CheckpointFormat(
    "eva",
    (),
    lambda c: _matches_vit(c, False),
    _eva_config_from_hf,
    lambda c: lionjax_hf_config(c, "eva"),
    _eva_weight_map,
    _vit_abstract_params,
    ignore_patterns=(EVA_IGNORE_PATTERN,),
)
VISION_FORMATS = (CLIP, OPENAI_CLIP, EVA)


_SWIN_SIZES = {"width": "embed_dim", "window_size": "window_size"}
_SWIN_RATIOS = {"mlp_ratio": "mlp_ratio", "drop_path_rate": "drop_path_rate"}
SWIN_FIELDS = ConfigFields(
    IMAGE_SIZES | _SWIN_SIZES | _SWIN_RATIOS | {"norm_eps": "layer_norm_eps"},
    {"image_size": 224, "patch_size": 4, "embed_dim": 96, "window_size": 7}
    | {"mlp_ratio": 4.0, "drop_path_rate": 0.1, "layer_norm_eps": 1e-5, "hidden_act": "gelu"},
    activation="hidden_act",
)
SWIN_TABLE = ConfigTable(
    ("swin",),
    SWIN_FIELDS,
    {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "qkv_bias": True},
    fixed={"use_absolute_embeddings": (False, None), "num_channels": (3,)},
    # num_layers and hidden_size follow from depths and embed_dim; the others are for heads and backbones.
    inert=("hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "path_norm", "num_layers")
    + ("hidden_size", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
    + ("tie_word_embeddings",),
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
)


def swin_config_from_hf(hf_config: dict, path: str = "") -> Any:
    """The SwinConfig of a config.json, or of the nested config at `path` of one."""
    from lionjax.models.vision.swin import SwinConfig

    s = SWIN_TABLE.read(hf_config, path)
    fields = SWIN_TABLE.read_fields(s)
    fields |= {name: float(fields[name]) for name in ("mlp_ratio", "drop_path_rate")}
    return SwinConfig(
        **fields,
        depths=tuple(s["depths"]),
        num_heads=tuple(s["num_heads"]),
        attention_biases="qkvo" if s["qkv_bias"] else "o",
    )


def _swin_config_to_hf(c: SwinConfig) -> dict:
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "depths": list(c.depths),
        "num_heads": list(c.num_heads),
        "qkv_bias": "q" in c.attention_biases,
    } | SWIN_FIELDS.write(c)


def _swin_weight_map(c: SwinConfig) -> tuple:
    from lionjax.core.weight_map import with_prefix
    from lionjax.models.vision import swin

    return with_prefix("swin.", "", swin.hf_weight_map(c))


def _swin_abstract_params(c: SwinConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.swin import Swin

    return abstract_vision_params(Swin(c), c.image_size, mesh)


SWIN_KEY_PATTERNS = (  # module names since transformers 5 -> names of the files
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
SWIN = class_format(
    "swin",
    "SwinConfig",
    (swin_config_from_hf, _swin_config_to_hf, _swin_weight_map, _swin_abstract_params),
    # Older files hold the relative position index; many have a head for ImageNet or masked image modeling.
    ignore_patterns=(
        r"swin\.encoder\..*\.relative_position_index(?#computed)",
        r"swin\.embeddings\.mask_token(?#for training)",
        r"(classifier|decoder)\..*(?#heads)",
    ),
    base_model_prefix="swin.",
    key_patterns=SWIN_KEY_PATTERNS,
)
