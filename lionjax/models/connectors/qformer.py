# SPDX-License-Identifier: Apache-2.0
"""The Q-Former (BLIP-2, arXiv 2301.12597; InstructBLIP, 2305.06500) and LION's vision aggregator (2311.11860).

Both use a post-norm block of self-attention, cross-attention to image features and feed-forward. In the Q-Former,
queries and text share the self-attention, every second block has cross-attention (of the queries only), and queries
and text have separate feed-forwards.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.types import UserError
from lionjax.core.weight_map import Transform, WeightMapping, constant, rename_torch_keys, reshape, with_prefix
from lionjax.models.language.bert import BertLayersConfig
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention, key_padding_mask
from lionjax.nn.layers import (
    MLP,
    Embed,
    LayerNorm,
    dense_weight_map,
    dropout,
    fold_in,
    norm_weight_map,
    normal,
    scan_blocks,
    split_key,
    zeros,
)
from lionjax.nn.lora import LoraConfig


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class QFormerConfig(BertLayersConfig):
    """Config; the defaults are BERT-base. `vocab_size` 30523 is that of bert-base-uncased with `[DEC]`.

    `copy_sharpness`: attention to a source of the same width starts by copying what resembles its query (see
    `attention.copying_inits`), in place of the trained attention of BERT and BLIP-2, and self-attention too, with a
    sharpness of 1. To a source of another width it starts random and as sharp: nearly uniform attention gives its mean.
    None: random, as BERT's.
    """

    num_query_tokens: int = 32
    cross_attention_frequency: int = 2
    vision_width: int = 1408
    vocab_size: int = 30523
    max_positions: int = 512
    use_text_input: bool = True  # read the instruction (InstructBLIP); False: queries only (BLIP-2 after stage 1)
    copy_sharpness: float | None = None

    @property
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """The cross-attentions of a block that has them."""
        return (CrossAttention("cross", self.num_query_tokens, self.vision_width),)

    @property
    def default_processor(self) -> dict[str, int]:
        """Fields of ProcessorConfig for questions that fit the learned positions, where those are few."""
        is_short = self.use_text_input and self.max_positions < 128
        return {"max_question_tokens": self.max_positions} if is_short else {}


TINY_QFORMER = QFormerConfig(128, 4, 4, 256, 8, vision_width=128, vocab_size=1024, max_positions=96, dropout=0.0)


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class AggregatorConfig:
    """Config of LION's vision aggregator: the ViT layers of queries and context, and the MLP projector after it."""

    query_layer: int = 38
    context_layers: tuple[int, ...] = (28, 18)
    width: int = 1408
    num_heads: int = 16
    mlp_dim: int = 3072  # BERT's default instead of 4 * width, as in the release
    norm_eps: float = 1e-12
    dropout: float = 0.1
    projector_mlp_dim: int = 5632  # hidden size of the MLP projector to the language model


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """A cross-attention of some of the queries: its name, how many of them, and the width of what they attend to."""

    name: str
    num_queries: int
    source_width: int


class PostNormBlock(nn.Module):
    """norm(x + f(x)) for self-attention, cross-attention (of the queries only) and feed-forward(s).

    Consecutive queries belong to the `cross_attentions`, each of which has its own weights and its own source.
    """

    width: int
    num_heads: int
    mlp_dim: int
    norm_eps: float
    dropout_rate: float
    cross_attentions: tuple[CrossAttention, ...] = ()
    separate_text_mlp: bool = False  # a feed-forward for the text; False: none
    zero_init_output: bool = False  # zero output projections at the start, as in LION's aggregator
    lora: LoraConfig = LoraConfig()
    copy_sharpness: float | None = None

    def make_attention(self, name, source_width=None):
        out = zeros if self.zero_init_output else normal(0.02)
        inits = (normal(0.02), normal(0.02), normal(0.02), out)
        if self.copy_sharpness is not None:
            copying = attentions.copying_inits(1.0 if source_width is None else self.copy_sharpness)
            keeping = normal(self.width**-0.5)  # which keeps the scale of sources of another width
            sharp = normal((self.copy_sharpness / self.width) ** 0.5)
            wide = (sharp, sharp, keeping, keeping)
            inits = copying if source_width in (None, self.width) else wide
        head = self.width // self.num_heads
        return Attention(
            self.width,
            self.num_heads,
            head,
            source_width,
            dropout_rate=self.dropout_rate,
            kernel_inits=inits,
            lora=self.lora,
            name=name,
        )

    def make_norm(self, name):
        return LayerNorm(self.width, self.norm_eps, name=name)

    @nn.compact
    def __call__(self, query_BQD, text_BLD, sources, mask, key, past_kv=None):
        """Queries (B, Q, D), text (B, L, D), either may be empty, and the self-attention's keys and values of both.

        `sources`: for each cross-attention its features (B, P, D') and the mask of its keys. `past_kv`: keys and values
        before them, to which both attend too.
        """
        keys = split_key(key, 6)
        x_BLD = jnp.concatenate([query_BQD, text_BLD], axis=1)
        attention = self.make_attention("self_attention")
        keys_values = new_kv = attention.project_key_value(x_BLD, keys[0])
        if past_kv is not None:
            keys_values = tuple(jnp.concatenate(pair, axis=1) for pair in zip(past_kv, new_kv))
        change = attention.attend(attention.project_query(x_BLD, keys[0]), keys_values, mask, None, keys[0])
        x_BLD = self.make_norm("self_norm")(x_BLD + dropout(change, self.dropout_rate, keys[1]))
        queries = query_BQD.shape[1]
        query_BQD, text_BLD = x_BLD[:, :queries], x_BLD[:, queries:]
        if self.cross_attentions and queries:
            ends = np.cumsum([cross.num_queries for cross in self.cross_attentions])[:-1]
            parts = zip(self.cross_attentions, jnp.split(query_BQD, ends, axis=1), sources)
            source_keys = [
                keys[2:4],
                *(split_key(fold_in(keys[2], n), 2) for n in range(1, len(self.cross_attentions))),
            ]
            attended = [self.attend_to_source(*part, pair) for part, pair in zip(parts, source_keys)]
            query_BQD = jnp.concatenate(attended, axis=1)
        if queries:
            query_BQD = self.feed_forward("mlp", "norm", query_BQD, keys[4])
        if self.separate_text_mlp and text_BLD.shape[1]:
            text_BLD = self.feed_forward("text_mlp", "text_norm", text_BLD, keys[5])
        return query_BQD, text_BLD, new_kv

    def attend_to_source(self, cross: CrossAttention, query_BQD, source, keys):
        attention, (source_BPD, mask) = self.make_attention(f"{cross.name}_attention", cross.source_width), source
        change = attention(query_BQD, source_BPD, mask, key=keys[0])
        return self.make_norm(f"{cross.name}_norm")(query_BQD + dropout(change, self.dropout_rate, keys[1]))

    def feed_forward(self, mlp_name, norm_name, x_BLD, key):
        mlp = MLP(self.width, self.mlp_dim, zero_init_output=self.zero_init_output, lora=self.lora, name=mlp_name)
        change = mlp(x_BLD, key)
        return self.make_norm(norm_name)(x_BLD + dropout(change, self.dropout_rate, key))


class CrossAttentionGroup(nn.Module):
    """One block with cross-attention to the image, then `num_blocks` - 1 without."""

    c: QFormerConfig
    num_blocks: int

    @nn.compact
    def __call__(self, x, layer, sources, mask):
        c, (query_BQD, text_BLD), (key, past_kv) = self.c, x, layer
        keys, new_kvs = split_key(key, self.num_blocks), []
        for member in range(self.num_blocks):
            block = PostNormBlock(
                c.width,
                c.num_heads,
                c.mlp_dim,
                c.norm_eps,
                c.dropout,
                c.cross_attentions if member == 0 else (),
                c.use_text_input,
                lora=c.lora,
                copy_sharpness=c.copy_sharpness,
                name=f"block_{member}",
            )
            block_past_kv = None if past_kv is None else past_kv[member]
            query_BQD, text_BLD, new_kv = block(query_BQD, text_BLD, sources, mask, keys[member], block_past_kv)
            new_kvs.append(new_kv)
        x = (with_logical_constraint(x, "batch", "length", "act_embed") for x in (query_BQD, text_BLD))
        return tuple(x), tuple(new_kvs)


class QFormer(nn.Module):
    """States (B, Q + L, D) of learned queries and text, from image features (B, P, D) and text ids (B, L).

    The first Q are those of the queries; without text there are no others. Layers are scanned in groups of
    `cross_attention_frequency`; the remaining ones come last.
    """

    c: QFormerConfig

    def setup(self):
        c = self.c
        groups, num_tail = divmod(c.depth, c.cross_attention_frequency)
        init = with_logical_partitioning(normal(0.02), ("position", "embed"))
        # Queries of each cross-attention by themselves, so that those of BLIP-2 can start those of the image.
        self.query_parts = tuple(
            self.param(query_name(cross), init, (cross.num_queries, c.width)) for cross in c.cross_attentions
        )
        if c.use_text_input:
            self.words = Embed(c.vocab_size, c.width)
            self.positions = Embed(c.max_positions, c.width)
        self.norm = LayerNorm(c.width, c.norm_eps)
        if groups:
            self.groups = scan_blocks(CrossAttentionGroup, groups, 2, unchecked_in=self)(c, c.cross_attention_frequency)
        if num_tail:
            self.tail = CrossAttentionGroup(c, num_tail)

    def __call__(self, source_BPD, ids_BL=None, mask_BL=None, key=None, regions=None, position_BL=None):
        text_BLD = mask = None
        if ids_BL is not None:
            text_BLD = self.embed_text(ids_BL, source_BPD.dtype, position_BL)
            query_mask_BQ = jnp.ones((len(source_BPD), self.c.num_query_tokens), bool)
            mask = key_padding_mask(jnp.concatenate([query_mask_BQ, mask_BL.astype(bool)], axis=1))
        query_BQD, text_BLD, _ = self.run_blocks(source_BPD, text_BLD, mask, key, regions=regions)
        return jnp.concatenate([query_BQD, text_BLD], axis=1)

    def embed_text(self, ids_BL, dtype, position_BL=None):
        """Token plus position embeddings (B, L, D); positions default to 0..L-1.

        Raises UserError for more tokens than learned positions, unless positions are given.
        """
        if position_BL is None and (length := ids_BL.shape[1]) > self.c.max_positions:
            raise UserError(
                f"{length} tokens do not fit the {self.c.max_positions} learned positions of the Q-Former; lower "
                "processor.max_question_tokens"
            )
        position_BL = jnp.arange(ids_BL.shape[1]) if position_BL is None else position_BL
        return self.words(ids_BL, dtype) + self.positions(position_BL, dtype)

    def run_blocks(self, source_BPD, text_BLD, mask, key, past_kv=None, regions=None):
        """Queries (B, Q, D), text (B, L, D) and the keys and values of all layers, layers on axis 0.

        Without image features there are no queries (Q = 0), without `text_BLD` no text (L = 0). `past_kv`: keys and
        values of an earlier call, to which all attend too. `regions`: features (B, K, D') of regions and which of them
        are real (B, K), None for all, if the config has a cross-attention to regions (see `mqformer`).
        """
        c = self.c
        groups, num_tail = divmod(c.depth, c.cross_attention_frequency)
        keys = split_key(key, groups + 3)
        like = text_BLD if source_BPD is None else source_BPD
        query_BQD = empty_B0D = jnp.zeros((len(like), 0, c.width), like.dtype)
        if source_BPD is not None:
            shape = (len(source_BPD), c.num_query_tokens, c.width)
            query_QD = jnp.concatenate(self.query_parts)
            query_BQD = jnp.broadcast_to(query_QD.astype(source_BPD.dtype), shape)
        text_BLD = empty_B0D if text_BLD is None else text_BLD
        x = tuple(dropout(self.norm(x), c.dropout, k) for x, k in zip((query_BQD, text_BLD), keys))
        sources = ((source_BPD, None),)
        if regions is not None:
            region_BKD, valid_BK = regions
            region_BKD = region_BKD.astype(source_BPD.dtype)
            sources = (*sources, (region_BKD, None if valid_BK is None else key_padding_mask(valid_BK)))
        past_kv, new_kv = past_kv or {"groups": None, "tail": None}, {"groups": None, "tail": None}
        if groups:
            group_keys = None if key is None else jnp.stack(keys[3:])
            x, new_kv["groups"] = self.groups(x, (group_keys, past_kv["groups"]), sources, mask)
        if num_tail:
            tail_past_kv = jax.tree.map(lambda leaf: leaf[0], past_kv["tail"])
            x, tail_kv = self.tail(x, (keys[2], tail_past_kv), sources, mask)
            new_kv["tail"] = jax.tree.map(lambda leaf: leaf[None], tail_kv)
        return *x, new_kv


class FusionBlock(nn.Module):
    """A block of the aggregator with the signature of `scan_blocks`."""

    c: AggregatorConfig

    @nn.compact
    def __call__(self, x_BPD, layer):
        c = self.c
        context_BPD, key = layer
        cross = CrossAttention("cross", x_BPD.shape[1], c.width)
        block = PostNormBlock(
            c.width, c.num_heads, c.mlp_dim, c.norm_eps, c.dropout, (cross,), zero_init_output=True, name="block"
        )
        no_text_B0D = x_BPD[:, :0]
        return block(x_BPD, no_text_B0D, ((context_BPD, None),), None, key)[0], None


class Aggregator(nn.Module):
    """LION's FusionAdapter: features (B, P, D) of a late ViT layer attend to those of earlier layers (T, B, P, D).

    There is one block for each context layer, without masks. Returns (B, P, D).
    """

    c: AggregatorConfig

    @nn.compact
    def __call__(self, query_BPD, context_TBPD, key=None):
        c = self.c
        depth = len(c.context_layers)
        keys = None if key is None else jnp.stack(split_key(key, depth))
        x_BPD, _ = scan_blocks(FusionBlock, depth, unchecked_in=self)(c, name="blocks")(query_BPD, (context_TBPD, keys))
        return x_BPD


def _attention_weight_map(
    torch_module: str, flax_name: str, num_heads: int, head_dim: int
) -> tuple[WeightMapping, ...]:
    """BERT's names of an attention layer and the norm after it."""
    linears = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    rows = attentions.weight_map(linears, num_heads, head_dim, "qkvo")
    return (
        *with_prefix(f"{torch_module}.", f"{flax_name}_attention/", rows),
        *norm_weight_map(f"{torch_module}.output.LayerNorm", f"{flax_name}_norm"),
    )


def _feed_forward_weight_map(suffix: str, mlp: str, norm: str) -> tuple[WeightMapping, ...]:
    return (
        *dense_weight_map(f"intermediate{suffix}.dense", f"{mlp}/up"),
        *dense_weight_map(f"output{suffix}.dense", f"{mlp}/down"),
        *norm_weight_map(f"output{suffix}.LayerNorm", norm),
    )


def lavis_weight_map(c: QFormerConfig) -> tuple[WeightMapping, ...]:
    """Names under `Qformer.bert.` in LAVIS and LION; for the queries see `query_tokens_weight_map`."""
    head = c.width // c.num_heads
    self_only = (
        *_attention_weight_map("attention", "self", c.num_heads, head),
        *_feed_forward_weight_map("_query", "mlp", "norm"),
        *(_feed_forward_weight_map("", "text_mlp", "text_norm") if c.use_text_input else ()),
    )
    torch_modules = {"cross": "crossattention", "region": "detection_crossattention"}
    pairs = ((torch_modules[cross.name], cross.name) for cross in c.cross_attentions)
    with_cross = (*self_only, *(row for pair in pairs for row in _attention_weight_map(*pair, c.num_heads, head)))
    groups, num_tail = divmod(c.depth, c.cross_attention_frequency)
    rows = [
        constant("embeddings.position_ids", lambda: np.arange(c.max_positions)[None]),
        *norm_weight_map("embeddings.LayerNorm", "norm"),
    ]
    if c.use_text_input:
        rows += [
            WeightMapping("embeddings.word_embeddings.weight", "words/table"),
            WeightMapping("embeddings.position_embeddings.weight", "positions/table"),
        ]
    for member in range(c.cross_attention_frequency if groups else 0):
        layer = f"encoder.layer.{{{c.cross_attention_frequency}i+{member}<{groups}}}."
        rows += with_prefix(layer, f"groups/block_{member}/", self_only if member else with_cross)
    for member in range(num_tail):
        layer = f"encoder.layer.{groups * c.cross_attention_frequency + member}."
        rows += with_prefix(layer, f"tail/block_{member}/", self_only if member else with_cross)
    return tuple(rows)


def hf_weight_map(c: QFormerConfig) -> tuple[WeightMapping, ...]:
    """Names under `qformer.` in Hugging Face's InstructBLIP, or without text input in its BLIP-2."""
    norm = "embeddings.layernorm" if c.use_text_input else "layernorm"
    pairs = (("attention.self.", "attention.attention."), ("embeddings.LayerNorm", norm))
    return rename_torch_keys((row for row in lavis_weight_map(c) if row.flax_paths), *pairs)


def query_name(cross: CrossAttention) -> str:
    """The name of the parameter of its queries."""
    return "queries" if cross.name == "cross" else f"{cross.name}_queries"


def query_tokens_weight_map(c: QFormerConfig) -> tuple[WeightMapping, ...]:
    """The mapping of the learned queries, one tensor in torch."""
    if len(c.cross_attentions) == 1:
        shape = (c.num_query_tokens, c.width)
        return (WeightMapping("query_tokens", "queries", reshape((1, *shape), shape)),)
    ends = np.cumsum([cross.num_queries for cross in c.cross_attentions])[:-1]
    split = Transform(
        f"queries({', '.join(map(str, ends))})",
        lambda w: tuple(np.split(w[0], ends)),
        lambda *leaves: np.concatenate(leaves)[None],
    )
    return (WeightMapping("query_tokens", tuple(map(query_name, c.cross_attentions)), split),)


def aggregator_weight_map(c: AggregatorConfig) -> tuple[WeightMapping, ...]:
    """Names under `fusion_adapter.` in LION."""
    head = c.width // c.num_heads
    block = (
        *_attention_weight_map("attention", "self", c.num_heads, head),
        *_attention_weight_map("crossattention", "cross", c.num_heads, head),
        *_feed_forward_weight_map("", "mlp", "norm"),
    )
    return with_prefix("blocks.{i}.", "blocks/block/", block)
