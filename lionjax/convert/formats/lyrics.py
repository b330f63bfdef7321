# SPDX-License-Identifier: Apache-2.0
"""Lyrics (arXiv 2312.05278): the released folder of its second stage, and its first stage under that code's names.

The released config.json has BLIP-2's model_type with two more parts, `detection_config` and `ram_config`. Sizes that
its code takes from other files are those of the release: RAM's tagging head, and BERT-base in the detector.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import (
    CheckpointFormat,
    lionjax_config_format,
    lionjax_hf_config,
    read_lionjax_config,
)
from lionjax.convert.formats.config_fields import ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, require_equal
from lionjax.convert.formats.hf_vision import VIT_FIELDS
from lionjax.convert.formats.hf_vlm import (
    BLIP2_TABLE,
    BLIP2_VISION_TABLE,
    QFORMER_FIELDS,
    QFORMER_TABLE,
    language_config_from_hf,
    language_config_to_hf,
)

if TYPE_CHECKING:
    from lionjax.models.connectors.mqformer import MQFormerConfig
    from lionjax.models.vision.grounding_dino import GroundingDinoConfig
    from lionjax.models.vision.ram import RamConfig
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

IGNORE_PATTERNS = (
    r"ram\.(tag_encoder|text_decoder)\..*(?#not used in tagging)",
    r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
)
DETECTION_PART = "detection_config"  # a part of config.json that only Lyrics has
STAGE1_CLASS = "LyricsQFromerForPretrain"  # the released code's name, in `architectures`
TABLE = dataclasses.replace(
    BLIP2_TABLE,
    computed={"num_query_tokens": 96, "image_text_hidden_size": 256},
    inert=("use_decoder_only_language_model", "tie_word_embeddings"),
    parts=(*BLIP2_TABLE.parts, DETECTION_PART, "ram_config"),
    aliases={},
)
VISION_TABLE = dataclasses.replace(BLIP2_VISION_TABLE, computed=BLIP2_VISION_TABLE.computed | {"layer_norm_eps": 1e-5})
MQ_FORMER_FIELDS = dataclasses.replace(
    QFORMER_FIELDS,
    names=QFORMER_FIELDS.names
    | {
        "region_width": "detection_encoder_hidden_size",
        "num_query_tokens": "query_length",
        "num_grounding_queries": "num_dino_query_tokens",
    },
    defaults=QFORMER_FIELDS.defaults
    | {"detection_encoder_hidden_size": 256, "query_length": 96, "num_dino_query_tokens": 64},
)
MQ_FORMER_TABLE = dataclasses.replace(QFORMER_TABLE, fields=MQ_FORMER_FIELDS, computed={"num_vit_query_tokens": 32})
DETECTOR_FIELDS = ConfigFields(
    {
        "width": "hidden_dim",
        "num_heads": "nheads",
        "mlp_dim": "dim_feedforward",
        "encoder_depth": "enc_layers",
        "decoder_depth": "dec_layers",
        "num_queries": "num_queries",
        "num_levels": "num_feature_levels",
        "num_points": "enc_n_points",
        "max_text_len": "max_text_len",
        "position_temperature": "pe_temperatureh",
        "dropout": "dropout",
        "fusion_drop_path": "fusion_droppath",
    },
    {"hidden_dim": 256, "nheads": 8, "dim_feedforward": 2048, "enc_layers": 6, "dec_layers": 6, "num_queries": 900}
    | {"num_feature_levels": 4, "enc_n_points": 4, "max_text_len": 256, "pe_temperatureh": 20.0, "dropout": 0.0}
    | {"fusion_droppath": 0.1},
)
SWIN_NAMES = {"width": "embed_dim"} | {name: name for name in ("depths", "num_heads", "window_size")}
DETECTOR_SWIN = ConfigFields(
    SWIN_NAMES | {name: name for name in ("patch_size", "mlp_ratio", "drop_path_rate")},
    {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7}
    | {"patch_size": 4, "mlp_ratio": 4.0, "drop_path_rate": 0.2},
)
RAM_SWIN = ConfigFields(
    SWIN_NAMES | {"image_size": "image_size"},
    {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12, "image_size": 384},
)
DETECTOR_TABLE = ConfigTable(
    ("blip_2_detection_model",),
    DETECTOR_FIELDS,
    computed={**DETECTOR_SWIN.defaults, "pe_temperaturew": 20.0, "dec_n_points": 4},
    fixed={
        "position_embedding": ("sine",),
        "return_interm_indices": ([1, 2, 3],),
        "out_indices": ([1, 2, 3],),
        "num_unicoder_layers": (0,),
        "pre_norm": (False,),
        "iter_update": (True,),
        "query_dim": (4,),
        "num_patterns": (0,),
        "two_stage_type": ("standard",),
        "two_stage_bbox_embed_share": (False,),
        "two_stage_class_embed_share": (False,),
        "transformer_activation": ("relu",),
        "return_intermediate_dec": (True,),
        "dec_pred_bbox_embed_share": (True,),
        "embed_init_tgt": (True,),
        "text_encoder_type": ("bert-base-uncased",),
        "use_text_cross_attention": (True,),
        "sub_sentence_present": (True,),
        "in_chans": (3,),
        "num_layers": (4,),
        "qkv_bias": (True,),
        "qk_scale": (None,),
        "ape": (False,),
        "patch_norm": (True,),
        # Swin-T's released weights do not fit a last stage with dilation, the default of the code.
        "dilation": (False,),
    },
    inert=(
        "backbone backbone_freeze_keywords aux_loss dn_number learnable_tgt_init dn_box_noise_scale "
        "dn_label_noise_ratio dn_label_coef dn_bbox_coef dn_labelbook_size use_checkpoint use_transformer_ckpt "
        "text_dropout fusion_dropout pretrain_img_size drop_rate attn_drop_rate swintransformer_use_checkpoint "
        "frozen_stages"
    ).split(),
)
RAM_TABLE = ConfigTable(
    ("blip_2_ram_model",),
    computed={**RAM_SWIN.defaults, "vision_width": 1536},
    fixed={"vit": ("swin_l",)},
    inert=(
        "med_config vit_grad_ckpt vit_ckpt_layer prompt threshold delete_tag_index tag_list tag_list_chinese image_res"
    ).split(),
)


def _parts_from_hf(hf_config: dict) -> tuple[dict, dict]:
    """(fields of both stages' configs, fields of config.json itself)."""
    from lionjax.models.connectors.mqformer import MQFormerConfig
    from lionjax.models.vision.vit import ViTConfig

    s = TABLE.read(hf_config)
    vision = ViTConfig(**VISION_TABLE.read_fields(VISION_TABLE.read(s["vision_config"], "vision_config")))
    q = MQ_FORMER_TABLE.read(s["qformer_config"], "qformer_config") | {"encoder_hidden_size": vision.width}
    mq_former = MQFormerConfig(**MQ_FORMER_TABLE.read_fields(q))
    detector = _detector_from_hf(s[DETECTION_PART])
    visual = mq_former.num_query_tokens - mq_former.num_grounding_queries
    require_equal("qformer_config.num_vit_query_tokens", q["num_vit_query_tokens"], "the other queries", visual)
    require_equal("num_query_tokens", s["num_query_tokens"], "qformer_config.query_length", mq_former.num_query_tokens)
    width = f"{DETECTION_PART}.hidden_dim + 4"
    require_equal("qformer_config.detection_encoder_hidden_size", mq_former.region_width, width, detector.feature_width)
    fields = {"vision": vision, "vision_norm_eps": vision.norm_eps, "qformer": mq_former}
    return fields | {"tagger": _tagger_from_hf(s["ram_config"]), "detector": detector}, s


def _detector_from_hf(hf_config: dict) -> GroundingDinoConfig:
    from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_T

    d = DETECTOR_TABLE.read(hf_config, DETECTION_PART)
    for field, same in (("dec_n_points", "enc_n_points"), ("pe_temperaturew", "pe_temperatureh")):
        require_equal(f"{DETECTION_PART}.{field}", d[field], f"{DETECTION_PART}.{same}", d[same])
    swin = dataclasses.replace(GROUNDING_DINO_SWIN_T.swin, **_read_swin(DETECTOR_SWIN, d))
    return dataclasses.replace(GROUNDING_DINO_SWIN_T, swin=swin, **DETECTOR_TABLE.read_fields(d))


def _tagger_from_hf(hf_config: dict) -> RamConfig:
    from lionjax.models.vision.ram import RAM_SWIN_L

    r = RAM_TABLE.read(hf_config, "ram_config")
    tagger = dataclasses.replace(RAM_SWIN_L, swin=dataclasses.replace(RAM_SWIN_L.swin, **_read_swin(RAM_SWIN, r)))
    require_equal("ram_config.vision_width", r["vision_width"], "the tower's last width", tagger.swin.widths[-1])
    return tagger


def _read_swin(fields: ConfigFields, settings: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.read(settings).items()}


def _config_from_hf(hf_config: dict) -> VisualPrefixLM:
    from lionjax.models.vlm.visual_prefix import LYRICS_CODE

    fields, s = _parts_from_hf(hf_config)
    language = language_config_from_hf(s["text_config"], "opt", "text_config")
    return dataclasses.replace(LYRICS_CODE, language=language, **fields)


def _stage1_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vlm.lyrics_stage1 import LyricsStage1

    if DETECTION_PART not in hf_config:
        return read_lionjax_config(hf_config)
    fields, s = _parts_from_hf(hf_config)
    # The added [DEC] is the last word.
    return LyricsStage1(
        **fields, embed_dim=s["image_text_hidden_size"], decoder_start_token_id=fields["qformer"].vocab_size - 1
    )


def _config_to_hf(c: VisualPrefixLM) -> dict:
    """The released config.json, or the lionjax config where that cannot say it."""
    if c.tagger is None or c.detector is None or c.vision.pre_layernorm:
        return lionjax_hf_config(c, "lyrics")
    hf_config = {
        "architectures": ["LyricsLMForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": c.qformer.num_query_tokens,
        "use_decoder_only_language_model": True,
        "vision_config": {"model_type": "blip_2_vision_model", "qkv_bias": True} | VIT_FIELDS.write(c.vision),
        "qformer_config": {"model_type": "blip_2_qformer"} | _mq_former_to_hf(c.qformer),
        "text_config": language_config_to_hf(c.language),
        DETECTION_PART: {"model_type": "blip_2_detection_model"} | _detector_to_hf(c.detector),
        "ram_config": {"model_type": "blip_2_ram_model", "vision_width": c.tagger.swin.widths[-1]}
        | RAM_SWIN.write(c.tagger.swin),
    }
    parts, _ = _parts_from_hf(hf_config)
    same = (parts["tagger"], parts["detector"], parts["vision_norm_eps"]) == (c.tagger, c.detector, c.vision_norm_eps)
    return hf_config if same else lionjax_hf_config(c, "lyrics")


def _mq_former_to_hf(c: MQFormerConfig) -> dict:
    visual = c.num_query_tokens - c.num_grounding_queries
    return {"num_vit_query_tokens": visual, "attention_probs_dropout_prob": c.dropout} | MQ_FORMER_FIELDS.write(c)


def _detector_to_hf(c: GroundingDinoConfig) -> dict:
    pairs = {"dec_n_points": c.num_points, "pe_temperaturew": c.position_temperature, "dilation": False}
    return pairs | DETECTOR_SWIN.write(c.swin) | DETECTOR_FIELDS.write(c)


LYRICS = CheckpointFormat(
    "lyrics",
    (),  # found by its parts: its model_type is BLIP-2's
    lambda c: type(c).__name__ == "VisualPrefixLM" and type(c.qformer).__name__ == "MQFormerConfig",
    _config_from_hf,
    _config_to_hf,
    ignore_patterns=IGNORE_PATTERNS,
)
LYRICS_STAGE1 = lionjax_config_format(
    "lyrics_stage1", "LyricsStage1", config_from_hf=_stage1_config_from_hf, ignore_patterns=IGNORE_PATTERNS
)
LYRICS_FORMATS = (LYRICS, LYRICS_STAGE1)


def lyrics_format_name(hf_config: dict) -> str | None:
    """The format's name if config.json is that of a released Lyrics, else None."""
    if DETECTION_PART not in hf_config:
        return None
    architectures = hf_config.get("architectures") or ()
    return LYRICS_STAGE1.name if STAGE1_CLASS in architectures else LYRICS.name
