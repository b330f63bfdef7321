# SPDX-License-Identifier: Apache-2.0
"""SAM (arXiv 2304.02643): Meta's checkpoint file and Hugging Face folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, require_supported
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.sam_encoder import SamConfig

META_SAM_FILE = "sam_vit_h_4b8939.pth"  # the released file; recognized by its name, because it has no config


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
    width, small = v.get("hidden_size", SAM_VIT_B.width), SAM_VIT_B
    return SamConfig(
        v.get("image_size", 1024),
        v.get("patch_size", 16),
        width,
        v.get("num_hidden_layers", small.depth),
        v.get("num_attention_heads", small.num_heads),
        v.get("mlp_dim") or int(width * v.get("mlp_ratio", 4.0)),
        v.get("window_size", 14),
        tuple(v.get("global_attn_indexes", small.global_attn_indexes)),
        v.get("output_channels", 256),
        v.get("layer_norm_eps", 1e-6),
        p.get("mask_input_channels", 16),
        d.get("num_hidden_layers", 2),
        d.get("num_attention_heads", 8),
        d.get("mlp_dim", 2048),
        d.get("layer_norm_eps", 1e-6),
        1 + d.get("num_multimask_outputs", 3),
        d.get("iou_head_depth", 3),
        d.get("iou_head_hidden_dim", 256),
    )


def _sam_config_to_hf(c: SamConfig) -> dict:
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "hidden_size": c.width,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.num_heads,
            "mlp_dim": c.mlp_dim,
            "window_size": c.window_size,
            "global_attn_indexes": list(c.global_attn_indexes),
            "output_channels": c.prompt_embed_dim,
            "num_pos_feats": c.prompt_embed_dim // 2,
            "layer_norm_eps": c.norm_eps,
        },
        "prompt_encoder_config": {
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "hidden_size": c.prompt_embed_dim,
            "mask_input_channels": c.mask_input_channels,
            "layer_norm_eps": c.norm_eps,
        },
        "mask_decoder_config": {
            "hidden_size": c.prompt_embed_dim,
            "num_hidden_layers": c.decoder_depth,
            "num_attention_heads": c.decoder_num_heads,
            "mlp_dim": c.decoder_mlp_dim,
            "layer_norm_eps": c.decoder_norm_eps,
            "num_multimask_outputs": c.num_mask_tokens - 1,
            "iou_head_depth": c.iou_head_depth,
            "iou_head_hidden_dim": c.iou_head_mlp_dim,
        },
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
