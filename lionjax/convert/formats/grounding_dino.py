# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO (arXiv 2303.05499): the released .pth files of IDEA-Research, and Hugging Face folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats import bert, hf_vision
from lionjax.convert.formats.checkpoint_format import (
    CheckpointFormat,
    lionjax_config_format,
    lionjax_hf_config,
    read_lionjax_config,
)
from lionjax.convert.formats.config_fields import ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, require_equal, unsupported
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.grounding_dino import GroundingDinoConfig

# The released files; recognized by their names, because they have no config.
GROUNDING_DINO_FILES = ("groundingdino_swint_ogc.pth", "groundingdino_swinb_cogcoor.pth")

_SIZES = {"width": "d_model", "num_heads": "encoder_attention_heads", "mlp_dim": "encoder_ffn_dim"}
_DEPTHS = {"encoder_depth": "encoder_layers", "decoder_depth": "decoder_layers", "num_queries": "num_queries"}
_LEVELS = {"num_levels": "num_feature_levels", "num_points": "encoder_n_points", "max_text_len": "max_text_len"}
_OTHERS = {"norm_eps": "layer_norm_eps", "dropout": "dropout", "fusion_drop_path": "fusion_droppath"}
FIELDS = ConfigFields(
    _SIZES | _DEPTHS | _LEVELS | _OTHERS | {"position_temperature": "positional_embedding_temperature"},
    {"d_model": 256, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layers": 6, "decoder_layers": 6}
    | {"num_queries": 900, "num_feature_levels": 4, "encoder_n_points": 4, "max_text_len": 256}
    | {"layer_norm_eps": 1e-5, "dropout": 0.1, "fusion_droppath": 0.1, "positional_embedding_temperature": 20},
)
# Sizes of the decoder, which are those of the encoder here: {field of the decoder: field of the encoder}.
DECODER_SIZES = {
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_ffn_dim": "encoder_ffn_dim",
    "decoder_n_points": "encoder_n_points",
}
TABLE = ConfigTable(
    ("grounding-dino",),
    FIELDS,
    {"decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_n_points": 4},
    fixed={"activation_function": ("relu",), "position_embedding_type": ("sine",), "query_dim": (4,)}
    | dict.fromkeys(("two_stage", "embedding_init_target", "decoder_bbox_embed_share"), (True,))
    | {"two_stage_bbox_embed_share": (False,), "use_timm_backbone": (False, None), "backbone": (None,)},
    # Of training, and of the ways to compute the same.
    inert=("attention_dropout", "activation_dropout", "text_enhancer_dropout", "fusion_dropout", "auxiliary_loss")
    + ("class_cost", "bbox_cost", "giou_cost", "bbox_loss_coefficient", "giou_loss_coefficient", "focal_alpha")
    + ("disable_custom_kernels", "use_pretrained_backbone", "backbone_kwargs", "tie_word_embeddings"),
    parts=("backbone_config", "text_config"),
    aliases={"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"},
)
HF_DELIMITER_IDS, HF_INVERSE_SIGMOID_EPS = (101, 102, 1012, 1029), 1e-5  # fixed in transformers' code


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.grounding_dino import GroundingDinoConfig

    s = TABLE.read(hf_config)
    for decoder, encoder in DECODER_SIZES.items():
        require_equal(decoder, s[decoder], encoder, s[encoder])
    backbone = s["backbone_config"] or {"model_type": "swin"}
    swin = dataclasses.replace(
        hf_vision.swin_config_from_hf(backbone, "backbone_config"),
        image_size=None,
        output_stages=_output_stages(backbone),
    )
    fields = TABLE.read_fields(s)
    fields |= {name: float(fields[name]) for name in ("dropout", "fusion_drop_path", "position_temperature")}
    return GroundingDinoConfig(
        swin,
        dataclasses.replace(bert.config_from_hf(s["text_config"] or {}, "text_config"), pooler=False),
        **fields,
        delimiter_ids=HF_DELIMITER_IDS,
        inverse_sigmoid_eps=HF_INVERSE_SIGMOID_EPS,
        look_forward_twice=False,
    )


def _output_stages(backbone: Mapping[str, Any]) -> tuple[int, ...]:
    """The stages, from 0, whose maps the detector reads; in config.json they count from 1, and 0 is the embedding."""
    indices = backbone.get("out_indices", backbone.get("_out_indices"))
    names = backbone.get("out_features", backbone.get("_out_features"))
    if indices is None and names is not None:
        indices = [int(name.removeprefix("stage")) for name in names]
    indices = (2, 3, 4) if indices is None else tuple(indices)
    if not indices or min(indices) < 1:
        raise unsupported("backbone_config.out_indices", list(indices), ([2, 3, 4], [1, 2, 3, 4]))
    return tuple(index - 1 for index in indices)


def _config_to_hf(c: GroundingDinoConfig) -> dict:
    """Raises ValueError where transformers' class computes something else; see `_is_hf`."""
    if not _is_hf(c):
        raise ValueError("transformers has no such Grounding DINO")
    depth, indices = len(c.swin.depths), [stage + 1 for stage in c.swin.output_stages]
    stage_names = ["stem", *(f"stage{n}" for n in range(1, depth + 1))]
    backbone = hf_vision.SWIN.config_to_hf(c.swin) | {
        "out_indices": indices,
        "out_features": [stage_names[index] for index in indices],
        "stage_names": stage_names,
    }
    del backbone["image_size"], backbone["architectures"]
    text = bert.BERT.config_to_hf(c.text)
    del text["architectures"]
    # transformers takes an integer only.
    fields = FIELDS.write(c) | {"positional_embedding_temperature": int(c.position_temperature)}
    return {
        "architectures": ["GroundingDinoForObjectDetection"],
        "model_type": "grounding-dino",
        "backbone_config": backbone,
        "text_config": text,
        **{decoder: fields[encoder] for decoder, encoder in DECODER_SIZES.items()},
    } | fields


def _is_hf(c: Any) -> bool:
    """Whether transformers' class can be a model: these settings are fixed there, and its BERT has no pooler."""
    return (
        type(c).__name__ == "GroundingDinoConfig"
        and (c.inverse_sigmoid_eps, c.delimiter_ids) == (HF_INVERSE_SIGMOID_EPS, HF_DELIMITER_IDS)
        and not c.text.pooler
        and c.position_temperature == int(c.position_temperature)
    )


def _hf_weight_map(c: GroundingDinoConfig) -> tuple:
    from lionjax.models.vision import grounding_dino_weights

    return grounding_dino_weights.hf_weight_map(c)


def _original_weight_map(c: GroundingDinoConfig) -> tuple:
    from lionjax.models.vision import grounding_dino_weights

    return grounding_dino_weights.original_weight_map(c)


def _abstract_params(c: GroundingDinoConfig, mesh: Any = None) -> Params:
    import jax

    from lionjax.core import sharding
    from lionjax.models.vision.grounding_dino import GroundingDino, example_inputs

    def init(key, *inputs):
        return GroundingDino(c).init(key, *inputs)["params"]

    return sharding.abstract_params(init, jax.random.key(0), *example_inputs(c), mesh=mesh)


def _original_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_T

    return read_lionjax_config(hf_config) if "system" in hf_config else GROUNDING_DINO_SWIN_T


def _infer_original_config(c: GroundingDinoConfig, names: Collection[str]) -> Any:
    """`c`, of Swin-T, with the Swin-B of groundingdino_swinb_cogcoor.pth where the names have its further blocks."""
    from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_B, GROUNDING_DINO_SWIN_T

    is_swin_b = c == GROUNDING_DINO_SWIN_T and "backbone.0.layers.2.blocks.6.norm1.weight" in names
    return GROUNDING_DINO_SWIN_B if is_swin_b else c


GROUNDING_DINO = CheckpointFormat(
    "grounding-dino",
    ("grounding-dino",),
    _is_hf,
    _config_from_hf,
    _config_to_hf,
    _hf_weight_map,
    _abstract_params,
    ignore_patterns=(
        r"model\.backbone\..*\.relative_position_index(?#computed)",
        r"model\.backbone\.conv_encoder\.model\.(swin\.)?layernorm\..*(?#final norm of the backbone, not read)",
        r"model\.text_backbone\.(pooler\..*|embeddings\.position_ids)(?#not read by the detector)",
    ),
)
# With the original's names; also for models that transformers cannot be, such as one with the original's epsilon.
ORIGINAL_GROUNDING_DINO = lionjax_config_format(
    "groundingdino",
    "GroundingDinoConfig",
    config_from_hf=_original_config_from_hf,
    config_to_hf=lambda c: lionjax_hf_config(c, "groundingdino"),
    weight_map=_original_weight_map,
    abstract_params=_abstract_params,
    ignore_patterns=(r"label_enc\.weight(?#of training)", r"bert\.embeddings\.position_ids(?#position indices)"),
    infer_from_keys=_infer_original_config,
)
DETECTION_FORMATS = (GROUNDING_DINO, ORIGINAL_GROUNDING_DINO)
