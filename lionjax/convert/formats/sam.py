# SPDX-License-Identifier: Apache-2.0
"""SAM (arXiv 2304.02643): Meta's checkpoint file and Hugging Face folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, require_supported
from lionjax.convert.formats.config_fields import IMAGE_SIZES, ConfigFields
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.sam_encoder import SamConfig

META_SAM_FILE = "sam_vit_h_4b8939.pth"  # the released file; recognized by its name, because it has no config


_LAYERS = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
ENCODER_FIELDS = ConfigFields(
    IMAGE_SIZES
    | _LAYERS
    | {"width": "hidden_size", "window_size": "window_size"}
    | {"mlp_dim": "mlp_dim", "prompt_embed_dim": "output_channels"}
)
PROMPT_FIELDS = ConfigFields({"mask_input_channels": "mask_input_channels"})
DECODER_FIELDS = ConfigFields(
    {f"decoder_{name}": hf_name for name, hf_name in (_LAYERS | {"mlp_dim": "mlp_dim"}).items()}
    | {"iou_head_depth": "iou_head_depth", "iou_head_mlp_dim": "iou_head_hidden_dim"}
)


def _sam_config_from_hf(hf_config: dict) -> Any:
    """The SAM config of a config.json; missing settings have transformers' defaults, those of SAM ViT-B."""
    from lionjax.models.vision.sam_encoder import SAM_VIT_B, SamConfig

    v, p, d = (hf_config.get(f"{part}_config") or {} for part in ("vision", "prompt_encoder", "mask_decoder"))
    is_standard = v.get("use_abs_pos", True) and v.get("use_rel_pos", True) and v.get("qkv_bias", True)
    require_supported(
        is_standard,
        "use_abs_pos, use_rel_pos or qkv_bias false in its image encoder",
        "an image encoder with absolute and relative positions and biases",
    )
    downsample_rate = d.get("attention_downsample_rate", 2)
    require_supported(downsample_rate == 2, f"attention_downsample_rate {downsample_rate}", "2")
    if not v.get("mlp_dim"):
        v = v | {"mlp_dim": int(v.get("hidden_size", SAM_VIT_B.width) * v.get("mlp_ratio", 4.0))}
    return SamConfig(
        **ENCODER_FIELDS.read(v, ENCODER_FIELDS.write(SAM_VIT_B)),
        **PROMPT_FIELDS.read(p, PROMPT_FIELDS.write(SAM_VIT_B)),
        **DECODER_FIELDS.read(d, DECODER_FIELDS.write(SAM_VIT_B) | {"layer_norm_eps": 1e-6}),
        global_attn_indexes=tuple(v.get("global_attn_indexes", SAM_VIT_B.global_attn_indexes)),
        num_mask_tokens=1 + d.get("num_multimask_outputs", 3),
    )


def _sam_config_to_hf(c: SamConfig) -> dict:
    vision_config = ENCODER_FIELDS.write(c) | {
        "global_attn_indexes": list(c.global_attn_indexes),
        "num_pos_feats": c.prompt_embed_dim // 2,
    }
    prompt_encoder_config = PROMPT_FIELDS.write(c) | {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_size": c.prompt_embed_dim,
        "layer_norm_eps": c.norm_eps,
    }
    mask_decoder_config = DECODER_FIELDS.write(c) | {
        "hidden_size": c.prompt_embed_dim,
        "num_multimask_outputs": c.num_mask_tokens - 1,
    }
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": vision_config,
        "prompt_encoder_config": prompt_encoder_config,
        "mask_decoder_config": mask_decoder_config,
    }


def _sam_weight_map(c: SamConfig) -> tuple:
    from lionjax.models.vision import sam_decoder

    return sam_decoder.hf_weight_map(c)


def _sam_abstract_params(c: SamConfig, mesh: Any = None) -> Params:
    import jax

    from lionjax.core import sharding
    from lionjax.models.vision.sam_decoder import Sam

    image = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), "float32")
    box, mask = (
        jax.ShapeDtypeStruct((1, 1, 4), "float32"),
        jax.ShapeDtypeStruct((1, 4 * c.grid_size, 4 * c.grid_size), "float32"),
    )

    def init(key, image, box, mask):
        return Sam(c).init(key, image, None, None, box, mask)["params"]

    return sharding.abstract_params(init, jax.random.key(0), image, box, mask, mesh=mesh)


def _meta_sam_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.sam_encoder import SAM_VIT_H

    return SAM_VIT_H


def _meta_sam_weight_map(c: SamConfig) -> tuple:
    from lionjax.models.vision import sam_decoder

    return sam_decoder.original_weight_map(c)


SAM = CheckpointFormat(
    "sam",
    ("sam",),
    lambda c: type(c).__name__ == "SamConfig",
    _sam_config_from_hf,
    _sam_config_to_hf,
    _sam_weight_map,
    _sam_abstract_params,
)


# Read only; written as SAM, with Hugging Face's names.
SEGMENT_ANYTHING = CheckpointFormat(
    "segment_anything",
    (),
    lambda c: False,
    _meta_sam_config_from_hf,
    _sam_config_to_hf,
    _meta_sam_weight_map,
    _sam_abstract_params,
    ignore_patterns=(r"pixel_(mean|std)(?#image normalization)",),
)
