# SPDX-License-Identifier: Apache-2.0
"""SAM by itself: Meta's checkpoint file and Hugging Face's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, refuse_unless
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.sam_encoder import SamConfig

META_SAM = "sam_vit_h_4b8939.pth"  # as everybody calls it; it tells nothing of itself


def _sam_config(s: dict) -> Any:
    """Where a setting is missing transformers means that of the small SAM."""
    from lionjax.models.vision.sam_encoder import SAM_VIT_B, SamConfig

    v, p, d = (s.get(f"{part}_config") or {} for part in ("vision", "prompt_encoder", "mask_decoder"))
    kept = v.get("use_abs_pos", True) and v.get("use_rel_pos", True) and v.get("qkv_bias", True)
    refuse_unless(kept, "no positions or no biases in its image encoder", "a SAM with them")
    refuse_unless(d.get("attention_downsample_rate", 2) == 2, "another inner width of its decoder's attention", "half")
    width, small = v.get("hidden_size", SAM_VIT_B.width), SAM_VIT_B
    return SamConfig(
        v.get("image_size", 1024),
        v.get("patch_size", 16),
        width,
        v.get("num_hidden_layers", small.depth),
        v.get("num_attention_heads", small.heads),
        v.get("mlp_dim") or int(width * v.get("mlp_ratio", 4.0)),
        v.get("window_size", 14),
        tuple(v.get("global_attn_indexes", small.global_layers)),
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


def _sam_settings(c: SamConfig) -> dict:
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "image_size": c.image,
            "patch_size": c.patch,
            "hidden_size": c.width,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads,
            "mlp_dim": c.hidden,
            "window_size": c.window,
            "global_attn_indexes": list(c.global_layers),
            "output_channels": c.channels,
            "num_pos_feats": c.channels // 2,
            "layer_norm_eps": c.eps,
        },
        "prompt_encoder_config": {
            "image_size": c.image,
            "patch_size": c.patch,
            "hidden_size": c.channels,
            "mask_input_channels": c.mask_channels,
            "layer_norm_eps": c.eps,
        },
        "mask_decoder_config": {
            "hidden_size": c.channels,
            "num_hidden_layers": c.decoder_depth,
            "num_attention_heads": c.decoder_heads,
            "mlp_dim": c.decoder_hidden,
            "layer_norm_eps": c.decoder_eps,
            "num_multimask_outputs": c.masks - 1,
            "iou_head_depth": c.iou_depth,
            "iou_head_hidden_dim": c.iou_hidden,
        },
    }


def _sam_rows(c: SamConfig) -> tuple:
    from lionjax.models.vision import sam_decoder

    return sam_decoder.hugging_face_rows(c)


def _sam_abstract(c: SamConfig, mesh: Any = None) -> Params:
    import jax

    from lionjax.core import sharding
    from lionjax.models.vision.sam_decoder import Sam

    image = jax.ShapeDtypeStruct((1, c.image, c.image, 3), "float32")
    box, mask = (
        jax.ShapeDtypeStruct((1, 1, 4), "float32"),
        jax.ShapeDtypeStruct((1, 4 * c.grid, 4 * c.grid), "float32"),
    )

    def init(key, image, box, mask):
        return Sam(c).init(key, image, None, None, box, mask)["params"]

    return sharding.abstract(init, jax.random.key(0), image, box, mask, mesh=mesh)


def _meta_sam_config(s: dict) -> Any:
    from lionjax.models.vision.sam_encoder import SAM_VIT_H

    return SAM_VIT_H


def _meta_sam_rows(c: SamConfig) -> tuple:
    from lionjax.models.vision import sam_decoder

    return sam_decoder.torch_rows(c)


SAM = Published(
    "sam", ("sam",), lambda c: type(c).__name__ == "SamConfig", _sam_config, _sam_settings, _sam_rows, _sam_abstract
)


# Written again as Hugging Face's.
SEGMENT_ANYTHING = Published(
    "segment_anything",
    (),
    lambda c: False,
    _meta_sam_config,
    _sam_settings,
    _meta_sam_rows,
    _sam_abstract,
    ignore=(r"pixel_(mean|std)(?#those of all pictures)",),
)
