# SPDX-License-Identifier: Apache-2.0
"""The Q-Former of BLIP-2 / InstructBLIP, and LION's vision aggregator, which is made of the same block.

A block: self-attention, attention to picture features, feed-forward, each followed by a norm over its residual. In the
Q-Former queries and text share the self-attention, every second block looks at the picture (queries only), and queries
and text have feed-forwards of their own.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lionjax import attention as attentions
from lionjax.attention import Attention, key_mask
from lionjax.layers import (
    MLP,
    Embed,
    LayerNorm,
    dense_rows,
    dropout,
    norm_rows,
    normal,
    split_key,
    zeros,
)
from lionjax.sharding import constrain, sharded
from lionjax.weight_rows import Row, constant, renamed, reshaped, under


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BERT-base by default; `vocab` 30523 is bert-base-uncased with `[DEC]`. `text`: it reads an instruction too."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    queries: int = 32
    cross_every: int = 2
    vision_width: int = 1408
    vocab: int = 30523
    positions: int = 512
    eps: float = 1e-12
    dropout: float = 0.1
    text: bool = True  # False: BLIP-2 behind its first stage, queries alone


@dataclasses.dataclass(frozen=True)
class AggregatorConfig:
    """LION's vision aggregator: which layers of the ViT ask and answer, and the projector behind it."""

    query_layer: int = 38
    context_layers: tuple[int, ...] = (28, 18)
    width: int = 1408
    heads: int = 16
    hidden: int = 3072  # BERT's default, not four times the width
    eps: float = 1e-12
    dropout: float = 0.1
    projector: int = 5632  # hidden width of the MLP into the language model


class PostNormBlock(nn.Module):
    """norm(x + f(x)) for self-attention, cross-attention (first `queries` rows only) and feed-forward(s)."""

    width: int
    heads: int
    hidden: int
    eps: float
    rate: float
    source_width: int | None = None  # of the picture features; None: no cross-attention
    queries: int | None = None  # None: all rows are queries
    text: bool = False  # rows beyond the queries have their own feed-forward
    zero_out: bool = False  # LION's aggregator starts with zeroed output projections

    def attention(self, name, source_width=None):
        out = zeros if self.zero_out else normal(0.02)
        inits = (normal(0.02), normal(0.02), normal(0.02), out)
        head = self.width // self.heads
        return Attention(
            self.width, self.heads, head, source_width, rate=self.rate, inits=inits, name=name
        )

    def norm(self, name):
        return LayerNorm(self.width, self.eps, name=name)

    @nn.compact
    def __call__(self, x_BLD, source_BPD, mask, key):
        keys = split_key(key, 6)
        change = self.attention("self_attention")(x_BLD, mask=mask, key=keys[0])
        x_BLD = self.norm("self_norm")(x_BLD + dropout(change, self.rate, keys[1]))
        queries = x_BLD.shape[1] if self.queries is None else self.queries
        asked_BQD, text_BLD = x_BLD[:, :queries], x_BLD[:, queries:]
        if self.source_width is not None:
            change = self.attention("cross_attention", self.source_width)(
                asked_BQD, source_BPD, key=keys[2]
            )
            asked_BQD = self.norm("cross_norm")(asked_BQD + dropout(change, self.rate, keys[3]))
        asked_BQD = self.feed("mlp", "norm", asked_BQD, keys[4])
        if not self.text:
            return asked_BQD
        text_BLD = self.feed("text_mlp", "text_norm", text_BLD, keys[5])
        return jnp.concatenate([asked_BQD, text_BLD], axis=1)

    def feed(self, mlp, norm, x_BLD, key):
        change = MLP(self.width, self.hidden, zero_out=self.zero_out, name=mlp)(x_BLD)
        return self.norm(norm)(x_BLD + dropout(change, self.rate, key))


class Group(nn.Module):
    """One block that looks at the picture, then the ones that do not."""

    c: QFormerConfig
    members: int
    text: bool

    @nn.compact
    def __call__(self, x_BLD, key, source_BPD, mask):
        c = self.c
        keys = split_key(key, self.members)
        for member in range(self.members):
            source_width = c.vision_width if member == 0 else None
            block = PostNormBlock(
                c.width,
                c.heads,
                c.hidden,
                c.eps,
                c.dropout,
                source_width,
                c.queries,
                self.text,
                name=f"block_{member}",
            )
            x_BLD = block(x_BLD, source_BPD, mask, keys[member])
        return constrain(x_BLD, "batch", "length", "act_embed"), None


class QFormer(nn.Module):
    """Learned queries read a picture with an instruction in mind: (B, P, D) features -> (B, Q + L, D) states.

    The first Q rows are the answer, and all there is where `text` is off. Layers are scanned in groups of
    `cross_every`, what is left over comes after.
    """

    c: QFormerConfig

    @nn.compact
    def __call__(self, source_BPD, ids_BL=None, mask_BL=None, key=None):
        c = self.c
        groups, rest = divmod(c.layers, c.cross_every)
        keys = split_key(key, groups + 2)
        query_QD = self.param(
            "queries", sharded(normal(0.02), ("position", "embed")), (c.queries, c.width)
        )
        dtype, batch = source_BPD.dtype, source_BPD.shape[0]
        x_BLD = jnp.broadcast_to(query_QD.astype(dtype), (batch, c.queries, c.width))
        mask = None
        if c.text:
            positions = jnp.arange(ids_BL.shape[1])
            text_BLD = Embed(c.vocab, c.width, name="words")(ids_BL, dtype)
            text_BLD = text_BLD + Embed(c.positions, c.width, name="positions")(positions, dtype)
            x_BLD = jnp.concatenate([x_BLD, text_BLD], axis=1)
            seen_BQ = jnp.ones((batch, c.queries), bool)
            mask = key_mask(jnp.concatenate([seen_BQ, mask_BL.astype(bool)], axis=1))
        x_BLD = dropout(LayerNorm(c.width, c.eps, name="norm")(x_BLD), c.dropout, keys[0])
        if groups:
            scan = nn.scan(
                Group,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            group_keys = None if key is None else jnp.stack(keys[2:])
            x_BLD, _ = scan(c, c.cross_every, c.text, name="groups")(
                x_BLD, group_keys, source_BPD, mask
            )
        if rest:
            x_BLD, _ = Group(c, rest, c.text, name="tail")(x_BLD, keys[1], source_BPD, mask)
        return x_BLD


class FusionBlock(nn.Module):
    """A block of the aggregator, in the scan's calling convention."""

    c: AggregatorConfig

    @nn.compact
    def __call__(self, x_BPD, layer):
        c = self.c
        context_BPD, key = layer
        block = PostNormBlock(
            c.width, c.heads, c.hidden, c.eps, c.dropout, c.width, zero_out=True, name="block"
        )
        return block(x_BPD, context_BPD, None, key), None


class Aggregator(nn.Module):
    """LION's FusionAdapter: late features of the ViT ask, earlier ones answer, one block each.

    (B, P, D) and contexts (T, B, P, D) in the order of the blocks -> (B, P, D). No mask anywhere.
    """

    c: AggregatorConfig

    @nn.compact
    def __call__(self, query_BPD, context_TBPD, key=None):
        c = self.c
        blocks = len(c.context_layers)

        keys = None if key is None else jnp.stack(split_key(key, blocks))
        scan = nn.scan(
            FusionBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=blocks,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BPD, _ = scan(c, name="blocks")(query_BPD, (context_TBPD, keys))
        return x_BPD


def _attention_rows(theirs: str, ours: str, heads: int, head: int) -> tuple[Row, ...]:
    """BERT's spelling of an attention and the norm behind it."""
    linears = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    rows = attentions.torch_rows(linears, heads, head, "qkvo")
    return (
        *under(f"{theirs}.", f"{ours}_attention/", rows),
        *norm_rows(f"{theirs}.output.LayerNorm", f"{ours}_norm"),
    )


def _feed_rows(suffix: str, mlp: str, norm: str) -> tuple[Row, ...]:
    return (
        *dense_rows(f"intermediate{suffix}.dense", f"{mlp}/up"),
        *dense_rows(f"output{suffix}.dense", f"{mlp}/down"),
        *norm_rows(f"output{suffix}.LayerNorm", norm),
    )


def torch_rows(c: QFormerConfig) -> tuple[Row, ...]:
    """Names under `Qformer.bert.` in LAVIS and LION; the queries are `query_tokens` beside it (see `query_rows`)."""
    head = c.width // c.heads
    plain = (
        *_attention_rows("attention", "self", c.heads, head),
        *_feed_rows("_query", "mlp", "norm"),
        *(_feed_rows("", "text_mlp", "text_norm") if c.text else ()),
    )
    looking = (*plain, *_attention_rows("crossattention", "cross", c.heads, head))
    groups, rest = divmod(c.layers, c.cross_every)
    rows = [
        constant("embeddings.position_ids", lambda: np.arange(c.positions)[None]),
        *norm_rows("embeddings.LayerNorm", "norm"),
    ]
    if c.text:
        rows += [
            Row("embeddings.word_embeddings.weight", "words/table"),
            Row("embeddings.position_embeddings.weight", "positions/table"),
        ]
    for member in range(c.cross_every if groups else 0):
        layer = f"encoder.layer.{{{c.cross_every}i+{member}<{groups}}}."
        rows += under(layer, f"groups/block_{member}/", plain if member else looking)
    for member in range(rest):
        layer = f"encoder.layer.{groups * c.cross_every + member}."
        rows += under(layer, f"tail/block_{member}/", plain if member else looking)
    return tuple(rows)


def hugging_face_rows(c: QFormerConfig) -> tuple[Row, ...]:
    """Names under `qformer.` in Hugging Face's InstructBLIP, and in its BLIP-2 where there is no text."""
    norm = "embeddings.layernorm" if c.text else "layernorm"
    pairs = (("attention.self.", "attention.attention."), ("embeddings.LayerNorm", norm))
    return renamed((row for row in torch_rows(c) if row.paths), *pairs)


def query_rows(c: QFormerConfig) -> tuple[Row, ...]:
    """The learned queries."""
    return (
        Row("query_tokens", "queries", reshaped((1, c.queries, c.width), (c.queries, c.width))),
    )


def aggregator_rows(c: AggregatorConfig) -> tuple[Row, ...]:
    """Names under `fusion_adapter.` in LION."""
    head = c.width // c.heads
    block = (
        *_attention_rows("attention", "self", c.heads, head),
        *_attention_rows("crossattention", "cross", c.heads, head),
        *_feed_rows("", "mlp", "norm"),
    )
    return under("blocks.{i}.", "blocks/block/", block)
