# SPDX-License-Identifier: Apache-2.0
"""One causal decoder: LLaMA (and Vicuna, SmolLM), OPT, GPT-2, MPT and Kosmos-2's are settings of a few switches.

Embeddings go in, so that picture words and places can stand among text words; states come out, and `logits` reads them.
Positions are counted along the mask, so padding may stand anywhere: behind a prompt, before it, or inside a row.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import Renamed, renamed_fields
from lionjax.core.sharding import with_logical_constraint
from lionjax.core.types import Cache
from lionjax.nn.adapters import AdapterConfig, GatedCrossAttentionBlock, GatedCrossAttentionConfig, RoutedAdapters
from lionjax.nn.attention import Attention, causal_mask, key_padding_mask
from lionjax.nn.flash_attention import MASK_VALUE
from lionjax.nn.layers import MLP, REMAT_POLICIES, Dense, Embed, GatedMLP, LayerNorm, RMSNorm, dropout, split_key
from lionjax.nn.lora import LoraConfig
from lionjax.nn.positions import alibi_bias, apply_rope, rope_cos_sin, sinusoidal_positions

POSITION_TYPES = ("rope", "alibi", "sinusoidal")
NORMS = ("rmsnorm", "layernorm")


@renamed_fields(
    vocab="vocab_size",
    layers="depth",
    heads="num_heads",
    kv_heads="num_kv_heads",
    head="head_dim",
    hidden="mlp_dim",
    eps="norm_eps",
    gated="gated_mlp",
    centred=Renamed("norm", {False: "rmsnorm", True: "layernorm"}),
    biases="attention_biases",
    positions="max_positions",
    tied="tie_embeddings",
    pad_token="pad_token_id",
    start_token="bos_token_id",
    end_token="eos_token_id",
    vocab_multiple="pad_vocab_to_multiple_of",
    where=Renamed("position_type", {"turns": "rope", "near": "alibi", "waves": "sinusoidal"}),
    qk_norms="qk_norm",
    inner_norms="sub_ln",
    scaled="scale_embeddings",
    frozen_words="num_frozen_embeddings",
    cross="cross_attention",
)
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and the switches in which decoders differ. The defaults are those of LLaMA 7B.

    `positions`: rows of a table of learned ones, of which the first `position_offset` are never used. 0: they are
    rotary, or by `position_type` "alibi" or "sinusoidal" (from `position_offset` on).
    `gated`: the feed-forward has a gate and no biases. `centred`: norms subtract the mean. `biases`: which of the
    attention's q, k, v, o have one; with none, norms and feed-forward have none either. `qk_norms`: queries and keys
    are normed over all heads. `inner_norms`: norms before the second product of attention and feed-forward (sub-LN).
    `scaled`: what is read is multiplied by the root of the width. `cross`: looks at pictures between layers.
    `frozen_words`: that many first rows of the word table never learn.
    `vocab_multiple`: word table and head get rows of zeros up to a multiple of it, so that a mesh can split them;
    nobody can say those words, and files never hold them.
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
    tie_embeddings: bool = False  # the head is the word table
    dropout: float = 0.0
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    adapters: AdapterConfig | None = None
    lora: LoraConfig = LoraConfig()
    remat: str = "none"
    pad_vocab_to_multiple_of: int = 1
    position_type: str = "rope"
    qk_norm: bool = False
    sub_ln: bool = False
    scale_embeddings: bool = False
    num_frozen_embeddings: int = 0
    cross_attention: GatedCrossAttentionConfig | None = None

    def __post_init__(self):
        for field, known in {"position_type": POSITION_TYPES, "norm": NORMS}.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {', '.join(known)}")
        if self.cross_attention is not None and self.depth % self.cross_attention.every_n_layers:
            raise ValueError(
                f"depth {self.depth} is no multiple of cross_attention.every_n_layers, "
                f"{self.cross_attention.every_n_layers}; change one of them"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word table and of the head."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of


VICUNA_7B = DecoderConfig()
VICUNA_13B = DecoderConfig(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13824)
SMOLLM2_135M = DecoderConfig(
    vocab_size=49152,
    width=576,
    depth=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope_theta=100000.0,
    tie_embeddings=True,
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)
_BEFORE_LLAMA = DecoderConfig(
    activation="relu", gated_mlp=False, norm="layernorm", attention_biases="qkvo", tie_embeddings=True, dropout=0.1
)
OPT_2_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    vocab_size=50272,
    width=2560,
    head_dim=80,
    mlp_dim=10240,
    max_positions=2050,
    position_offset=2,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=2,
)
GPT2 = dataclasses.replace(
    _BEFORE_LLAMA,
    vocab_size=50257,
    width=768,
    depth=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_dim=3072,
    activation="gelu_tanh",
    max_positions=1024,
    pad_token_id=50256,
    bos_token_id=50256,
    eos_token_id=50256,
)
MPT_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    activation="gelu",
    attention_biases="",
    dropout=0.0,
    position_type="alibi",
    vocab_size=50432,
    mlp_dim=16384,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=0,
)
MPT_1B = dataclasses.replace(
    MPT_7B, vocab_size=50368, width=2048, depth=24, num_heads=16, num_kv_heads=16, mlp_dim=8192, qk_norm=True
)
KOSMOS2_TEXT = dataclasses.replace(
    _BEFORE_LLAMA,
    activation="gelu",
    position_type="sinusoidal",
    position_offset=2,
    sub_ln=True,
    scale_embeddings=True,
    vocab_size=65037,
    width=2048,
    depth=24,
    head_dim=64,
    mlp_dim=8192,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)

# Made by `python -m lionjax.tiny.pretrain --part decoder`. Its embeddings are those of the small T5, so that one ViT
# fits both.
TINY_DECODER = DecoderConfig(
    vocab_size=1024,
    width=128,
    depth=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=128,
    rope_theta=1e6,
    tie_embeddings=True,
    eos_token_id=1,
)


class Block(nn.Module):
    """x += attention(norm x); x += feed_forward(norm x), and beside it the routed adapters where there are any.

    `layer` holds the layer's key and, when tokens are read one after the other, the keys and values of those before in
    pieces; the new ones' are then handed back.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, rope, bias, task_B):
        c = self.c
        key, earlier = layer
        keys = split_key(key, 3)
        inner = c.norm_eps if c.sub_ln else None
        own = Attention(
            c.width,
            c.num_heads,
            c.head_dim,
            num_kv_heads=c.num_kv_heads,
            biases=c.attention_biases,
            dropout_rate=c.dropout,
            lora=c.lora,
            sub_ln_eps=inner,
            name="attention",
        )
        h_BLD = make_norm(c, name="norm1")(x_BLD)
        query, (new_k, new_v) = own.project_query(h_BLD, keys[0]), own.project_key_value(h_BLD, keys[0])
        if c.qk_norm:
            query, new_k = self.norm_over_heads("q_norm", query), self.norm_over_heads("k_norm", new_k)
        if rope is not None:
            query, new_k = apply_rope(query, rope), apply_rope(new_k, rope)
        looked_BLD = own.attend(query, (new_k, new_v), mask, bias, keys[0], earlier or ())
        x_BLD = x_BLD + dropout(looked_BLD, c.dropout, keys[1])
        h_BLD = make_norm(c, name="norm2")(x_BLD)
        if c.gated_mlp:
            gated = GatedMLP(c.width, c.mlp_dim, c.activation, lora=c.lora, name="mlp")
            change_BLD = gated(h_BLD, 0.0, keys[2])
        else:
            mlp = MLP(c.width, c.mlp_dim, c.activation, use_bias=bool(c.attention_biases), sub_ln_eps=inner, name="mlp")
            change_BLD = mlp(h_BLD)
        out_BLD = x_BLD + dropout(change_BLD, c.dropout, keys[2])
        if c.adapters is not None:
            out_BLD = out_BLD + RoutedAdapters(c.width, c.adapters, name="adapters")(x_BLD, task_B)
        new = None if earlier is None else (new_k.swapaxes(1, 2), new_v.swapaxes(1, 2))
        return with_logical_constraint(out_BLD, "batch", "length", "act_embed"), new

    def norm_over_heads(self, name: str, x_BLNH):
        """One norm over all heads at once."""
        *shape, heads, head = x_BLNH.shape
        wide = LayerNorm(heads * head, self.c.norm_eps, bool(self.c.attention_biases), name=name)
        return wide(x_BLNH.reshape(*shape, heads * head)).reshape(x_BLNH.shape)


class CrossAttentionGroup(nn.Module):
    """`cross.every` blocks, and before the last of them a look at the pictures. Keys and values of these come with a
    layer's where they are known."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, rope, bias, task_B, media):
        c, last = self.c, self.c.cross_attention.every_n_layers - 1
        layer, kept = layer

        def part(which):
            return jax.tree.map(lambda leaf: leaf[which], layer)

        made = ()
        if last:
            x_BLD, new = scan_blocks(Block, c, last)(c, name="before")(
                x_BLD, part(slice(last)), mask, rope, bias, task_B
            )
            made = (new,)
        x_BLD, kept = GatedCrossAttentionBlock(c.width, c.cross_attention, name="cross")(x_BLD, media, kept)
        x_BLD, new = Block(c, name="block")(x_BLD, part(last), mask, rope, bias, task_B)
        if new is None:
            return x_BLD, None
        made = (*made, jax.tree.map(lambda leaf: leaf[None], new))
        return x_BLD, (jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made), kept)


def make_norm(c: DecoderConfig, **name):
    """The norm that this decoder has everywhere."""
    if c.norm == "rmsnorm":
        return RMSNorm(c.width, c.norm_eps, **name)
    return LayerNorm(c.width, c.norm_eps, bool(c.attention_biases), **name)


def scan_blocks(block, c: DecoderConfig, length: int, num_broadcast: int = 4):
    """`length` of these blocks after each other, with as many inputs that are the same for all."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * num_broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Decoder(nn.Module):
    """Embeddings (B, L, D) in, states (B, L, D) behind the last norm out."""

    c: DecoderConfig

    def setup(self):
        c = self.c
        self.embedding = Embed(c.padded_vocab_size, c.width, num_frozen=c.num_frozen_embeddings)
        if c.max_positions:
            self.position = Embed(c.max_positions, c.width)
        self.norm = make_norm(c)
        if not c.tie_embeddings:
            self.head = Dense(c.width, c.padded_vocab_size, ("embed", "vocab"), use_bias=False)

        def kept(block):
            return nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])

        if c.cross_attention is None:
            block = Block if c.remat == "none" else kept(Block)
            self.blocks = scan_blocks(block, c, c.depth)(c)
        else:
            group = CrossAttentionGroup if c.remat == "none" else kept(CrossAttentionGroup)
            self.groups = scan_blocks(group, c, c.depth // c.cross_attention.every_n_layers, 5)(c)

    def embed(self, ids_BL, dtype=jnp.float32):
        return self.embedding(ids_BL, dtype)

    def logits(self, state_BLD):
        """(..., D) -> (..., V) in float32."""
        c = self.c
        logits_BLV = (self.embedding.attend if c.tie_embeddings else self.head)(state_BLD).astype(jnp.float32)
        if c.padded_vocab_size == c.vocab_size:
            return logits_BLV
        return jnp.where(jnp.arange(c.padded_vocab_size) < c.vocab_size, logits_BLV, MASK_VALUE)

    def __call__(self, x_BLD, mask_BL, task_B=None, key=None, media=None):
        """States of a whole row; those of padding mean nothing. `media` as `GatedCross` has it."""
        return self.run_blocks(x_BLD, position_ids(mask_BL), causal_mask(mask_BL), task_B, key, media=media)[0]

    def forward(self, x_BLD, mask_BL, target_BMD, target_mask_BM, task_B=None, keys=(None, None), media=None):
        """See `backend.LanguageBackend`: input and target are one row."""
        length = x_BLD.shape[1]
        row_BLD = jnp.concatenate([x_BLD, target_BMD], axis=1)
        row_mask_BL = jnp.concatenate([mask_BL.astype(bool), target_mask_BM.astype(bool)], axis=1)
        state_BLD = self(row_BLD, row_mask_BL, task_B, keys[0], media)
        first_BD = last_token(state_BLD[:, :length], mask_BL)
        before_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return before_BMD, state_BLD[:, length:]

    def embed_next(self, token_B, cache: Cache):
        """Embeddings (B, D) of tokens in the cache's dtype."""
        return self.embed(token_B, cache.generated["k"].dtype)

    def prefill(self, x_BLD, mask_BL, cache_length: int, task_B=None, media=None):
        """Read a prompt: the state (B, D) of its last real token, and a cache with room for `cache_length` more.

        What is read later looks at the same pictures as that token.
        """
        c = self.c
        self.check_length(x_BLD.shape[1] + cache_length)
        h_BLD, read, kept = self.run_blocks(x_BLD, position_ids(mask_BL), causal_mask(mask_BL), task_B, None, (), media)
        room = (c.depth, len(x_BLD), c.num_kv_heads, max(cache_length, 1), c.head_dim)
        written = {name: jnp.zeros(room, leaf.dtype) for name, leaf in zip("kv", read)}
        mask_BL = mask_BL.astype(bool)
        fixed = {"mask": mask_BL[None], "task": None if task_B is None else task_B[None]}
        if media is not None:
            _, seen_BLS, real_BL = media
            seen_BS, real_B1 = last_token(seen_BLS, mask_BL), last_token(real_BL[..., None], mask_BL)
            fixed |= {"media": kept, "seen": seen_BS[None], "real": real_B1[None]}
        return last_token(h_BLD, mask_BL), Cache(written, fixed, jnp.zeros((), jnp.int32), read)

    def extend(self, x_BD, cache: Cache):
        """Read one more token's embedding: its state (B, D)."""
        mask_BL, step, fixed = cache.static["mask"][0], cache.step, cache.static
        rows = len(mask_BL)
        task_B = None if fixed["task"] is None else fixed["task"][0]
        place_S = jnp.arange(cache.generated["k"].shape[3])
        written_BS = jnp.broadcast_to(place_S < step, (rows, len(place_S)))
        seen_BS = jnp.concatenate([mask_BL, written_BS, jnp.ones((rows, 1), bool)], axis=1)
        count_B1 = mask_BL.sum(axis=1, keepdims=True)
        position_BS = jnp.concatenate([position_ids(mask_BL), count_B1 + place_S, count_B1 + step], axis=1)
        written = (cache.generated["k"], cache.generated["v"])
        media = kept = None
        if self.c.cross_attention is not None:
            media, kept = (None, fixed["seen"][0][:, None], fixed["real"][0]), fixed["media"]
        h_B1D, new, _ = self.run_blocks(
            x_BD[:, None],
            count_B1 + step,
            key_padding_mask(seen_BS),
            task_B,
            None,
            (cache.prompt, written),
            media,
            kept,
            position_BS,
        )
        # One write for all layers: nothing else of the cache moves.
        written = {
            name: jax.lax.dynamic_update_slice(old, leaf.astype(old.dtype), (0, 0, 0, step, 0))
            for name, old, leaf in zip("kv", written, new)
        }
        return h_B1D[:, 0], Cache(cache.generated | written, cache.static, step + 1, cache.prompt)

    def run_blocks(
        self, x_BLD, position_BL, mask, task_B, key, past_kv=None, media=None, media_kv=None, key_position_BS=None
    ):
        """States, and where `earlier` is given the new keys and values of all layers, and those of the pictures."""
        c = self.c
        keys = split_key(key, c.depth + 1)
        layer_keys = None if key is None else jnp.stack(keys[1:])
        turn = bias = None
        if c.scale_embeddings:
            x_BLD = x_BLD * jnp.asarray(c.width**0.5, x_BLD.dtype)
        if c.max_positions:
            self.check_length(x_BLD.shape[1])
            x_BLD = x_BLD + self.position(position_BL + c.position_offset, x_BLD.dtype)
        elif c.position_type == "sinusoidal":
            x_BLD = x_BLD + sinusoidal_positions(position_BL + c.position_offset, c.width).astype(x_BLD.dtype)
        elif c.position_type == "alibi":
            bias = alibi_bias(position_BL if key_position_BS is None else key_position_BS, c.num_heads)
        else:
            turn = rope_cos_sin(position_BL, c.head_dim, c.rope_theta)
        x_BLD = dropout(x_BLD, c.dropout, keys[0])
        layers = (layer_keys, past_kv)
        if c.cross_attention is None:
            x_BLD, new = self.blocks(x_BLD, layers, mask, turn, bias, task_B)
        else:
            shape = (c.depth // c.cross_attention.every_n_layers, c.cross_attention.every_n_layers)
            layers = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), layers)
            x_BLD, made = self.groups(x_BLD, (layers, media_kv), mask, turn, bias, task_B, media)
            new, media_kv = (None, None) if past_kv is None else made
            new = jax.tree.map(lambda leaf: leaf.reshape(c.depth, *leaf.shape[2:]), new)
        return self.norm(x_BLD), new, media_kv

    def check_length(self, length: int):
        room = self.c.max_positions - self.c.position_offset
        if self.c.max_positions and length > room:
            raise ValueError(f"{length} tokens do not fit the {room} learned positions; shorten the text")


def position_ids(mask_BL):
    """Positions 0, 1, ... of the real tokens of each row; padding takes that of the token before it."""
    return jnp.maximum(jnp.cumsum(mask_BL.astype(jnp.int32), axis=1) - 1, 0)


def last_token(x_BLD, mask_BL):
    """The row of x (B, D) at each row's last real token."""
    length = mask_BL.shape[1]
    place_B = length - 1 - jnp.argmax(mask_BL[:, ::-1].astype(bool), axis=1)
    return jnp.take_along_axis(x_BLD, place_B[:, None, None], axis=1)[:, 0]
