# SPDX-License-Identifier: Apache-2.0
"""BERT (arXiv 1810.04805) as published on Hugging Face: the encoder; heads of larger models are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, require_supported, token_id
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.bert import BertConfig

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "gelu_new": "gelu_tanh"}


def _config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.bert import BertConfig

    act, position_type = hf_config.get("hidden_act", "gelu"), hf_config.get("position_embedding_type", "absolute")
    require_supported(act in ACTIVATIONS, f"hidden_act {act!r}", ", ".join(ACTIVATIONS))
    require_supported(position_type == "absolute", f"position_embedding_type {position_type!r}", "'absolute'")
    require_supported(not hf_config.get("is_decoder"), "is_decoder true (causal mask)", "is_decoder false")
    return BertConfig(
        hf_config["vocab_size"],
        hf_config["hidden_size"],
        hf_config["num_hidden_layers"],
        hf_config["num_attention_heads"],
        hf_config["intermediate_size"],
        hf_config.get("max_position_embeddings", 512),
        hf_config.get("type_vocab_size", 2),
        hf_config.get("layer_norm_eps", 1e-12),
        ACTIVATIONS[act],
        hf_config.get("hidden_dropout_prob", 0.1),
        pad_token_id=token_id(hf_config, "pad_token_id", 0),
    )


def _infer_pooler(c: BertConfig, names: Collection[str]) -> Any:
    """`c` with `pooler` set where the checkpoint has one; config.json does not say."""
    return dataclasses.replace(c, pooler="pooler.dense.weight" in names)


def _config_to_hf(c: BertConfig) -> dict:
    hf_activations = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": c.max_positions,
        "type_vocab_size": c.type_vocab_size,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": hf_activations[c.activation],
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "pad_token_id": c.pad_token_id,
    }


def _weight_map(c: BertConfig) -> tuple:
    from lionjax.models.language import bert

    return bert.weight_map(c)


def _abstract_params(c: BertConfig, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.bert import Bert

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract_params(
        lambda key: Bert(c).init(key, ids, jnp.ones_like(ids))["params"], jax.random.key(0), mesh=mesh
    )


BERT = CheckpointFormat(
    "bert",
    ("bert",),
    lambda c: type(c).__name__ == "BertConfig",
    _config_from_hf,
    _config_to_hf,
    _weight_map,
    _abstract_params,
    ignore_patterns=(r"embeddings\.position_ids(?#position indices)", r"(cls|classifier|qa_outputs)\..*(?#heads)"),
    inner_prefix="bert.",
    infer_from_keys=_infer_pooler,
)
