# SPDX-License-Identifier: Apache-2.0
"""SAM (arXiv 2304.02643): Meta's checkpoint file and Hugging Face folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, class_format
from lionjax.convert.formats.config_fields import IMAGE_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, require_equal
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.sam_encoder import SamConfig

META_SAM_FILE = "sam_vit_h_4b8939.pth"  # the released file; recognized by its name, because it has no config


_LAYERS = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
ENCODER_FIELDS = ConfigFields(
    IMAGE_SIZES
    | _LAYERS
    | {"width": "hidden_size", "window_size": "window_size"}
    | {"mlp_dim": "mlp_dim", "prompt_embed_dim": "output_channels"},
    {"image_size": 1024, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"window_size": 14, "output_channels": 256, "layer_norm_eps": 1e-6},
)
PROMPT_FIELDS = ConfigFields({"mask_input_channels": "mask_input_channels"}, {"mask_input_channels": 16})
DECODER_FIELDS = ConfigFields(
    {f"decoder_{name}": hf_name for name, hf_name in (_LAYERS | {"mlp_dim": "mlp_dim"}).items()}
    | {"iou_head_depth": "iou_head_depth", "iou_head_mlp_dim": "iou_head_hidden_dim"},
    {"num_hidden_layers": 2, "num_attention_heads": 8, "mlp_dim": 2048, "layer_norm_eps": 1e-6}
    | {"iou_head_depth": 3, "iou_head_hidden_dim": 256},
)
GELU = ("gelu", "gelu_python")
ENCODER_TABLE = ConfigTable(
    ("sam_vision_model",),
    ENCODER_FIELDS,
    {"mlp_ratio": 4.0, "global_attn_indexes": (2, 5, 8, 11), "num_pos_feats": None},
    fixed=dict.fromkeys(("use_abs_pos", "use_rel_pos", "qkv_bias"), (True,))
    # The norms behind the blocks have an epsilon of 1e-6 in transformers whatever config.json says.
    | {"hidden_act": GELU, "num_channels": (3,), "layer_norm_eps": (1e-6,)},
    inert=("attention_dropout", "dropout", "projection_dim", "scale"),
)
PROMPT_TABLE = ConfigTable(
    ("sam_prompt_encoder",),
    PROMPT_FIELDS,
    {"hidden_size": 256, "image_size": 1024, "patch_size": 16, "image_embedding_size": None},
    fixed={"hidden_act": GELU, "num_point_embeddings": (4,), "layer_norm_eps": (1e-6,)},
)
DECODER_TABLE = ConfigTable(
    ("sam_mask_decoder",),
    DECODER_FIELDS,
    {"hidden_size": 256, "num_multimask_outputs": 3},
    fixed={"hidden_act": ("relu",), "attention_downsample_rate": (2,)},
)
SAM_TABLE = ConfigTable(
    ("sam",), inert=("tie_word_embeddings",), parts=("vision_config", "prompt_encoder_config", "mask_decoder_config")
)


def _sam_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.sam_encoder import SamConfig

    s = SAM_TABLE.read(hf_config)
    tables = (ENCODER_TABLE, PROMPT_TABLE, DECODER_TABLE)
    v, p, d = (table.read(s[part], part) for table, part in zip(tables, SAM_TABLE.parts))
    if v["mlp_dim"] is None:
        v["mlp_dim"] = int(v["hidden_size"] * v["mlp_ratio"])
    for field in ("image_size", "patch_size"):
        require_equal(f"prompt_encoder_config.{field}", p[field], f"vision_config.{field}", v[field])
    for part, settings in (("prompt_encoder_config", p), ("mask_decoder_config", d)):
        channels = v["output_channels"]
        require_equal(f"{part}.hidden_size", settings["hidden_size"], "vision_config.output_channels", channels)
    grid_path, grid = "prompt_encoder_config.image_embedding_size", v["image_size"] // v["patch_size"]
    require_equal(grid_path, p["image_embedding_size"], "vision_config.image_size / patch_size", grid)
    half = v["output_channels"] // 2
    require_equal("vision_config.num_pos_feats", v["num_pos_feats"], "half of vision_config.output_channels", half)
    return SamConfig(
        **ENCODER_TABLE.read_fields(v),
        **PROMPT_TABLE.read_fields(p),
        **DECODER_TABLE.read_fields(d),
        global_attn_indexes=tuple(v["global_attn_indexes"]),
        num_mask_tokens=1 + d["num_multimask_outputs"],
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


SAM = class_format("sam", "SamConfig", (_sam_config_from_hf, _sam_config_to_hf, _sam_weight_map, _sam_abstract_params))


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
