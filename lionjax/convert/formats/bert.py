# SPDX-License-Identifier: Apache-2.0
"""BERT (arXiv 1810.04805) as published on Hugging Face: the encoder; heads of larger models are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import abstract_language_params, class_format
from lionjax.convert.formats.config_fields import BLOCK_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.bert import BertConfig

_TABLE_SIZES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
}
FIELDS = ConfigFields(
    _TABLE_SIZES | BLOCK_SIZES | {"norm_eps": "layer_norm_eps", "dropout": "hidden_dropout_prob"},
    {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu"}
    | {"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "pad_token_id": 0},
    ("pad_token_id",),
    "hidden_act",
)
TABLE = ConfigTable(
    ("bert",),
    FIELDS,
    fixed={"position_embedding_type": ("absolute",)},
    inert=("attention_probs_dropout_prob", "directionality", "pooler_fc_size", "pooler_num_attention_heads")
    + ("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "tie_word_embeddings"),
)


def config_from_hf(hf_config: dict, path: str = "") -> Any:
    """The BertConfig of a config.json, or of the nested config at `path` of one."""
    from lionjax.models.language.bert import BertConfig

    return BertConfig(**TABLE.read_fields(TABLE.read(hf_config, path)))


def _infer_pooler(c: BertConfig, names: Collection[str]) -> Any:
    """`c` with `pooler` set where the checkpoint has one; config.json does not say."""
    return dataclasses.replace(c, pooler="pooler.dense.weight" in names)


def _config_to_hf(c: BertConfig) -> dict:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": c.dropout,
    } | FIELDS.write(c)


def _weight_map(c: BertConfig) -> tuple:
    from lionjax.models.language import bert

    return bert.weight_map(c)


def _abstract_params(c: BertConfig, mesh: Any = None) -> Params:
    from lionjax.models.language.bert import Bert

    return abstract_language_params(Bert(c), lambda module, ids: module(ids, ids), mesh)


BERT = class_format(
    "bert",
    "BertConfig",
    (config_from_hf, _config_to_hf, _weight_map, _abstract_params),
    ignore_patterns=(r"embeddings\.position_ids(?#position indices)", r"(cls|classifier|qa_outputs)\..*(?#heads)"),
    inner_prefix="bert.",
    infer_from_keys=_infer_pooler,
)
