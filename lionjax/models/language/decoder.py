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

from lionjax.core.sharding import constrain
from lionjax.core.types import Cache
from lionjax.nn.adapters import AdapterConfig, CrossConfig, GatedCross, RoutedAdapters
from lionjax.nn.attention import Attention, causal_mask, key_mask
from lionjax.nn.flash_attention import MASKED
from lionjax.nn.layers import MLP, REMAT, Dense, Embed, GatedMLP, LayerNorm, RMSNorm, dropout, split_key
from lionjax.nn.lora import LoraConfig
from lionjax.nn.positions import near, rotate, rotations, waves

WHERE = ("turns", "near", "waves")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and the switches in which decoders differ. The defaults are those of LLaMA 7B.

    `positions`: rows of a table of learned ones, of which the first `position_offset` are never used. 0: they are
    rotary, or by `where` "near" (ALiBi) or "waves" (sines and cosines, from `position_offset` on).
    `gated`: the feed-forward has a gate and no biases. `centred`: norms subtract the mean. `biases`: which of the
    attention's q, k, v, o have one; with none, norms and feed-forward have none either. `qk_norms`: queries and keys
    are normed over all heads. `inner_norms`: norms before the second product of attention and feed-forward (sub-LN).
    `scaled`: what is read is multiplied by the root of the width. `cross`: looks at pictures between layers.
    `frozen_words`: that many first rows of the word table never learn.
    `vocab_multiple`: word table and head get rows of zeros up to a multiple of it, so that a mesh can split them;
    nobody can say those words, and files never hold them.
    """

    vocab: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head: int = 128
    hidden: int = 11008
    eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    centred: bool = False
    biases: str = ""
    positions: int = 0
    position_offset: int = 0
    rope_theta: float = 10000.0
    tied: bool = False  # the head is the word table
    dropout: float = 0.0
    pad_token: int = 0
    start_token: int = 1
    end_token: int = 2
    adapters: AdapterConfig | None = None
    lora: LoraConfig = LoraConfig()
    remat: str = "none"
    vocab_multiple: int = 1
    where: str = "turns"
    qk_norms: bool = False
    inner_norms: bool = False
    scaled: bool = False
    frozen_words: int = 0
    cross: CrossConfig | None = None

    def __post_init__(self):
        if self.where not in WHERE:
            raise ValueError(f"where is {self.where!r}; it can be one of {', '.join(WHERE)}")
        if self.cross is not None and self.layers % self.cross.every:
            raise ValueError(
                f"{self.layers} layers are no multiple of cross.every, {self.cross.every}; change one of them"
            )

    @property
    def rows(self) -> int:
        """Rows of the word table and of the head."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


VICUNA_7B = DecoderConfig()
VICUNA_13B = DecoderConfig(width=5120, layers=40, heads=40, kv_heads=40, hidden=13824)
SMOLLM2_135M = DecoderConfig(
    vocab=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head=64,
    hidden=1536,
    rope_theta=100000.0,
    tied=True,
    pad_token=2,
    start_token=1,
    end_token=2,
)
_BEFORE_LLAMA = DecoderConfig(activation="relu", gated=False, centred=True, biases="qkvo", tied=True, dropout=0.1)
OPT_2_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    vocab=50272,
    width=2560,
    head=80,
    hidden=10240,
    positions=2050,
    position_offset=2,
    pad_token=1,
    start_token=2,
    end_token=2,
)
GPT2 = dataclasses.replace(
    _BEFORE_LLAMA,
    vocab=50257,
    width=768,
    layers=12,
    heads=12,
    kv_heads=12,
    head=64,
    hidden=3072,
    activation="gelu_tanh",
    positions=1024,
    pad_token=50256,
    start_token=50256,
    end_token=50256,
)
MPT_7B = dataclasses.replace(
    _BEFORE_LLAMA,
    activation="gelu",
    biases="",
    dropout=0.0,
    where="near",
    vocab=50432,
    hidden=16384,
    pad_token=1,
    start_token=0,
    end_token=0,
)
MPT_1B = dataclasses.replace(
    MPT_7B, vocab=50368, width=2048, layers=24, heads=16, kv_heads=16, hidden=8192, qk_norms=True
)
KOSMOS2_TEXT = dataclasses.replace(
    _BEFORE_LLAMA,
    activation="gelu",
    where="waves",
    position_offset=2,
    inner_norms=True,
    scaled=True,
    vocab=65037,
    width=2048,
    layers=24,
    head=64,
    hidden=8192,
    pad_token=1,
    start_token=0,
    end_token=2,
)

# Made by `python -m lionjax.tiny.pretrain --part decoder`. Its embeddings are those of the small T5, so that one ViT
# fits both.
TINY_DECODER = DecoderConfig(
    vocab=1024, width=128, layers=4, heads=4, kv_heads=4, head=32, hidden=128, rope_theta=1e6, tied=True, end_token=1
)


class Block(nn.Module):
    """x += attention(norm x); x += feed_forward(norm x), and beside it the routed adapters where there are any.

    `layer` holds the layer's key and, when tokens are read one after the other, the keys and values of those before in
    pieces; the new ones' are then handed back.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, turn, bias, task_B):
        c = self.c
        key, earlier = layer
        keys = split_key(key, 3)
        inner = c.eps if c.inner_norms else None
        own = Attention(
            c.width,
            c.heads,
            c.head,
            kv_heads=c.kv_heads,
            biases=c.biases,
            rate=c.dropout,
            lora=c.lora,
            inner_eps=inner,
            name="attention",
        )
        h_BLD = norm(c, name="norm1")(x_BLD)
        query, (new_k, new_v) = own.queries(h_BLD, keys[0]), own.keys_values(h_BLD, keys[0])
        if c.qk_norms:
            query, new_k = self.over_heads("q_norm", query), self.over_heads("k_norm", new_k)
        if turn is not None:
            query, new_k = rotate(query, turn), rotate(new_k, turn)
        looked_BLD = own.look(query, (new_k, new_v), mask, bias, keys[0], earlier or ())
        x_BLD = x_BLD + dropout(looked_BLD, c.dropout, keys[1])
        h_BLD = norm(c, name="norm2")(x_BLD)
        if c.gated:
            gated = GatedMLP(c.width, c.hidden, c.activation, lora=c.lora, name="mlp")
            change_BLD = gated(h_BLD, 0.0, keys[2])
        else:
            mlp = MLP(c.width, c.hidden, c.activation, bias=bool(c.biases), inner_eps=inner, name="mlp")
            change_BLD = mlp(h_BLD)
        out_BLD = x_BLD + dropout(change_BLD, c.dropout, keys[2])
        if c.adapters is not None:
            out_BLD = out_BLD + RoutedAdapters(c.width, c.adapters, name="adapters")(x_BLD, task_B)
        new = None if earlier is None else (new_k.swapaxes(1, 2), new_v.swapaxes(1, 2))
        return constrain(out_BLD, "batch", "length", "act_embed"), new

    def over_heads(self, name: str, x_BLNH):
        """One norm over all heads at once."""
        *shape, heads, head = x_BLNH.shape
        wide = LayerNorm(heads * head, self.c.eps, bool(self.c.biases), name=name)
        return wide(x_BLNH.reshape(*shape, heads * head)).reshape(x_BLNH.shape)


class Group(nn.Module):
    """`cross.every` blocks, and before the last of them a look at the pictures. Keys and values of these come with a
    layer's where they are known."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, turn, bias, task_B, media):
        c, last = self.c, self.c.cross.every - 1
        layer, kept = layer

        def part(which):
            return jax.tree.map(lambda leaf: leaf[which], layer)

        made = ()
        if last:
            x_BLD, new = stacked(Block, c, last)(c, name="before")(x_BLD, part(slice(last)), mask, turn, bias, task_B)
            made = (new,)
        x_BLD, kept = GatedCross(c.width, c.cross, name="cross")(x_BLD, media, kept)
        x_BLD, new = Block(c, name="block")(x_BLD, part(last), mask, turn, bias, task_B)
        if new is None:
            return x_BLD, None
        made = (*made, jax.tree.map(lambda leaf: leaf[None], new))
        return x_BLD, (jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made), kept)


def norm(c: DecoderConfig, **name):
    """The norm that this decoder has everywhere."""
    if not c.centred:
        return RMSNorm(c.width, c.eps, **name)
    return LayerNorm(c.width, c.eps, bool(c.biases), **name)


def stacked(block, c: DecoderConfig, length: int, inputs: int = 4):
    """`length` of these blocks after each other, with as many inputs that are the same for all."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * inputs,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Decoder(nn.Module):
    """Embeddings (B, L, D) in, states (B, L, D) behind the last norm out."""

    c: DecoderConfig

    def setup(self):
        c = self.c
        self.embedding = Embed(c.rows, c.width, frozen=c.frozen_words)
        if c.positions:
            self.position = Embed(c.positions, c.width)
        self.norm = norm(c)
        if not c.tied:
            self.head = Dense(c.width, c.rows, ("embed", "vocab"), bias=False)

        def kept(block):
            return nn.remat(block, prevent_cse=False, policy=REMAT[c.remat])

        if c.cross is None:
            block = Block if c.remat == "none" else kept(Block)
            self.blocks = stacked(block, c, c.layers)(c)
        else:
            group = Group if c.remat == "none" else kept(Group)
            self.groups = stacked(group, c, c.layers // c.cross.every, 5)(c)

    def embed(self, ids_BL, dtype=jnp.float32):
        return self.embedding(ids_BL, dtype)

    def logits(self, state_BLD):
        """(..., D) -> (..., V) in float32."""
        c = self.c
        logits_BLV = (self.embedding.attend if c.tied else self.head)(state_BLD).astype(jnp.float32)
        if c.rows == c.vocab:
            return logits_BLV
        return jnp.where(jnp.arange(c.rows) < c.vocab, logits_BLV, MASKED)

    def __call__(self, x_BLD, mask_BL, task_B=None, key=None, media=None):
        """States of a whole row; those of padding mean nothing. `media` as `GatedCross` has it."""
        return self.run(x_BLD, counted(mask_BL), causal_mask(mask_BL), task_B, key, media=media)[0]

    def forward(self, x_BLD, mask_BL, target_BMD, target_mask_BM, task_B=None, keys=(None, None), media=None):
        """See `backend.LanguageBackend`: input and target are one row."""
        length = x_BLD.shape[1]
        row_BLD = jnp.concatenate([x_BLD, target_BMD], axis=1)
        row_mask_BL = jnp.concatenate([mask_BL.astype(bool), target_mask_BM.astype(bool)], axis=1)
        state_BLD = self(row_BLD, row_mask_BL, task_B, keys[0], media)
        first_BD = last(state_BLD[:, :length], mask_BL)
        before_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return before_BMD, state_BLD[:, length:]

    def embed_next(self, token_B, cache: Cache):
        """Embeddings (B, D) of tokens in the cache's dtype."""
        return self.embed(token_B, cache.written["k"].dtype)

    def prefill(self, x_BLD, mask_BL, cache_length: int, task_B=None, media=None):
        """Read a prompt: the state (B, D) of its last real token, and a cache with room for `cache_length` more.

        What is read later looks at the same pictures as that token.
        """
        c = self.c
        self.check_length(x_BLD.shape[1] + cache_length)
        h_BLD, read, kept = self.run(x_BLD, counted(mask_BL), causal_mask(mask_BL), task_B, None, (), media)
        room = (c.layers, len(x_BLD), c.kv_heads, max(cache_length, 1), c.head)
        written = {name: jnp.zeros(room, leaf.dtype) for name, leaf in zip("kv", read)}
        mask_BL = mask_BL.astype(bool)
        fixed = {"mask": mask_BL[None], "task": None if task_B is None else task_B[None]}
        if media is not None:
            _, seen_BLS, real_BL = media
            seen_BS, real_B1 = last(seen_BLS, mask_BL), last(real_BL[..., None], mask_BL)
            fixed |= {"media": kept, "seen": seen_BS[None], "real": real_B1[None]}
        return last(h_BLD, mask_BL), Cache(written, fixed, jnp.zeros((), jnp.int32), read)

    def extend(self, x_BD, cache: Cache):
        """Read one more token's embedding: its state (B, D)."""
        mask_BL, step, fixed = cache.fixed["mask"][0], cache.step, cache.fixed
        rows = len(mask_BL)
        task_B = None if fixed["task"] is None else fixed["task"][0]
        place_S = jnp.arange(cache.written["k"].shape[3])
        written_BS = jnp.broadcast_to(place_S < step, (rows, len(place_S)))
        seen_BS = jnp.concatenate([mask_BL, written_BS, jnp.ones((rows, 1), bool)], axis=1)
        count_B1 = mask_BL.sum(axis=1, keepdims=True)
        position_BS = jnp.concatenate([counted(mask_BL), count_B1 + place_S, count_B1 + step], axis=1)
        written = (cache.written["k"], cache.written["v"])
        media = kept = None
        if self.c.cross is not None:
            media, kept = (None, fixed["seen"][0][:, None], fixed["real"][0]), fixed["media"]
        h_B1D, new, _ = self.run(
            x_BD[:, None],
            count_B1 + step,
            key_mask(seen_BS),
            task_B,
            None,
            (cache.read, written),
            media,
            kept,
            position_BS,
        )
        # One write for all layers: nothing else of the cache moves.
        written = {
            name: jax.lax.dynamic_update_slice(old, leaf.astype(old.dtype), (0, 0, 0, step, 0))
            for name, old, leaf in zip("kv", written, new)
        }
        return h_B1D[:, 0], Cache(cache.written | written, cache.fixed, step + 1, cache.read)

    def run(self, x_BLD, position_BL, mask, task_B, key, earlier=None, media=None, kept=None, key_position_BS=None):
        """States, and where `earlier` is given the new keys and values of all layers, and those of the pictures."""
        c = self.c
        keys = split_key(key, c.layers + 1)
        layer_keys = None if key is None else jnp.stack(keys[1:])
        turn = bias = None
        if c.scaled:
            x_BLD = x_BLD * jnp.asarray(c.width**0.5, x_BLD.dtype)
        if c.positions:
            self.check_length(x_BLD.shape[1])
            x_BLD = x_BLD + self.position(position_BL + c.position_offset, x_BLD.dtype)
        elif c.where == "waves":
            x_BLD = x_BLD + waves(position_BL + c.position_offset, c.width).astype(x_BLD.dtype)
        elif c.where == "near":
            bias = near(position_BL if key_position_BS is None else key_position_BS, c.heads)
        else:
            turn = rotations(position_BL, c.head, c.rope_theta)
        x_BLD = dropout(x_BLD, c.dropout, keys[0])
        layers = (layer_keys, earlier)
        if c.cross is None:
            x_BLD, new = self.blocks(x_BLD, layers, mask, turn, bias, task_B)
        else:
            shape = (c.layers // c.cross.every, c.cross.every)
            layers = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), layers)
            x_BLD, made = self.groups(x_BLD, (layers, kept), mask, turn, bias, task_B, media)
            new, kept = (None, None) if earlier is None else made
            new = jax.tree.map(lambda leaf: leaf.reshape(c.layers, *leaf.shape[2:]), new)
        return self.norm(x_BLD), new, kept

    def check_length(self, length: int):
        room = self.c.positions - self.c.position_offset
        if self.c.positions and length > room:
            raise ValueError(f"{length} tokens do not fit the {room} learned positions; shorten the text")


def counted(mask_BL):
    """Positions 0, 1, ... of the real tokens of each row; padding takes that of the token before it."""
    return jnp.maximum(jnp.cumsum(mask_BL.astype(jnp.int32), axis=1) - 1, 0)


def last(x_BLD, mask_BL):
    """The row of x (B, D) at each row's last real token."""
    length = mask_BL.shape[1]
    place_B = length - 1 - jnp.argmax(mask_BL[:, ::-1].astype(bool), axis=1)
    return jnp.take_along_axis(x_BLD, place_B[:, None, None], axis=1)[:, 0]
