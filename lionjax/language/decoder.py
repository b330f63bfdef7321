# SPDX-License-Identifier: Apache-2.0
"""One causal decoder: LLaMA (and Vicuna, SmolLM), OPT and GPT-2 are settings of the same few switches.

Embeddings go in, so that picture words and places can stand among text words; states come out, and `logits` reads them.
Positions are counted along the mask, so padding may stand anywhere: behind a prompt, before it, or inside a row.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax import adapters
from lionjax import attention as attentions
from lionjax.adapters import AdapterConfig, RoutedAdapters
from lionjax.attention import Attention, causal_mask, key_mask, rotate, rotations
from lionjax.interfaces import Cache
from lionjax.layers import (
    MLP,
    REMAT,
    Dense,
    Embed,
    GatedMLP,
    LayerNorm,
    LoraConfig,
    RMSNorm,
    dense_rows,
    dropout,
    norm_rows,
    split_key,
)
from lionjax.sharding import constrain
from lionjax.weight_rows import (
    Row,
    fused,
    heads_in_bias,
    linear,
    padded,
    reshaped,
    same,
    under,
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and the switches in which LLaMA, OPT and GPT-2 differ. The defaults are those of LLaMA 7B.

    `positions`: rows of a table of learned ones, of which the first `position_offset` are never used; 0: rotary.
    `gated`: the feed-forward has a gate and no biases. `centred`: norms subtract the mean and have a bias. `biases`:
    which of the attention's q, k, v, o have one. `vocab_multiple`: word table and head get rows of zeros up to a
    multiple of it, so that a mesh can split them; nobody can say those words, and files never hold them.
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

    @property
    def rows(self) -> int:
        """Rows of the word table and of the head."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


VICUNA_7B = DecoderConfig()
VICUNA_13B = DecoderConfig(width=5120, layers=40, heads=40, kv_heads=40, hidden=13824)
SMOLLM2_135M = DecoderConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head=64, hidden=1536, rope_theta=100000.0, tied=True,
    pad_token=2, start_token=1, end_token=2,
)  # fmt: skip
_BEFORE_LLAMA = DecoderConfig(
    activation="relu", gated=False, centred=True, biases="qkvo", tied=True, dropout=0.1
)
OPT_2_7B = dataclasses.replace(
    _BEFORE_LLAMA, vocab=50272, width=2560, head=80, hidden=10240, positions=2050, position_offset=2,
    pad_token=1, start_token=2, end_token=2,
)  # fmt: skip
GPT2 = dataclasses.replace(
    _BEFORE_LLAMA, vocab=50257, width=768, layers=12, heads=12, kv_heads=12, head=64, hidden=3072,
    activation="gelu_tanh", positions=1024, pad_token=50256, start_token=50256, end_token=50256,
)  # fmt: skip


class Block(nn.Module):
    """x += attention(norm x); x += feed_forward(norm x), and beside it the routed adapters where there are any.

    `layer` holds the layer's key and, when tokens are read one after the other, the keys and values of those before;
    the new ones' are then handed back.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD, layer, mask, turn, task_B):
        c = self.c
        key, earlier = layer
        keys = split_key(key, 3)
        norm = LayerNorm if c.centred else RMSNorm
        own = Attention(
            c.width, c.heads, c.head, kv_heads=c.kv_heads, biases=c.biases, rate=c.dropout, lora=c.lora,
            name="attention",
        )  # fmt: skip
        h_BLD = norm(c.width, c.eps, name="norm1")(x_BLD)
        query, (new_k, new_v) = own.queries(h_BLD), own.keys_values(h_BLD)
        if turn is not None:
            query, new_k = rotate(query, turn), rotate(new_k, turn)
        seen = new = (new_k, new_v)
        if earlier is not None:
            seen = tuple(jnp.concatenate(pair, axis=1) for pair in zip(earlier, new))
        x_BLD = x_BLD + dropout(own.look(query, seen, mask, None, keys[0]), c.dropout, keys[1])
        h_BLD = norm(c.width, c.eps, name="norm2")(x_BLD)
        if c.gated:
            change_BLD = GatedMLP(c.width, c.hidden, c.activation, lora=c.lora, name="mlp")(h_BLD)
        else:
            change_BLD = MLP(c.width, c.hidden, c.activation, name="mlp")(h_BLD)
        out_BLD = x_BLD + dropout(change_BLD, c.dropout, keys[2])
        if c.adapters is not None:
            out_BLD = out_BLD + RoutedAdapters(c.width, c.adapters, name="adapters")(x_BLD, task_B)
        return constrain(out_BLD, "batch", "length", "act_embed"), None if earlier is None else new


class Decoder(nn.Module):
    """Embeddings (B, L, D) in, states (B, L, D) behind the last norm out."""

    c: DecoderConfig

    def setup(self):
        c = self.c
        self.embedding = Embed(c.rows, c.width)
        if c.positions:
            self.position = Embed(c.positions, c.width)
        self.norm = (LayerNorm if c.centred else RMSNorm)(c.width, c.eps)
        if not c.tied:
            self.head = Dense(c.width, c.rows, ("embed", "vocab"), bias=False)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0,) + (nn.broadcast,) * 3,
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)

    def embed(self, ids_BL, dtype=jnp.float32):
        return self.embedding(ids_BL, dtype)

    def logits(self, state_BLD):
        """(..., D) -> (..., V) in float32."""
        c = self.c
        logits_BLV = (self.embedding.attend if c.tied else self.head)(state_BLD).astype(jnp.float32)
        if c.rows == c.vocab:
            return logits_BLV
        return jnp.where(jnp.arange(c.rows) < c.vocab, logits_BLV, attentions.MASKED)

    def __call__(self, x_BLD, mask_BL, task_B=None, key=None):
        """States of a whole row; those of padding mean nothing."""
        return self.run(x_BLD, counted(mask_BL), causal(mask_BL), task_B, key)[0]

    def begin(self, x_BLD, mask_BL, cache_length: int, task_B=None):
        """Read a prompt: the state (B, D) of its last real token, and a cache with room for `cache_length` more."""
        c = self.c
        nothing = jnp.zeros((c.layers, x_BLD.shape[0], 0, c.kv_heads, c.head), x_BLD.dtype)
        self.check_length(x_BLD.shape[1] + cache_length)
        h_BLD, new = self.run(
            x_BLD, counted(mask_BL), causal(mask_BL), task_B, None, (nothing, nothing)
        )
        room = ((0, 0), (0, 0), (0, cache_length), (0, 0), (0, 0))
        written = {name: jnp.pad(leaf, room) for name, leaf in zip("kv", new)}
        mask_BL = mask_BL.astype(bool)
        fixed = {"mask": mask_BL[None], "task": None if task_B is None else task_B[None]}
        return last(h_BLD, mask_BL), Cache(written, fixed, jnp.zeros((), jnp.int32))

    def extend(self, x_BD, cache: Cache):
        """Read one more token's embedding: its state (B, D)."""
        mask_BL, step = cache.fixed["mask"][0], cache.step
        rows, prompt = mask_BL.shape
        task_B = None if cache.fixed["task"] is None else cache.fixed["task"][0]
        written_S = jnp.arange(cache.written["k"].shape[2] - prompt) < step
        written_BS = jnp.broadcast_to(written_S, (rows, len(written_S)))
        seen_BS = jnp.concatenate([mask_BL, written_BS, jnp.ones((rows, 1), bool)], axis=1)
        position_B1 = mask_BL.sum(axis=1, keepdims=True) + step
        earlier = (cache.written["k"], cache.written["v"])
        h_B1D, new = self.run(x_BD[:, None], position_B1, key_mask(seen_BS), task_B, None, earlier)
        # One write for all layers: nothing else of the cache moves.
        written = {
            name: jax.lax.dynamic_update_slice(
                old, leaf.astype(old.dtype), (0, 0, prompt + step, 0, 0)
            )
            for name, old, leaf in zip("kv", earlier, new)
        }
        return h_B1D[:, 0], Cache(cache.written | written, cache.fixed, step + 1)

    def run(self, x_BLD, position_BL, mask, task_B, key, earlier=None):
        c = self.c
        keys = split_key(key, c.layers + 1)
        layer_keys = None if key is None else jnp.stack(keys[1:])
        turn = None
        if c.positions:
            self.check_length(x_BLD.shape[1])
            x_BLD = x_BLD + self.position(position_BL + c.position_offset, x_BLD.dtype)
        else:
            turn = rotations(position_BL, c.head, c.rope_theta)
        x_BLD = dropout(x_BLD, c.dropout, keys[0])
        x_BLD, new = self.blocks(x_BLD, (layer_keys, earlier), mask, turn, task_B)
        return self.norm(x_BLD), new

    def check_length(self, length: int):
        room = self.c.positions - self.c.position_offset
        if self.c.positions and length > room:
            raise ValueError(
                f"{length} tokens do not fit the {room} learned positions; shorten the text"
            )


def counted(mask_BL):
    """Positions 0, 1, ... of the real tokens of each row; padding takes that of the token before it."""
    return jnp.maximum(jnp.cumsum(mask_BL.astype(jnp.int32), axis=1) - 1, 0)


def causal(mask_BL):
    """Who sees whom in a row: real tokens, at and before one's own place."""
    return causal_mask(mask_BL.shape[1]) & key_mask(mask_BL)


def last(x_BLD, mask_BL):
    """The row of x (B, D) at each row's last real token."""
    length = mask_BL.shape[1]
    place_B = length - 1 - jnp.argmax(mask_BL[:, ::-1].astype(bool), axis=1)
    return jnp.take_along_axis(x_BLD, place_B[:, None, None], axis=1)[:, 0]


def llama_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's LlamaForCausalLM."""
    block = (
        *under("self_attn.", "attention/", _attention_rows(c, "o_proj")),
        *norm_rows("input_layernorm", "norm1", bias=False),
        *norm_rows("post_attention_layernorm", "norm2", bias=False),
        *(
            row
            for x in ("gate", "up", "down")
            for row in dense_rows(f"mlp.{x}_proj", f"mlp/{x}", bias=False)
        ),
    )
    if c.adapters is not None:
        block = (*block, *under("adapter.", "adapters/", adapters.torch_rows(c.adapters)))
    return (
        *_word_rows(c, "model.embed_tokens.weight"),
        *norm_rows("model.norm", "norm", bias=False),
        *under("model.layers.{i}.", "blocks/", block),
    )


def opt_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's OPTForCausalLM."""
    block = (
        *under("self_attn.", "attention/", _attention_rows(c, "out_proj")),
        *norm_rows("self_attn_layer_norm", "norm1"),
        *norm_rows("final_layer_norm", "norm2"),
        *dense_rows("fc1", "mlp/up"),
        *dense_rows("fc2", "mlp/down"),
    )
    return (
        *_word_rows(c, "model.decoder.embed_tokens.weight"),
        Row("model.decoder.embed_positions.weight", "position/table"),
        *norm_rows("model.decoder.final_layer_norm", "norm"),
        *under("model.decoder.layers.{i}.", "blocks/", block),
    )


def gpt2_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's GPT2LMHeadModel, whose matrices are (in, out) as ours."""
    cut = heads_in_bias(c.heads, c.head)
    back = reshaped((c.heads * c.head, c.width), (c.heads, c.head, c.width))
    block = (
        Row(
            "attn.c_attn.weight",
            tuple(f"attention/{x}/kernel" for x in "qkv"),
            fused(cut, cut, cut, axis=1),
        ),
        Row("attn.c_attn.bias", tuple(f"attention/{x}/bias" for x in "qkv"), fused(cut, cut, cut)),
        Row("attn.c_proj.weight", "attention/o/kernel", back),
        Row("attn.c_proj.bias", "attention/o/bias"),
        *norm_rows("ln_1", "norm1"),
        *norm_rows("ln_2", "norm2"),
        Row("mlp.c_fc.weight", "mlp/up/kernel"),
        Row("mlp.c_fc.bias", "mlp/up/bias"),
        Row("mlp.c_proj.weight", "mlp/down/kernel"),
        Row("mlp.c_proj.bias", "mlp/down/bias"),
    )
    return (
        *_word_rows(c, "transformer.wte.weight"),
        Row("transformer.wpe.weight", "position/table"),
        *norm_rows("transformer.ln_f", "norm"),
        *under("transformer.h.{i}.", "blocks/", block),
    )


def _attention_rows(c: DecoderConfig, out: str) -> tuple[Row, ...]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": out}
    return attentions.torch_rows(names, c.heads, c.head, c.biases, c.kv_heads)


def _word_rows(c: DecoderConfig, name: str) -> tuple[Row, ...]:
    words, head = same, linear
    if c.rows > c.vocab:
        words, head = (padded(c.vocab, c.rows, op) for op in (words, head))
    if c.tied:
        return (Row(name, "embedding/table", words, also=("lm_head.weight",)),)
    return (Row(name, "embedding/table", words), Row("lm_head.weight", "head/kernel", head))
