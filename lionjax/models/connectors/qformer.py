# SPDX-License-Identifier: Apache-2.0
"""The Q-Former of BLIP-2 / InstructBLIP, and LION's vision aggregator, which is made of the same block.

A block: self-attention, attention to picture features, feed-forward, each followed by a norm over its residual. In the
Q-Former queries and text share the self-attention, every second block looks at the picture (queries only), and queries
and text have feed-forwards of their own.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import constrain, sharded
from lionjax.core.weight_map import Row, constant, renamed, reshaped, under
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention, key_mask
from lionjax.nn.layers import MLP, Embed, LayerNorm, dense_rows, dropout, norm_rows, normal, split_key, zeros


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
    """norm(x + f(x)) for self-attention, cross-attention (the queries only) and feed-forward(s)."""

    width: int
    heads: int
    hidden: int
    eps: float
    rate: float
    source_width: int | None = None  # of the picture features; None: no cross-attention
    text: bool = False  # text has its own feed-forward
    zero_out: bool = False  # LION's aggregator starts with zeroed output projections

    def attention(self, name, source_width=None):
        out = zeros if self.zero_out else normal(0.02)
        inits = (normal(0.02), normal(0.02), normal(0.02), out)
        head = self.width // self.heads
        return Attention(self.width, self.heads, head, source_width, rate=self.rate, inits=inits, name=name)

    def norm(self, name):
        return LayerNorm(self.width, self.eps, name=name)

    @nn.compact
    def __call__(self, asked_BQD, text_BLD, source_BPD, mask, key, earlier=None):
        """Queries, text (either may have no rows), and the keys and values of both. `earlier` ones stand before."""
        keys = split_key(key, 6)
        x_BLD, own = (jnp.concatenate([asked_BQD, text_BLD], axis=1), self.attention("self_attention"))
        seen = new = own.keys_values(x_BLD)
        if earlier is not None:
            seen = tuple(jnp.concatenate(pair, axis=1) for pair in zip(earlier, new))
        change = own.look(own.queries(x_BLD), seen, mask, None, keys[0])
        x_BLD = self.norm("self_norm")(x_BLD + dropout(change, self.rate, keys[1]))
        queries = asked_BQD.shape[1]
        asked_BQD, text_BLD = x_BLD[:, :queries], x_BLD[:, queries:]
        if self.source_width is not None and queries:
            change = self.attention("cross_attention", self.source_width)(asked_BQD, source_BPD, key=keys[2])
            asked_BQD = self.norm("cross_norm")(asked_BQD + dropout(change, self.rate, keys[3]))
        if queries:
            asked_BQD = self.feed("mlp", "norm", asked_BQD, keys[4])
        if self.text and text_BLD.shape[1]:
            text_BLD = self.feed("text_mlp", "text_norm", text_BLD, keys[5])
        return asked_BQD, text_BLD, new

    def feed(self, mlp, norm, x_BLD, key):
        change = MLP(self.width, self.hidden, zero_out=self.zero_out, name=mlp)(x_BLD)
        return self.norm(norm)(x_BLD + dropout(change, self.rate, key))


class Group(nn.Module):
    """One block that looks at the picture, then the ones that do not."""

    c: QFormerConfig
    members: int

    @nn.compact
    def __call__(self, x, layer, source_BPD, mask):
        c, (asked_BQD, text_BLD), (key, earlier) = self.c, x, layer
        keys, made = split_key(key, self.members), []
        for member in range(self.members):
            source_width = c.vision_width if member == 0 else None
            block = PostNormBlock(
                c.width, c.heads, c.hidden, c.eps, c.dropout, source_width, c.text, name=f"block_{member}"
            )
            before = None if earlier is None else earlier[member]
            asked_BQD, text_BLD, new = block(asked_BQD, text_BLD, source_BPD, mask, keys[member], before)
            made.append(new)
        x = (constrain(x, "batch", "length", "act_embed") for x in (asked_BQD, text_BLD))
        return tuple(x), tuple(made)


class QFormer(nn.Module):
    """Learned queries read a picture with an instruction in mind: (B, P, D) features -> (B, Q + L, D) states.

    The first Q rows are the answer, and all there is where `text` is off. Layers are in groups of `cross_every`, which
    are scanned; what is left over comes after.
    """

    c: QFormerConfig

    def setup(self):
        c = self.c
        groups, rest = divmod(c.layers, c.cross_every)
        self.queries = self.param("queries", sharded(normal(0.02), ("position", "embed")), (c.queries, c.width))
        if c.text:
            self.words = Embed(c.vocab, c.width)
            self.positions = Embed(c.positions, c.width)
        self.norm = LayerNorm(c.width, c.eps)
        if groups:
            self.groups = nn.scan(
                Group,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, c.cross_every)
        if rest:
            self.tail = Group(c, rest)

    def __call__(self, source_BPD, ids_BL=None, mask_BL=None, key=None):
        text_BLD = mask = None
        if self.c.text:
            text_BLD = self.embed(ids_BL, source_BPD.dtype)
            seen_BQ = jnp.ones((len(source_BPD), self.c.queries), bool)
            mask = key_mask(jnp.concatenate([seen_BQ, mask_BL.astype(bool)], axis=1))
        asked_BQD, text_BLD, _ = self.run(source_BPD, text_BLD, mask, key)
        return jnp.concatenate([asked_BQD, text_BLD], axis=1)

    def embed(self, ids_BL, dtype, start=0):
        """Words of a text whose first stands at position `start`."""
        positions = start + jnp.arange(ids_BL.shape[1])
        return self.words(ids_BL, dtype) + self.positions(positions, dtype)

    def run(self, source_BPD, text_BLD, mask, key, earlier=None):
        """Queries (B, Q, D), text (B, L, D) and the keys and values of all layers, layers on axis 0.

        No queries where there is no picture, no text where there is none. `earlier` keys and values are seen too.
        """
        c = self.c
        groups, rest = divmod(c.layers, c.cross_every)
        keys = split_key(key, groups + 3)
        some = text_BLD if source_BPD is None else source_BPD
        asked_BQD = text = jnp.zeros((len(some), 0, c.width), some.dtype)
        if source_BPD is not None:
            shape = (len(source_BPD), c.queries, c.width)
            asked_BQD = jnp.broadcast_to(self.queries.astype(source_BPD.dtype), shape)
        text = text if text_BLD is None else text_BLD
        x = tuple(dropout(self.norm(x), c.dropout, k) for x, k in zip((asked_BQD, text), keys))
        earlier, made = earlier or {"groups": None, "tail": None}, {"groups": None, "tail": None}
        if groups:
            group_keys = None if key is None else jnp.stack(keys[3:])
            x, made["groups"] = self.groups(x, (group_keys, earlier["groups"]), source_BPD, mask)
        if rest:
            before = jax.tree.map(lambda leaf: leaf[0], earlier["tail"])
            x, new = self.tail(x, (keys[2], before), source_BPD, mask)
            made["tail"] = jax.tree.map(lambda leaf: leaf[None], new)
        return *x, made


class FusionBlock(nn.Module):
    """A block of the aggregator, in the scan's calling convention."""

    c: AggregatorConfig

    @nn.compact
    def __call__(self, x_BPD, layer):
        c = self.c
        context_BPD, key = layer
        block = PostNormBlock(c.width, c.heads, c.hidden, c.eps, c.dropout, c.width, zero_out=True, name="block")
        nothing_B0D = x_BPD[:, :0]
        return block(x_BPD, nothing_B0D, context_BPD, None, key)[0], None


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
    return (*under(f"{theirs}.", f"{ours}_attention/", rows), *norm_rows(f"{theirs}.output.LayerNorm", f"{ours}_norm"))


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
    return (Row("query_tokens", "queries", reshaped((1, c.queries, c.width), (c.queries, c.width))),)


def aggregator_rows(c: AggregatorConfig) -> tuple[Row, ...]:
    """Names under `fusion_adapter.` in LION."""
    head = c.width // c.heads
    block = (
        *_attention_rows("attention", "self", c.heads, head),
        *_attention_rows("crossattention", "cross", c.heads, head),
        *_feed_rows("", "mlp", "norm"),
    )
    return under("blocks.{i}.", "blocks/block/", block)
