# SPDX-License-Identifier: Apache-2.0
"""BERT text encoder (arXiv 1810.04805): bidirectional attention, post-norm residual blocks.

It encodes sentences for retrieval and phrases for open-vocabulary detection.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.base_configs import TransformerSizes
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention, key_padding_mask
from lionjax.nn.layers import (
    MLP,
    Dense,
    Embed,
    LayerNorm,
    dense_weight_map,
    dropout,
    norm_weight_map,
    scan_blocks,
    split_key,
)
from lionjax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class BertLayersConfig(TransformerSizes):
    """Config of BERT's layers, which the Q-Former has too; the defaults are those of BERT-base."""

    _: dataclasses.KW_ONLY
    norm_eps: float = 1e-12
    dropout: float = 0.1
    lora: LoraConfig = LoraConfig()


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class BertConfig(BertLayersConfig):
    """Config; the defaults are those of bert-base-uncased. `pooler`: a dense layer with tanh on the first token."""

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2  # rows of the token type table
    activation: str = "gelu"
    pooler: bool = True
    pad_token_id: int = 0


BERT_BASE = BertConfig()
MINILM_L6 = BertConfig(width=384, depth=6, mlp_dim=1536)  # all-MiniLM-L6-v2


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    c: BertConfig

    @nn.compact
    def __call__(self, x_BLD, key, mask):
        c, keys = self.c, split_key(key, 3)
        attention = Attention(
            c.width, c.num_heads, c.width // c.num_heads, dropout_rate=c.dropout, lora=c.lora, name="attention"
        )
        change_BLD = dropout(attention(x_BLD, mask=mask, key=keys[0]), c.dropout, keys[1])
        x_BLD = LayerNorm(c.width, c.norm_eps, name="norm1")(x_BLD + change_BLD)
        change_BLD = MLP(c.width, c.mlp_dim, c.activation, lora=c.lora, name="mlp")(x_BLD, keys[2])
        change_BLD = dropout(change_BLD, c.dropout, keys[2])
        x_BLD = LayerNorm(c.width, c.norm_eps, name="norm2")(x_BLD + change_BLD)
        return with_logical_constraint(x_BLD, "batch", "length", "act_embed"), None


class Bert(nn.Module):
    """States (B, L, D) of tokens (B, L), and the pooled output (B, D), which without `pooler` is the first state."""

    c: BertConfig

    @nn.compact
    def __call__(self, ids_BL, mask, position_ids_BL=None, token_type_ids_BL=None, key=None, dtype=jnp.float32):
        """See the class. `mask`: real tokens (B, L), or allowed (query, key) pairs (B, L, L).

        Positions default to 0..L-1. Raises ValueError if the text is then longer than `max_positions`.
        """
        c, keys = self.c, split_key(key, 1 + self.c.depth)
        length = ids_BL.shape[1]
        if position_ids_BL is None:
            if length > c.max_positions:
                raise ValueError(f"{length} tokens do not fit {c.max_positions} positions; shorten the text")
            position_ids_BL = jnp.arange(length)[None]
        token_type_ids_BL = jnp.zeros_like(ids_BL) if token_type_ids_BL is None else token_type_ids_BL
        x_BLD = Embed(c.vocab_size, c.width, name="words")(ids_BL, dtype)
        x_BLD = x_BLD + Embed(c.type_vocab_size, c.width, name="kinds")(token_type_ids_BL, dtype)
        x_BLD = x_BLD + Embed(c.max_positions, c.width, name="positions")(position_ids_BL, dtype)
        x_BLD = dropout(LayerNorm(c.width, c.norm_eps, name="norm")(x_BLD), c.dropout, keys[0])
        mask = key_padding_mask(mask) if mask.ndim == 2 else mask.astype(bool)[:, None]
        scan = scan_blocks(Block, c.depth, 1, unchecked_in=self)
        layer_keys = None if key is None else jnp.stack(keys[1:])
        x_BLD, _ = scan(c, name="blocks")(x_BLD, layer_keys, mask)
        first_BD = x_BLD[:, 0]
        if c.pooler:
            first_BD = jnp.tanh(Dense(c.width, c.width, ("embed", None), lora=c.lora, name="pooler")(first_BD))
        return x_BLD, first_BD


def phrase_masks(ids_BL, delimiter_ids: tuple[int, ...]):
    """Allowed (query, key) pairs (B, L, L) and positions (B, L) of phrases, each ended by one of `delimiter_ids`.

    A token attends to the tokens of its phrase, the closing delimiter included, and positions restart in each phrase.
    A token that no delimiter follows, and a phrase that ends at the first or the last column, attend to themselves only
    and have position 0, as in Grounding DINO (arXiv 2303.05499).
    """
    length = ids_BL.shape[1]
    column_L = jnp.arange(length)
    is_delimiter_BL = jnp.isin(ids_BL, jnp.asarray(delimiter_ids))
    end_BL = jax.lax.cummin(jnp.where(is_delimiter_BL, column_L, length), axis=1, reverse=True)
    last_BL = jax.lax.cummax(jnp.where(is_delimiter_BL, column_L, -1), axis=1)
    start_BL = jnp.pad(last_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1) + 1
    is_phrase_BL = (end_BL > 0) & (end_BL < length - 1)
    same_BLL = (end_BL[:, :, None] == end_BL[:, None, :]) & is_phrase_BL[:, :, None]
    return same_BLL | np.eye(length, dtype=bool), jnp.where(is_phrase_BL, column_L - start_BL, 0)


def weight_map(c: BertConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's BertModel."""
    names = {"q": "query", "k": "key", "v": "value"}
    block = (
        *with_prefix(
            "attention.self.", "attention/", attentions.weight_map(names, c.num_heads, c.width // c.num_heads, "qkv")
        ),
        *with_prefix(
            "attention.output.",
            "attention/",
            attentions.weight_map({"o": "dense"}, c.num_heads, c.width // c.num_heads, "o"),
        ),
        *norm_weight_map("attention.output.LayerNorm", "norm1"),
        *dense_weight_map("intermediate.dense", "mlp/up"),
        *dense_weight_map("output.dense", "mlp/down"),
        *norm_weight_map("output.LayerNorm", "norm2"),
    )
    return (
        WeightMapping("embeddings.word_embeddings.weight", "words/table"),
        WeightMapping("embeddings.token_type_embeddings.weight", "kinds/table"),
        WeightMapping("embeddings.position_embeddings.weight", "positions/table"),
        *norm_weight_map("embeddings.LayerNorm", "norm"),
        *with_prefix("encoder.layer.{i}.", "blocks/", block),
        *(dense_weight_map("pooler.dense", "pooler") if c.pooler else ()),
    )
