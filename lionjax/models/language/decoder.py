# SPDX-License-Identifier: Apache-2.0
"""Causal decoder: LLaMA (Vicuna, SmolLM), OPT, GPT-2, MPT and the Kosmos-2 text model as configs of one module.

It maps embeddings to hidden states, so that image tokens and boxes can be mixed with text tokens; `logits` projects
them to the vocabulary. Positions count real tokens only, so padding may be left, right or inside a row.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.sharding import with_logical_constraint
from lionjax.core.types import Cache, UserError
from lionjax.models.base_configs import LanguageModelConfig
from lionjax.nn.adapters import GatedCrossAttentionBlock, GatedCrossAttentionConfig, RoutedAdapters
from lionjax.nn.attention import Attention, causal_mask, key_padding_mask, segmented_causal_mask
from lionjax.nn.flash_attention import MASK_VALUE
from lionjax.nn.kv_cache import append_to_cache, slot_ages, tokens_before
from lionjax.nn.layers import (
    MLP,
    Dense,
    Embed,
    GatedMLP,
    LayerNorm,
    dropout,
    make_norm,
    remat_block,
    scan_blocks,
    split_key,
    take_positions,
)
from lionjax.nn.positions import (
    alibi_bias,
    apply_rope,
    last_token,
    position_ids,
    rope_cos_sin,
    segment_positions,
    sinusoidal_positions,
    states_before,
)
from lionjax.nn.rope import RopeScaling

POSITION_TYPES = ("rope", "alibi", "sinusoidal")
NORMS = ("rmsnorm", "layernorm")


@renamed_fields(
    centred=Renamed("norm", {False: "rmsnorm", True: "layernorm"}),
    where=Renamed("position_type", {"turns": "rope", "near": "alibi", "waves": "sinusoidal"}),
)
@dataclasses.dataclass(frozen=True)
class DecoderConfig(LanguageModelConfig):
    """Config of a decoder; the defaults are those of LLaMA 7B (arXiv 2302.13971).

    - `max_positions`: rows of a learned position table, of which the first `position_offset` are unused. 0: positions
      are by `position_type` "rope", "alibi" or "sinusoidal" (the last from `position_offset` on).
    - `gated_mlp`: the feed-forward has a gate and no biases.
    - `norm`: "rmsnorm", or "layernorm", which also subtracts the mean.
    - `attention_biases`: which of q, k, v, o have a bias; "": norms and feed-forward have none either.
    - `qk_norm`: queries and keys are normalized over all heads.
    - `sub_ln`: a norm before the output projection of attention and feed-forward (arXiv 2210.06423).
    - `scale_embeddings`: input embeddings are multiplied by sqrt(width).
    - `cross_attention`: gated cross-attention to images between layers (Flamingo).
    - `num_frozen_embeddings`: this many first rows of the embedding table get no gradient.
    - `pad_vocab_to_multiple_of`: zero rows are added to embedding table and head up to this multiple, so that a mesh
      can split them; their logits are masked, and torch files do not contain them.
    """

    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    norm: str = "rmsnorm"
    attention_biases: str = ""
    max_positions: int = 0
    position_offset: int = 0
    rope_theta: float = 10000.0
    tie_embeddings: bool = False  # the head is the embedding table
    dropout: float = 0.0
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_vocab_to_multiple_of: int = 1
    position_type: str = "rope"
    qk_norm: bool = False
    sub_ln: bool = False
    scale_embeddings: bool = False
    num_frozen_embeddings: int = 0
    cross_attention: GatedCrossAttentionConfig | None = None
    rope_scaling: RopeScaling | None = None  # None: the plain frequencies

    def __post_init__(self):
        check_choices(self, position_type=POSITION_TYPES, norm=NORMS)
        if self.cross_attention is not None and self.depth % self.cross_attention.every_n_layers:
            raise ValueError(
                f"depth is {self.depth}; it must be a multiple of cross_attention.every_n_layers, which is "
                f"{self.cross_attention.every_n_layers}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table and columns of the head, with padding."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of


def _sizes(
    vocab_size: int, *, width: int, depth: int, heads: int, head_dim: int, mlp_dim: int, kv_heads: int | None = None
) -> dict[str, int]:
    """Fields of the sizes; keys and values have as many heads as queries unless `kv_heads` says otherwise."""
    sizes = {"vocab_size": vocab_size, "width": width, "depth": depth, "head_dim": head_dim, "mlp_dim": mlp_dim}
    return sizes | {"num_heads": heads, "num_kv_heads": kv_heads or heads}


def _token_ids(pad: int, bos: int, eos: int) -> dict[str, int]:
    return {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}


VICUNA_7B = DecoderConfig()
VICUNA_13B = DecoderConfig(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13824)
SMOLLM2_135M = DecoderConfig(
    **_sizes(49152, width=576, depth=30, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536),
    **_token_ids(pad=2, bos=1, eos=2),
    rope_theta=100000.0,
    tie_embeddings=True,
)
_BEFORE_LLAMA = DecoderConfig(
    activation="relu", gated_mlp=False, norm="layernorm", attention_biases="qkvo", tie_embeddings=True, dropout=0.1
)
OPT_2_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    **_sizes(50272, width=2560, depth=32, heads=32, head_dim=80, mlp_dim=10240),
    **_token_ids(pad=1, bos=2, eos=2),
    max_positions=2050,
    position_offset=2,
)
GPT2 = dataclasses.replace(
    _BEFORE_LLAMA,
    **_sizes(50257, width=768, depth=12, heads=12, head_dim=64, mlp_dim=3072),
    **_token_ids(pad=50256, bos=50256, eos=50256),
    activation="gelu_tanh",
    max_positions=1024,
)
MPT_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    **_sizes(50432, width=4096, depth=32, heads=32, head_dim=128, mlp_dim=16384),
    **_token_ids(pad=1, bos=0, eos=0),
    activation="gelu",
    attention_biases="",
    dropout=0.0,
    position_type="alibi",
)
MPT_1B = dataclasses.replace(
    MPT_7B, **_sizes(50368, width=2048, depth=24, heads=16, head_dim=128, mlp_dim=8192), qk_norm=True
)
KOSMOS2_TEXT = dataclasses.replace(
    _BEFORE_LLAMA,
    **_sizes(65037, width=2048, depth=24, heads=32, head_dim=64, mlp_dim=8192),
    **_token_ids(pad=1, bos=0, eos=2),
    activation="gelu",
    position_type="sinusoidal",
    position_offset=2,
    sub_ln=True,
    scale_embeddings=True,
)
# PaLM 8B (arXiv 2204.02311), with attention and feed-forward one after the other, where PaLM has them side by side.
PALM_8B = DecoderConfig(
    **_sizes(256_000, width=4096, depth=32, heads=16, kv_heads=1, head_dim=256, mlp_dim=16_384),
    norm="layernorm",
    tie_embeddings=True,
)

# Trained by `python -m lionjax.tiny.pretrain --part decoder` with the embeddings of TINY_T5, so that one ViT is aligned
# to both.
TINY_DECODER = DecoderConfig(
    **_sizes(1024, width=128, depth=4, heads=4, head_dim=32, mlp_dim=128),
    **_token_ids(pad=0, bos=1, eos=1),
    rope_theta=1e6,
    tie_embeddings=True,
)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)) + adapters(x), the adapters only if configured.

    `layer` is (dropout key, segments of past keys and values). With past segments (in generation) it also returns the
    new keys and values (B, N, S, H), else None.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, rope, bias, task_B):
        c = self.c
        key, past_kv = layer
        keys = split_key(key, 3)
        sub_ln_eps = c.norm_eps if c.sub_ln else None
        attention = Attention(
            c.width,
            c.num_heads,
            c.head_dim,
            num_kv_heads=c.num_kv_heads,
            biases=c.attention_biases,
            dropout_rate=c.dropout,
            lora=c.lora,
            sub_ln_eps=sub_ln_eps,
            name="attention",
        )
        h_BLD = make_norm(c.norm, c.width, c.norm_eps, bool(c.attention_biases), name="norm1")(x_BLD)
        query, (new_k, new_v) = attention.project_query(h_BLD, keys[0]), attention.project_key_value(h_BLD, keys[0])
        if c.qk_norm:
            query, new_k = self.norm_over_heads("q_norm", query), self.norm_over_heads("k_norm", new_k)
        if rope is not None:
            query, new_k = apply_rope(query, rope), apply_rope(new_k, rope)
        change_BLD = attention.attend(query, (new_k, new_v), mask, bias, keys[0], past_kv or ())
        x_BLD = x_BLD + dropout(change_BLD, c.dropout, keys[1])
        h_BLD = make_norm(c.norm, c.width, c.norm_eps, bool(c.attention_biases), name="norm2")(x_BLD)
        if c.gated_mlp:
            mlp = GatedMLP(c.width, c.mlp_dim, c.activation, lora=c.lora, name="mlp")
            change_BLD = mlp(h_BLD, 0.0, keys[2])
        else:
            use_bias = bool(c.attention_biases)
            mlp = MLP(
                c.width, c.mlp_dim, c.activation, use_bias=use_bias, sub_ln_eps=sub_ln_eps, lora=c.lora, name="mlp"
            )
            change_BLD = mlp(h_BLD, keys[2])
        out_BLD = x_BLD + dropout(change_BLD, c.dropout, keys[2])
        if c.adapters is not None:
            out_BLD = out_BLD + RoutedAdapters(c.width, c.adapters, name="adapters")(x_BLD, task_B)
        new_kv = None if past_kv is None else (new_k.swapaxes(1, 2), new_v.swapaxes(1, 2))
        return with_logical_constraint(out_BLD, "batch", "length", "act_embed"), new_kv

    def norm_over_heads(self, name: str, x_BLNH):
        """x (B, L, N, H) normalized over its last two axes."""
        *shape, heads, head = x_BLNH.shape
        norm = LayerNorm(heads * head, self.c.norm_eps, bool(self.c.attention_biases), name=name)
        return norm(x_BLNH.reshape(*shape, heads * head)).reshape(x_BLNH.shape)


class CrossAttentionGroup(nn.Module):
    """`cross_attention.every_n_layers` blocks, with gated cross-attention to the images before the last of them.

    `layer` is (inputs of the blocks, keys and values of the images, None if they are to be computed). In generation it
    also returns the new keys and values of blocks and images, else None.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, rope, bias, task_B, media):
        c, last = self.c, self.c.cross_attention.every_n_layers - 1
        layer, media_kv = layer

        def part(index):
            return jax.tree.map(lambda leaf: leaf[index], layer)

        new_kvs = ()
        if last:
            x_BLD, new_kv = scan_blocks(Block, last, 4, unchecked_in=self)(c, name="before")(
                x_BLD, part(slice(last)), mask, rope, bias, task_B
            )
            new_kvs = (new_kv,)
        x_BLD, media_kv = GatedCrossAttentionBlock(c.width, c.cross_attention, name="cross")(x_BLD, media, media_kv)
        x_BLD, new_kv = Block(c, name="block")(x_BLD, part(last), mask, rope, bias, task_B)
        if new_kv is None:
            return x_BLD, None
        new_kvs = (*new_kvs, jax.tree.map(lambda leaf: leaf[None], new_kv))
        return x_BLD, (jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *new_kvs), media_kv)


class Decoder(nn.Module):
    """Maps embeddings (B, L, D) to states (B, L, D) after the final norm; a `LanguageBackend`."""

    c: DecoderConfig

    def setup(self):
        c = self.c
        self.embedding = Embed(c.padded_vocab_size, c.width, num_frozen=c.num_frozen_embeddings)
        if c.max_positions:
            self.position = Embed(c.max_positions, c.width)
        self.norm = make_norm(c.norm, c.width, c.norm_eps, bool(c.attention_biases))
        if not c.tie_embeddings:
            self.head = Dense(c.width, c.padded_vocab_size, ("embed", "vocab"), use_bias=False, lora=c.lora)

        if c.cross_attention is None:
            self.blocks = scan_blocks(remat_block(Block, c.remat), c.depth, 4, unchecked_in=self)(c)
        else:
            num_groups = c.depth // c.cross_attention.every_n_layers
            self.groups = scan_blocks(remat_block(CrossAttentionGroup, c.remat), num_groups, 5, unchecked_in=self)(c)

    def embed(self, ids_BL, dtype=jnp.float32):
        return self.embedding(ids_BL, dtype)

    def logits(self, state_BLD):
        """Logits (..., V) in float32 of states (..., D); those of padding rows of the vocabulary are -1e30."""
        c = self.c
        logits_BLV = (self.embedding.attend if c.tie_embeddings else self.head)(state_BLD).astype(jnp.float32)
        if c.padded_vocab_size == c.vocab_size:
            return logits_BLV
        return jnp.where(jnp.arange(c.padded_vocab_size) < c.vocab_size, logits_BLV, MASK_VALUE)

    def __call__(self, x_BLD, mask_BL, task_B=None, key=None, media=None):
        """States (B, L, D) of a whole sequence, undefined at padding. `media`: see `GatedCrossAttentionBlock`."""
        return self.run_blocks(x_BLD, position_ids(mask_BL), causal_mask(mask_BL), task_B, key, media=media)[0]

    def forward_segments(self, x_BLD, segment_BL, target_index_BM, key=None):
        """States before and after each target token, each (B, M, D), of rows with several examples (see `Batch`)."""
        positions, mask = segment_positions(segment_BL), segmented_causal_mask(segment_BL)
        state_BLD = self.run_blocks(x_BLD, positions, mask, None, key)[0]
        before_BM = jnp.maximum(target_index_BM - 1, 0)
        return take_positions(state_BLD, before_BM), take_positions(state_BLD, target_index_BM)

    def forward(self, x_BLD, mask_BL, target_BMD, target_mask_BM, task_B=None, keys=(None, None), media=None):
        """See `backend.LanguageBackend`; input and target are one sequence."""
        length = x_BLD.shape[1]
        before_BLD, state_BLD = self.forward_row(x_BLD, mask_BL, target_BMD, target_mask_BM, task_B, keys[0], media)
        return before_BLD[:, length:], state_BLD[:, length:]

    def forward_row(self, x_BLD, mask_BL, target_BMD, target_mask_BM, task_B=None, key=None, media=None):
        """States (B, L + M, D) that predict each token of input and target, and states (B, L + M, D) after it.

        The first token of a row has no state before it: there, its own state.
        """
        length = x_BLD.shape[1]
        row_BLD = jnp.concatenate([x_BLD, target_BMD], axis=1)
        row_mask_BL = jnp.concatenate([mask_BL.astype(bool), target_mask_BM.astype(bool)], axis=1)
        state_BLD = self(row_BLD, row_mask_BL, task_B, key, media)
        first_BD = last_token(state_BLD[:, :length], mask_BL)
        parts = (states_before(state_BLD[:, :length]), first_BD[:, None], state_BLD[:, length:-1])
        return jnp.concatenate(parts, axis=1), state_BLD

    def embed_next(self, token_B, cache: Cache):
        """Embeddings (B, D) of the tokens in the dtype of the cache."""
        return self.embed(token_B, cache.generated["k"].dtype)

    def prefill(self, x_BLD, mask_BL, cache_length: int, task_B=None, media=None):
        """State (B, D) of the last real token of the prompt, and a cache with `cache_length` free slots.

        Later tokens attend to the same images as that token.
        """
        state_BLD, cache = self.prefill_states(x_BLD, mask_BL, cache_length, task_B, media)
        return last_token(state_BLD, mask_BL), cache

    def prefill_states(self, x_BLD, mask_BL, cache_length: int, task_B=None, media=None):
        """As `prefill`, with the states (B, L, D) of the whole prompt."""
        c = self.c
        self.check_length(x_BLD.shape[1] + cache_length)
        h_BLD, prompt_kv, media_kv = self.run_blocks(
            x_BLD, position_ids(mask_BL), causal_mask(mask_BL), task_B, None, (), media
        )
        shape = (c.depth, len(x_BLD), c.num_kv_heads, max(cache_length, 1), c.head_dim)
        generated = {name: jnp.zeros(shape, leaf.dtype) for name, leaf in zip("kv", prompt_kv)}
        mask_BL = mask_BL.astype(bool)
        static = {"mask": mask_BL[None], "task": None if task_B is None else task_B[None]}
        if media is not None:
            _, media_mask_BLS, attends_BL = media
            media_mask_BS = last_token(media_mask_BLS, mask_BL)
            attends_B1 = last_token(attends_BL[..., None], mask_BL)
            static |= {"media": media_kv, "seen": media_mask_BS[None], "real": attends_B1[None]}
        return h_BLD, Cache(generated, static, jnp.zeros((), jnp.int32), prompt_kv)

    def extend(self, x_BD, cache: Cache):
        """State (B, D) of the input embedding `x_BD`, and the cache with that input."""
        state_BD, new_kv = self.read_next(x_BD, cache)
        return state_BD, append_to_cache(cache, new_kv)

    def read_next(self, x_RD, cache: Cache):
        """States (R, D) of inputs, each read as the next token, and their keys and values (layers, R, N, 1, H).

        R is a multiple of the B rows of the cache: row b serves inputs b n to (b + 1) n - 1, candidates for one token
        (without images in cross-attention).
        """
        mask_BL, static = cache.static["mask"][0], cache.static
        task_B = None if static["task"] is None else static["task"][0]
        if (count := len(x_RD) // len(mask_BL)) > 1:
            mask_BL, task_B = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), (mask_BL, task_B))
        rows = len(mask_BL)
        before_B1 = jnp.repeat(tokens_before(cache, rows // count), count)[:, None]
        age_S = slot_ages(cache.step - 1, cache.generated["k"].shape[3])  # of the slots filled so far
        valid_BS = jnp.concatenate([mask_BL, age_S < before_B1, jnp.ones((rows, 1), bool)], axis=1)
        next_B1 = mask_BL.sum(axis=1, keepdims=True) + before_B1
        position_BS = jnp.concatenate([position_ids(mask_BL), next_B1 - 1 - age_S, next_B1], axis=1)
        generated_kv = (cache.generated["k"], cache.generated["v"])
        media = media_kv = None
        if self.c.cross_attention is not None:
            media, media_kv = (None, static["seen"][0][:, None], static["real"][0]), static["media"]
        h_B1D, new_kv, _ = self.run_blocks(
            x_RD[:, None],
            next_B1,
            key_padding_mask(valid_BS),
            task_B,
            None,
            (cache.prompt, generated_kv),
            media,
            media_kv,
            position_BS,
        )
        return h_B1D[:, 0], new_kv

    def run_blocks(
        self, x_BLD, position_BL, mask, task_B, key, past_kv=None, media=None, media_kv=None, key_position_BS=None
    ):
        """States (B, L, D), and with `past_kv` the new keys and values of all layers and those of the images."""
        c = self.c
        keys = split_key(key, c.depth + 1)
        layer_keys = None if key is None else jnp.stack(keys[1:])
        rope = bias = None
        if c.scale_embeddings:
            x_BLD = x_BLD * jnp.asarray(c.width**0.5, x_BLD.dtype)
        if c.max_positions:
            self.check_length(x_BLD.shape[1] if mask.segment_BL is None else 0)
            x_BLD = x_BLD + self.position(position_BL + c.position_offset, x_BLD.dtype)
        elif c.position_type == "sinusoidal":
            x_BLD = x_BLD + sinusoidal_positions(position_BL + c.position_offset, c.width).astype(x_BLD.dtype)
        elif c.position_type == "alibi":
            bias = alibi_bias(position_BL if key_position_BS is None else key_position_BS, c.num_heads)
        else:
            rope = rope_cos_sin(position_BL, c.head_dim, c.rope_theta, c.rope_scaling)
        x_BLD = dropout(x_BLD, c.dropout, keys[0])
        layers = (layer_keys, past_kv)
        if c.cross_attention is None:
            x_BLD, new_kv = self.blocks(x_BLD, layers, mask, rope, bias, task_B)
        else:
            shape = (c.depth // c.cross_attention.every_n_layers, c.cross_attention.every_n_layers)
            layers = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), layers)
            x_BLD, group_kv = self.groups(x_BLD, (layers, media_kv), mask, rope, bias, task_B, media)
            new_kv, media_kv = (None, None) if past_kv is None else group_kv
            new_kv = jax.tree.map(lambda leaf: leaf.reshape(c.depth, *leaf.shape[2:]), new_kv)
        return self.norm(x_BLD), new_kv, media_kv

    def check_length(self, length: int):
        """Raises UserError if `length` tokens exceed the learned position table."""
        positions = self.c.max_positions - self.c.position_offset
        if self.c.max_positions and length > positions:
            raise UserError(
                f"{length} tokens do not fit the {positions} learned positions of the language model; lower "
                "max_prompt_tokens (`lionjax.load(folder, prompt_length=...)`) or max_new_tokens"
            )
