# SPDX-License-Identifier: Apache-2.0
"""Published language models: T5, LLaMA, OPT and GPT-2; and what is said of any published model.

For each: what its config.json means here and what ours means there, its rows, its shapes, and what to pass over.
Model files are imported when one of theirs is met.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import Published, refuse_unless, token
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config

# T5 v1.1 and FlanT5


def _t5_config(s: dict) -> Any:
    from lionjax.models.language.t5 import T5Config

    form = s.get("feed_forward_proj", "relu")
    # Newer versions of transformers say "tied" of every T5; whether T5 v1.0's scale is used tells them apart.
    scaled = s.get("scale_decoder_outputs", s.get("tie_word_embeddings", True))
    activations = {"gated-gelu": "gelu_tanh", "gated-silu": "silu"}
    if s.get("dense_act_fn") == "gelu":  # as BLIP-2 runs it
        activations["gated-gelu"] = "gelu"
    refuse_unless(form in activations, f"feed_forward_proj {form!r}", "T5 v1.1 and FlanT5, gated-gelu or gated-silu,")
    refuse_unless(not scaled, "tie_word_embeddings true", "T5 v1.1 and FlanT5, with an unscaled head,")
    return T5Config(
        s["vocab_size"],
        s["d_model"],
        s["d_kv"],
        s["num_heads"],
        s["d_ff"],
        s["num_layers"],
        s.get("num_decoder_layers") or s["num_layers"],
        s.get("relative_attention_num_buckets", 32),
        s.get("relative_attention_max_distance", 128),
        s.get("layer_norm_epsilon", 1e-6),
        activations[form],
        s.get("dropout_rate", 0.1),
        token(s, "decoder_start_token_id", 0),
        token(s, "pad_token_id", 0),
        token(s, "eos_token_id", 1),
    )


def _t5_settings(c: T5Config) -> dict:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": c.vocab,
        "d_model": c.width,
        "d_kv": c.head,
        "num_heads": c.heads,
        "d_ff": c.hidden,
        "num_layers": c.encoder_layers,
        "num_decoder_layers": c.decoder_layers,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.eps,
        "feed_forward_proj": "gated-silu" if c.activation == "silu" else "gated-gelu",
        "dense_act_fn": "gelu_new" if c.activation == "gelu_tanh" else c.activation,
        "dropout_rate": c.dropout,
        "decoder_start_token_id": c.start_token,
        "pad_token_id": c.pad_token,
        "eos_token_id": c.end_token,
        "tie_word_embeddings": False,
    }


def _t5_rows(c: T5Config) -> tuple:
    from lionjax.models.language import t5

    return t5.torch_rows(c)


def _t5_abstract(c: T5Config, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.t5 import T5

    def run(module, ids):
        encoded = module.encode(module.embed(ids), ids)
        return module.decode(ids, ids, encoded, ids)

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract(lambda key: T5(c).init(key, ids, method=run)["params"], jax.random.key(0), mesh=mesh)


# Decoders


def _of_decoder(c: DecoderConfig, learned: bool, offset: bool) -> bool:
    shape = (
        (c.positions > 0, c.position_offset > 0) if type(c).__name__ == "DecoderConfig" and c.where == "turns" else None
    )
    return shape == (learned, offset)


def _decoder_abstract(c: DecoderConfig, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.decoder import Decoder

    def run(module, ids):
        return module.logits(module(module.embed(ids), ids))

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract(lambda key: Decoder(c).init(key, ids, method=run)["params"], jax.random.key(0), mesh=mesh)


def _llama_config(s: dict) -> Any:
    from lionjax.models.language.decoder import DecoderConfig

    rope = s.get("rope_parameters") or s.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse_unless(kind == "default", f"rotary positions of type {kind!r}", "plain rotary positions")
    refuse_unless(s.get("hidden_act", "silu") == "silu", f"hidden_act {s.get('hidden_act')!r}", "silu")
    biased = s.get("attention_bias") or s.get("mlp_bias")
    refuse_unless(not biased, "biases in its attention or feed-forward", "a LLaMA without them")
    heads = s["num_attention_heads"]
    return DecoderConfig(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        heads,
        s.get("num_key_value_heads") or heads,
        s.get("head_dim") or s["hidden_size"] // heads,
        s["intermediate_size"],
        s.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", s.get("rope_theta", 10000.0))),
        tied=s.get("tie_word_embeddings", False),
        dropout=s.get("attention_dropout", 0.0),
        pad_token=token(s, "pad_token_id", 0),
        start_token=token(s, "bos_token_id", 1),
        end_token=token(s, "eos_token_id", 2),
    )


def _llama_settings(c: DecoderConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_dropout": c.dropout,
        "tie_word_embeddings": c.tied,
        "pad_token_id": c.pad_token,
        "bos_token_id": c.start_token,
        "eos_token_id": c.end_token,
    }


def _llama_rows(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.llama_rows(c)


def _opt_config(s: dict) -> Any:
    from lionjax.models.language.decoder import OPT_2_7B

    wide = s.get("word_embed_proj_dim") or s["hidden_size"]
    refuse_unless(wide == s["hidden_size"], f"words of width {wide}", "an OPT whose words are as wide as its layers")
    refuse_unless(s.get("do_layer_norm_before", True), "norms behind its layers", "an OPT with norms before them")
    act = s.get("activation_function", "relu")
    refuse_unless(act == "relu", f"activation_function {act!r}", "relu")
    heads = s["num_attention_heads"]
    return dataclasses.replace(
        OPT_2_7B,
        vocab=s["vocab_size"],
        width=s["hidden_size"],
        layers=s["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head=s["hidden_size"] // heads,
        hidden=s["ffn_dim"],
        tied=s.get("tie_word_embeddings", True),
        positions=s["max_position_embeddings"] + OPT_2_7B.position_offset,
        dropout=s.get("dropout", 0.1),
        pad_token=token(s, "pad_token_id", 1),
        start_token=token(s, "bos_token_id", 2),
        end_token=token(s, "eos_token_id", 2),
    )


def _opt_settings(c: DecoderConfig) -> dict:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "word_embed_proj_dim": c.width,
        "ffn_dim": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.positions - c.position_offset,
        "activation_function": c.activation,
        "do_layer_norm_before": True,
        "dropout": c.dropout,
        "tie_word_embeddings": c.tied,
        "pad_token_id": c.pad_token,
        "bos_token_id": c.start_token,
        "eos_token_id": c.end_token,
    }


def _opt_rows(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.opt_rows(c)


def _gpt2_config(s: dict) -> Any:
    from lionjax.models.language.decoder import GPT2

    act = s.get("activation_function", "gelu_new")
    refuse_unless(act == "gelu_new", f"activation_function {act!r}", "gelu_new")
    heads, end = s["n_head"], token(s, "eos_token_id", GPT2.end_token)
    return dataclasses.replace(
        GPT2,
        vocab=s["vocab_size"],
        width=s["n_embd"],
        layers=s["n_layer"],
        heads=heads,
        kv_heads=heads,
        head=s["n_embd"] // heads,
        hidden=s.get("n_inner") or 4 * s["n_embd"],
        positions=s["n_positions"],
        eps=s.get("layer_norm_epsilon", 1e-5),
        tied=s.get("tie_word_embeddings", True),
        dropout=s.get("resid_pdrop", 0.1),
        pad_token=token(s, "pad_token_id", end),
        start_token=token(s, "bos_token_id", end),
        end_token=end,
    )


def _gpt2_settings(c: DecoderConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab,
        "n_embd": c.width,
        "n_inner": c.hidden,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_positions": c.positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tied,
        "pad_token_id": c.pad_token,
        "bos_token_id": c.start_token,
        "eos_token_id": c.end_token,
    }


def _gpt2_rows(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.gpt2_rows(c)


T5 = Published(
    "t5",
    ("t5",),
    lambda c: type(c).__name__ == "T5Config",
    _t5_config,
    _t5_settings,
    _t5_rows,
    _t5_abstract,
    # A table that the first releases saved and no code has ever used.
    ignore=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight(?#no code uses it)",),
    copies=(("lm_head.weight", "shared.weight"),),
)
LLAMA = Published(
    "llama",
    ("llama",),
    lambda c: _of_decoder(c, False, False),
    _llama_config,
    _llama_settings,
    _llama_rows,
    _decoder_abstract,
    ignore=(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",),
    base="model.",
)
OPT = Published(
    "opt",
    ("opt",),
    lambda c: _of_decoder(c, True, True),
    _opt_config,
    _opt_settings,
    _opt_rows,
    _decoder_abstract,
    base="model.",
)
GPT2 = Published(
    "gpt2",
    ("gpt2",),
    lambda c: _of_decoder(c, True, False),
    _gpt2_config,
    _gpt2_settings,
    _gpt2_rows,
    _decoder_abstract,
    ignore=(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias(?#a mask)",),
    base="transformer.",
)
TEXTS = (T5, LLAMA, OPT, GPT2)
