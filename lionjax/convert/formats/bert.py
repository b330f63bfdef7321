# SPDX-License-Identifier: Apache-2.0
"""BERT as published: the bare encoder, or the one inside a model with heads, which are passed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, refuse_unless, token
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.bert import BertConfig

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "gelu_new": "gelu_tanh"}


def _config(s: dict) -> Any:
    from lionjax.models.language.bert import BertConfig

    act, where = s.get("hidden_act", "gelu"), s.get("position_embedding_type", "absolute")
    refuse_unless(act in ACTIVATIONS, f"hidden_act {act!r}", ", ".join(ACTIVATIONS))
    refuse_unless(where == "absolute", f"positions of type {where!r}", "absolute ones")
    refuse_unless(not s.get("is_decoder"), "a mask that hides later words", "an encoder")
    return BertConfig(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["intermediate_size"],
        s.get("max_position_embeddings", 512),
        s.get("type_vocab_size", 2),
        s.get("layer_norm_eps", 1e-12),
        ACTIVATIONS[act],
        s.get("hidden_dropout_prob", 0.1),
        pad_token=token(s, "pad_token_id", 0),
    )


def _told(c: BertConfig, names: Collection[str]) -> Any:
    """Whether there is a pooler only the weights say."""
    return dataclasses.replace(c, pooler="pooler.dense.weight" in names)


def _settings(c: BertConfig) -> dict:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.positions,
        "type_vocab_size": c.kinds,
        "layer_norm_eps": c.eps,
        "hidden_act": theirs[c.activation],
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "pad_token_id": c.pad_token,
    }


def _rows(c: BertConfig) -> tuple:
    from lionjax.models.language import bert

    return bert.torch_rows(c)


def _abstract(c: BertConfig, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.bert import Bert

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract(
        lambda key: Bert(c).init(key, ids, jnp.ones_like(ids))["params"], jax.random.key(0), mesh=mesh
    )


BERT = Published(
    "bert",
    ("bert",),
    lambda c: type(c).__name__ == "BertConfig",
    _config,
    _settings,
    _rows,
    _abstract,
    ignore=(r"embeddings\.position_ids(?#they only count)", r"(cls|classifier|qa_outputs)\..*(?#heads)"),
    inside="bert.",
    told=_told,
)
