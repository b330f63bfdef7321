# SPDX-License-Identifier: Apache-2.0
"""T5 v1.1 and FlanT5 (arXiv 1910.10683, 2210.11416): an encoder-decoder with optional routed adapters.

The encoder takes embeddings, not ids, so that image tokens can be mixed with text tokens. Attention has no 1/sqrt(d)
scale, norms are RMSNorm, dense layers have no bias, and all layers of a stack share one relative position table.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint
from lionjax.core.types import Cache
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.base_configs import LanguageModelConfig
from lionjax.nn import adapters
from lionjax.nn import attention as attentions
from lionjax.nn.adapters import RoutedAdapters
from lionjax.nn.attention import Attention, causal_mask, key_padding_mask, update_kv_cache
from lionjax.nn.kv_cache import slot_ages, tokens_before
from lionjax.nn.layers import (
    Dense,
    Embed,
    GatedMLP,
    RMSNorm,
    dense_weight_map,
    dropout,
    norm_weight_map,
    normal,
    remat_block,
    scan_blocks,
    split_key,
)
from lionjax.nn.positions import RelativePositionBias


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class T5Config(LanguageModelConfig):
    """Config of a T5 v1.1; `activation` is gelu_tanh in FlanT5's release, gelu (erf) in LION."""

    vocab_size: int = 32128
    width: int = 2048
    head_dim: int = 64
    num_heads: int = 32
    mlp_dim: int = 5120
    encoder_depth: int = 24
    decoder_depth: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    dropout: float = 0.1
    decoder_start_token_id: int = 0
    eos_token_id: int = 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table and columns of the output head."""
        return self.vocab_size


FLAN_T5_XL = T5Config()
FLAN_T5_XXL = T5Config(width=4096, num_heads=64, mlp_dim=10240)
TINY_T5 = T5Config(  # ships with the project
    vocab_size=1024,
    width=128,
    head_dim=32,
    num_heads=4,
    mlp_dim=384,
    encoder_depth=4,
    decoder_depth=3,
    dropout=0.0,
    activation="gelu",
)


def make_attention(c: T5Config, name: str) -> Attention:
    """Attention with T5's initial scales: queries are small because scores are not divided by sqrt(head_dim)."""
    inner = c.num_heads * c.head_dim
    inits = (normal((c.width * c.head_dim) ** -0.5), normal(c.width**-0.5), normal(c.width**-0.5), normal(inner**-0.5))
    return Attention(
        c.width,
        c.num_heads,
        c.head_dim,
        biases="",
        scale=1.0,
        dropout_rate=c.dropout,
        kernel_inits=inits,
        lora=c.lora,
        name=name,
    )


class FeedForward(nn.Module):
    """h + mlp(norm(h)) + adapters(h): the adapters read the residual stream before the norm (LION)."""

    c: T5Config

    @nn.compact
    def __call__(self, h_BLD, task_B, key):
        c = self.c
        keys = split_key(key, 2)
        mlp = GatedMLP(c.width, c.mlp_dim, c.activation, normal(c.width**-0.5), c.lora, name="mlp")
        change_BLD = mlp(RMSNorm(c.width, c.norm_eps, name="norm")(h_BLD), c.dropout, keys[0])
        out_BLD = h_BLD + dropout(change_BLD, c.dropout, keys[1])
        if c.adapters is not None:
            out_BLD = out_BLD + RoutedAdapters(c.width, c.adapters, name="adapters")(h_BLD, task_B)
        return with_logical_constraint(out_BLD, "batch", "length", "act_embed")


class EncoderBlock(nn.Module):
    c: T5Config

    @nn.compact
    def __call__(self, h_BLD, key, mask, bias, task_B):
        c = self.c
        keys = split_key(key, 3)
        change = make_attention(c, "attention")(
            RMSNorm(c.width, c.norm_eps, name="norm")(h_BLD), mask=mask, bias=bias, key=keys[0]
        )
        h_BLD = h_BLD + dropout(change, c.dropout, keys[1])
        return FeedForward(c, name="feed_forward")(h_BLD, task_B, keys[2]), None


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the encoder, feed-forward.

    The scan carry is (h, cache): `cache` holds the keys and values of all layers (layers, B, N, S, H), into which the
    block writes its own; None: the whole answer is one forward pass. The scanned inputs are the layer's number, its
    dropout key and its cross-attention keys and values (B, N, S, H), None if they are to be computed from
    `encoded_BLD`; with a cache, those are returned.
    """

    c: T5Config

    @nn.compact
    def __call__(self, carry, layer, mask, bias, encoded_BLD, encoded_mask, task_B, slot):
        c = self.c
        h_BMD, cache = carry
        number, key, cross_kv = layer
        keys = split_key(key, 5)
        self_attention = make_attention(c, "self_attention")
        x_BMD = RMSNorm(c.width, c.norm_eps, name="self_norm")(h_BMD)
        keys_values, past_kv = self_attention.project_key_value(x_BMD, keys[0]), ()
        if cache is not None:
            new_kv = (x.swapaxes(1, 2) for x in keys_values)
            cache = tuple(update_kv_cache(old, new, number, slot) for old, new in zip(cache, new_kv, strict=True))
            keys_values, past_kv = None, (tuple(layers[number] for layers in cache),)
        query = self_attention.project_query(x_BMD, keys[0])
        change = self_attention.attend(query, keys_values, mask, bias, keys[0], past_kv)
        h_BMD = h_BMD + dropout(change, c.dropout, keys[1])

        cross_attention = make_attention(c, "cross_attention")
        x_BMD = RMSNorm(c.width, c.norm_eps, name="cross_norm")(h_BMD)
        keys_values = new_cross_kv = None
        if cross_kv is None:
            keys_values = cross_attention.project_key_value(encoded_BLD, keys[2])
            new_cross_kv = None if cache is None else tuple(x.swapaxes(1, 2) for x in keys_values)
        query = cross_attention.project_query(x_BMD, keys[2])
        past_kv = () if cross_kv is None else (cross_kv,)
        change = cross_attention.attend(query, keys_values, encoded_mask, None, keys[2], past_kv)
        h_BMD = h_BMD + dropout(change, c.dropout, keys[3])
        h_BMD = FeedForward(c, name="feed_forward")(h_BMD, task_B, keys[4])
        return (h_BMD, cache), new_cross_kv


class Encoder(nn.Module):
    c: T5Config

    @nn.compact
    def __call__(self, x_BLD, mask_BL, task_B, key):
        c = self.c
        keys = split_key(key, c.encoder_depth + 2)
        layer_keys = None if key is None else jnp.stack(keys[2:])
        positions = jnp.arange(x_BLD.shape[1])
        bias = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, True, c.width, name="relative")(
            positions, positions
        )
        h_BLD = dropout(x_BLD, c.dropout, keys[0])
        blocks = scan_blocks(remat_block(EncoderBlock, c.remat), c.encoder_depth, 3, unchecked_in=self)(
            c, name="blocks"
        )
        h_BLD, _ = blocks(h_BLD, layer_keys, key_padding_mask(mask_BL), bias, task_B)
        return dropout(RMSNorm(c.width, c.norm_eps, name="norm")(h_BLD), c.dropout, keys[1])


class Decoder(nn.Module):
    c: T5Config

    @nn.compact
    def __call__(
        self, x_BMD, encoded_BLD, encoded_mask_BL, task_B, key, cache=None, step=0, mask_BM=None, before_B=None
    ):
        """`before_B`: with a cache, the tokens of each row in it; None: `step` for all."""
        c = self.c
        keys = split_key(key, c.decoder_depth + 2)
        layer_keys = None if key is None else jnp.stack(keys[2:])
        query_positions = step + jnp.arange(x_BMD.shape[1])
        key_positions, mask, slot = query_positions, causal_mask(mask_BM), step
        if cache is not None:  # one token, written into a slot of the ring
            num_slots = cache["self_k"].shape[3]
            age_S, slot = slot_ages(step, num_slots), step % num_slots
            key_positions = step - age_S
            before_B = jnp.reshape(step if before_B is None else before_B, (-1,))
            mask = (age_S <= before_B[:, None])[:, None, None]
        relative = RelativePositionBias(c.num_heads, c.num_buckets, c.max_distance, False, c.width, name="relative")
        bias = relative(query_positions, key_positions)
        h_BMD = dropout(x_BMD, c.dropout, keys[0])
        blocks = scan_blocks(remat_block(DecoderBlock, c.remat), c.decoder_depth, 6, unchecked_in=self)(
            c, name="blocks"
        )
        self_kv = cross_kv = None
        if cache is not None:
            self_kv = (cache["self_k"], cache["self_v"])
            cross_kv = (cache["cross_k"], cache["cross_v"]) if encoded_BLD is None else None
        layers = (jnp.arange(c.decoder_depth), layer_keys, cross_kv)
        shared = (mask, bias, encoded_BLD, key_padding_mask(encoded_mask_BL), task_B, slot)
        (h_BMD, self_kv), new_cross_kv = blocks((h_BMD, self_kv), layers, *shared)
        return dropout(RMSNorm(c.width, c.norm_eps, name="norm")(h_BMD), c.dropout, keys[1]), (self_kv, new_cross_kv)


class T5(nn.Module):
    """T5 as a `LanguageBackend`; `encode` and `decode` can also be called separately."""

    c: T5Config

    def setup(self):
        c = self.c
        self.embedding = Embed(c.vocab_size, c.width, normal(1.0))
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.head = Dense(c.width, c.vocab_size, ("embed", "vocab"), False, normal(c.width**-0.5), c.lora)

    def embed(self, ids_BL, dtype=jnp.float32):
        return self.embedding(ids_BL, dtype)

    def encode(self, x_BLD, mask_BL, task_B=None, key=None):
        """Encoder states (B, L, D) of embeddings (B, L, D)."""
        return self.encoder(x_BLD, mask_BL, task_B, key)

    def decode(self, ids_BM, mask_BM, encoded_BLD, encoded_mask_BL, task_B=None, key=None):
        """Logits (B, M, V) in float32 of the token after each of `ids_BM`, whose first is the decoder start token."""
        x_BMD = self.embed(ids_BM, encoded_BLD.dtype)
        return self.logits(self.hidden_states(x_BMD, mask_BM, encoded_BLD, encoded_mask_BL, task_B, key))

    def hidden_states(self, x_BMD, mask_BM, encoded_BLD, encoded_mask_BL, task_B=None, key=None):
        """Decoder states (B, M, D) of the embeddings of a whole answer."""
        return self.decoder(x_BMD, encoded_BLD, encoded_mask_BL, task_B, key, mask_BM=mask_BM)[0]

    def logits(self, state_BMD):
        """Logits (..., V) in float32 of states (..., D)."""
        return self.head(state_BMD).astype(jnp.float32)

    def forward(self, x_BLD, mask_BL, target_BMD, target_mask_BM, task_B=None, keys=(None, None), after: bool = False):
        """See `backend.LanguageBackend`. `after`: also compute the states after each target token."""
        encoded_BLD = self.encode(x_BLD, mask_BL, task_B, keys[0])
        start_B1 = jnp.full((len(target_BMD), 1), self.c.decoder_start_token_id, jnp.int32)
        start_B1D = self.embed(start_B1, encoded_BLD.dtype)
        if not after:
            x_BMD = jnp.concatenate([start_B1D, target_BMD[:, :-1]], axis=1)
            return self.hidden_states(x_BMD, target_mask_BM, encoded_BLD, mask_BL, task_B, keys[1]), None
        x_BMD = jnp.concatenate([start_B1D, target_BMD], axis=1)
        mask_BM = jnp.concatenate([jnp.ones_like(target_mask_BM[:, :1]), target_mask_BM], axis=1)
        state_BMD = self.hidden_states(x_BMD, mask_BM, encoded_BLD, mask_BL, task_B, keys[1])
        return state_BMD[:, :-1], state_BMD[:, 1:]

    def prefill(self, x_BLD, mask_BL, cache_length: int, task_B=None):
        """State (B, D) of the decoder start token, and a cache of the input with `cache_length` free slots."""
        return self.prefill_encoded(self.encode(x_BLD, mask_BL, task_B), mask_BL, cache_length, task_B)

    def prefill_encoded(self, encoded_BLD, encoded_mask_BL, cache_length: int, task_B=None):
        """As `prefill`, for encoder states `encoded_BLD` (B, L, D)."""
        c = self.c
        batch, dtype = encoded_BLD.shape[0], encoded_BLD.dtype
        shape = (c.decoder_depth, batch, c.num_heads, 1 + cache_length, c.head_dim)
        empty = {"self_k": jnp.zeros(shape, dtype), "self_v": jnp.zeros(shape, dtype)}
        start_B1 = jnp.full((batch, 1), c.decoder_start_token_id, jnp.int32)
        h_B1D, (self_kv, cross_kv) = self.decoder(
            self.embed(start_B1, dtype), encoded_BLD, encoded_mask_BL, task_B, None, empty
        )
        static = {
            "cross_k": cross_kv[0],
            "cross_v": cross_kv[1],
            "mask": encoded_mask_BL[None],
            "task": task_B[None] if task_B is not None else None,
        }
        cache = Cache({"self_k": self_kv[0], "self_v": self_kv[1]}, static, jnp.ones((), jnp.int32))
        return h_B1D[:, 0], cache

    def embed_next(self, token_B, cache: Cache):
        """Embeddings (B, D) of the tokens in the dtype of the cache."""
        return self.embed(token_B, cache.generated["self_k"].dtype)

    def extend(self, x_BD, cache: Cache):
        """State (B, D) of the input embedding `x_BD`, and the cache with that input."""
        static, x_B1D = cache.static, x_BD[:, None]
        cross_kv = {"cross_k": static["cross_k"], "cross_v": static["cross_v"]}
        task_B = None if static["task"] is None else static["task"][0]
        before_B = tokens_before(cache, len(x_BD))
        h_B1D, (self_kv, _) = self.decoder(
            x_B1D, None, static["mask"][0], task_B, None, cache.generated | cross_kv, cache.step, before_B=before_B
        )
        generated = cache.generated | {"self_k": self_kv[0], "self_v": self_kv[1]}
        return h_B1D[:, 0], dataclasses.replace(cache, generated=generated, step=cache.step + 1)


def shift_right(target_BM, decoder_start_token_id: int):
    """Decoder input ids (B, M): the decoder start token, then the target without its last token."""
    start_B1 = jnp.full_like(target_BM[:, :1], decoder_start_token_id)
    return jnp.concatenate([start_B1, target_BM[:, :-1]], axis=1)


def weight_map(c: T5Config) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's T5ForConditionalGeneration with an untied head, and LION's names for adapters."""
    relative = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # only the first layer stores it
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return (
        WeightMapping("shared.weight", "embedding/table", tied_keys=aliases),
        WeightMapping("encoder." + relative, "encoder/relative/table"),
        WeightMapping("decoder." + relative, "decoder/relative/table"),
        *norm_weight_map("encoder.final_layer_norm", "encoder/norm", bias=False),
        *norm_weight_map("decoder.final_layer_norm", "decoder/norm", bias=False),
        *with_prefix(
            "encoder.block.{i}.layer.0.",
            "encoder/blocks/",
            _attention_weight_map(c, "SelfAttention", "attention", "norm"),
        ),
        *with_prefix("encoder.block.{i}.layer.1.", "encoder/blocks/feed_forward/", _feed_forward_weight_map(c)),
        *with_prefix(
            "decoder.block.{i}.layer.0.",
            "decoder/blocks/",
            _attention_weight_map(c, "SelfAttention", "self_attention", "self_norm"),
        ),
        *with_prefix(
            "decoder.block.{i}.layer.1.",
            "decoder/blocks/",
            _attention_weight_map(c, "EncDecAttention", "cross_attention", "cross_norm"),
        ),
        *with_prefix("decoder.block.{i}.layer.2.", "decoder/blocks/feed_forward/", _feed_forward_weight_map(c)),
        *dense_weight_map("lm_head", "head", bias=False),
    )


def _attention_weight_map(
    c: T5Config, torch_module: str, flax_module: str, flax_norm: str
) -> tuple[WeightMapping, ...]:
    rows = attentions.weight_map({x: f"{torch_module}.{x}" for x in "qkvo"}, c.num_heads, c.head_dim, "")
    return (*with_prefix("", f"{flax_module}/", rows), *norm_weight_map("layer_norm", flax_norm, bias=False))


def _feed_forward_weight_map(c: T5Config) -> tuple[WeightMapping, ...]:
    rows = (
        *norm_weight_map("layer_norm", "norm", bias=False),
        *dense_weight_map("DenseReluDense.wi_0", "mlp/gate", bias=False),
        *dense_weight_map("DenseReluDense.wi_1", "mlp/up", bias=False),
        *dense_weight_map("DenseReluDense.wo", "mlp/down", bias=False),
    )
    if c.adapters is None:
        return rows
    return (*rows, *with_prefix("adapter.", "adapters/", adapters.adapter_weight_map(c.adapters)))
