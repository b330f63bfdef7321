# SPDX-License-Identifier: Apache-2.0
"""BERT as an encoder of text (arXiv 1810.04805): every word sees every other, norms stand behind the residuals.

It reads what is compared with pictures: sentences for retrieval, phrases that a detector looks for.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.sharding import constrain
from lionjax.core.weight_map import Row, under
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention, key_mask
from lionjax.nn.layers import MLP, Dense, Embed, LayerNorm, dense_rows, dropout, norm_rows, split_key


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes; the defaults are those of bert-base-uncased. `pooler`: a dense layer with tanh reads the first word."""

    vocab: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    kinds: int = 2  # of sentences: rows of the token type table
    eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    pooler: bool = True
    pad_token: int = 0


BERT_BASE = BertConfig()
MINILM_L6 = BertConfig(width=384, layers=6, hidden=1536)  # all-MiniLM-L6-v2


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    c: BertConfig

    @nn.compact
    def __call__(self, x_BLD, key, mask):
        c, keys = self.c, split_key(key, 3)
        own = Attention(c.width, c.heads, c.width // c.heads, rate=c.dropout, name="attention")
        change_BLD = dropout(own(x_BLD, mask=mask, key=keys[0]), c.dropout, keys[1])
        x_BLD = LayerNorm(c.width, c.eps, name="norm1")(x_BLD + change_BLD)
        change_BLD = MLP(c.width, c.hidden, c.activation, name="mlp")(x_BLD)
        change_BLD = dropout(change_BLD, c.dropout, keys[2])
        x_BLD = LayerNorm(c.width, c.eps, name="norm2")(x_BLD + change_BLD)
        return constrain(x_BLD, "batch", "length", "act_embed"), None


class Bert(nn.Module):
    """Words (B, L) -> states (B, L, D), and with a pooler that of the sentence (B, D), else the first word's."""

    c: BertConfig

    @nn.compact
    def __call__(self, ids_BL, mask, positions_BL=None, kinds_BL=None, key=None, dtype=jnp.float32):
        """`mask`: which words are real (B, L), or who sees whom (B, L, L). Positions count from 0 unless given."""
        c, keys = self.c, split_key(key, 1 + self.c.layers)
        length = ids_BL.shape[1]
        if positions_BL is None:
            if length > c.positions:
                raise ValueError(f"{length} tokens do not fit {c.positions} positions; shorten it")
            positions_BL = jnp.arange(length)[None]
        kinds_BL = jnp.zeros_like(ids_BL) if kinds_BL is None else kinds_BL
        x_BLD = Embed(c.vocab, c.width, name="words")(ids_BL, dtype)
        x_BLD = x_BLD + Embed(c.kinds, c.width, name="kinds")(kinds_BL, dtype)
        x_BLD = x_BLD + Embed(c.positions, c.width, name="positions")(positions_BL, dtype)
        x_BLD = dropout(LayerNorm(c.width, c.eps, name="norm")(x_BLD), c.dropout, keys[0])
        seen = key_mask(mask) if mask.ndim == 2 else mask.astype(bool)[:, None]
        scan = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layer_keys = None if key is None else jnp.stack(keys[1:])
        x_BLD, _ = scan(c, name="blocks")(x_BLD, layer_keys, seen)
        first_BD = x_BLD[:, 0]
        if c.pooler:
            first_BD = jnp.tanh(Dense(c.width, c.width, ("embed", None), name="pooler")(first_BD))
        return x_BLD, first_BD


def torch_rows(c: BertConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's BertModel."""
    names = {"q": "query", "k": "key", "v": "value"}
    block = (
        *under("attention.self.", "attention/", attentions.torch_rows(names, c.heads, c.width // c.heads, "qkv")),
        *under(
            "attention.output.", "attention/", attentions.torch_rows({"o": "dense"}, c.heads, c.width // c.heads, "o")
        ),
        *norm_rows("attention.output.LayerNorm", "norm1"),
        *dense_rows("intermediate.dense", "mlp/up"),
        *dense_rows("output.dense", "mlp/down"),
        *norm_rows("output.LayerNorm", "norm2"),
    )
    return (
        Row("embeddings.word_embeddings.weight", "words/table"),
        Row("embeddings.token_type_embeddings.weight", "kinds/table"),
        Row("embeddings.position_embeddings.weight", "positions/table"),
        *norm_rows("embeddings.LayerNorm", "norm"),
        *under("encoder.layer.{i}.", "blocks/", block),
        *(dense_rows("pooler.dense", "pooler") if c.pooler else ()),
    )
