# SPDX-License-Identifier: Apache-2.0
"""T5 v1.1, LLaMA, OPT and GPT-2 as published on Hugging Face: configs, weight maps and names to skip.

Modules under lionjax.models are imported only when a checkpoint of theirs is opened.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, require_supported, token_id
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config

# T5 v1.1 and FlanT5


def _t5_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.t5 import T5Config

    projection = hf_config.get("feed_forward_proj", "relu")
    # Newer transformers write tie_word_embeddings true for every T5; scale_decoder_outputs tells v1.0 apart.
    scaled = hf_config.get("scale_decoder_outputs", hf_config.get("tie_word_embeddings", True))
    activations = {"gated-gelu": "gelu_tanh", "gated-silu": "silu"}
    if hf_config.get("dense_act_fn") == "gelu":  # as in BLIP-2
        activations["gated-gelu"] = "gelu"
    require_supported(
        projection in activations, f"feed_forward_proj {projection!r}", "gated-gelu or gated-silu (T5 v1.1 and FlanT5)"
    )
    require_supported(
        not scaled, "tie_word_embeddings true", "tie_word_embeddings false (T5 v1.1 and FlanT5, unscaled LM head)"
    )
    return T5Config(
        hf_config["vocab_size"],
        hf_config["d_model"],
        hf_config["d_kv"],
        hf_config["num_heads"],
        hf_config["d_ff"],
        hf_config["num_layers"],
        hf_config.get("num_decoder_layers") or hf_config["num_layers"],
        hf_config.get("relative_attention_num_buckets", 32),
        hf_config.get("relative_attention_max_distance", 128),
        hf_config.get("layer_norm_epsilon", 1e-6),
        activations[projection],
        hf_config.get("dropout_rate", 0.1),
        token_id(hf_config, "decoder_start_token_id", 0),
        token_id(hf_config, "pad_token_id", 0),
        token_id(hf_config, "eos_token_id", 1),
    )


def _t5_config_to_hf(c: T5Config) -> dict:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "num_heads": c.num_heads,
        "d_ff": c.mlp_dim,
        "num_layers": c.encoder_depth,
        "num_decoder_layers": c.decoder_depth,
        "relative_attention_num_buckets": c.num_buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": "gated-silu" if c.activation == "silu" else "gated-gelu",
        "dense_act_fn": "gelu_new" if c.activation == "gelu_tanh" else c.activation,
        "dropout_rate": c.dropout,
        "decoder_start_token_id": c.decoder_start_token_id,
        "pad_token_id": c.pad_token_id,
        "eos_token_id": c.eos_token_id,
        "tie_word_embeddings": False,
    }


def _t5_weight_map(c: T5Config) -> tuple:
    from lionjax.models.language import t5

    return t5.weight_map(c)


def _t5_abstract_params(c: T5Config, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.t5 import T5

    def run(module, ids):
        encoded = module.encode(module.embed(ids), ids)
        return module.decode(ids, ids, encoded, ids)

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract_params(
        lambda key: T5(c).init(key, ids, method=run)["params"], jax.random.key(0), mesh=mesh
    )


# Decoders


def _matches_decoder(c: DecoderConfig, learned_positions: bool, position_offset: bool) -> bool:
    positions = (
        (c.max_positions > 0, c.position_offset > 0)
        if type(c).__name__ == "DecoderConfig" and c.position_type == "rope"
        else None
    )
    return positions == (learned_positions, position_offset)


def _decoder_abstract_params(c: DecoderConfig, mesh: Any = None) -> Params:
    import jax
    import jax.numpy as jnp

    from lionjax.core import sharding
    from lionjax.models.language.decoder import Decoder

    def run(module, ids):
        return module.logits(module(module.embed(ids), ids))

    ids = jnp.zeros((1, 2), jnp.int32)
    return sharding.abstract_params(
        lambda key: Decoder(c).init(key, ids, method=run)["params"], jax.random.key(0), mesh=mesh
    )


def _llama_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.decoder import DecoderConfig

    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require_supported(rope_type == "default", f"rotary positions of type {rope_type!r}", "the type 'default'")
    require_supported(
        hf_config.get("hidden_act", "silu") == "silu", f"hidden_act {hf_config.get('hidden_act')!r}", "silu"
    )
    biased = hf_config.get("attention_bias") or hf_config.get("mlp_bias")
    require_supported(not biased, "biases in its attention or feed-forward", "a LLaMA without biases")
    heads = hf_config["num_attention_heads"]
    return DecoderConfig(
        hf_config["vocab_size"],
        hf_config["hidden_size"],
        hf_config["num_hidden_layers"],
        heads,
        hf_config.get("num_key_value_heads") or heads,
        hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        hf_config["intermediate_size"],
        hf_config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))),
        tie_embeddings=hf_config.get("tie_word_embeddings", False),
        dropout=hf_config.get("attention_dropout", 0.0),
        pad_token_id=token_id(hf_config, "pad_token_id", 0),
        bos_token_id=token_id(hf_config, "bos_token_id", 1),
        eos_token_id=token_id(hf_config, "eos_token_id", 2),
    )


def _llama_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_dropout": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
    }


def _llama_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.llama_weight_map(c)


def _opt_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.decoder import OPT_2_7B

    embed_dim = hf_config.get("word_embed_proj_dim") or hf_config["hidden_size"]
    require_supported(
        embed_dim == hf_config["hidden_size"], f"word_embed_proj_dim {embed_dim}", "an OPT where it equals hidden_size"
    )
    require_supported(
        hf_config.get("do_layer_norm_before", True), "do_layer_norm_before false", "do_layer_norm_before true"
    )
    act = hf_config.get("activation_function", "relu")
    require_supported(act == "relu", f"activation_function {act!r}", "relu")
    heads = hf_config["num_attention_heads"]
    return dataclasses.replace(
        OPT_2_7B,
        vocab_size=hf_config["vocab_size"],
        width=hf_config["hidden_size"],
        depth=hf_config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hf_config["hidden_size"] // heads,
        mlp_dim=hf_config["ffn_dim"],
        tie_embeddings=hf_config.get("tie_word_embeddings", True),
        max_positions=hf_config["max_position_embeddings"] + OPT_2_7B.position_offset,
        dropout=hf_config.get("dropout", 0.1),
        pad_token_id=token_id(hf_config, "pad_token_id", 1),
        bos_token_id=token_id(hf_config, "bos_token_id", 2),
        eos_token_id=token_id(hf_config, "eos_token_id", 2),
    )


def _opt_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "word_embed_proj_dim": c.width,
        "ffn_dim": c.mlp_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_positions - c.position_offset,
        "activation_function": c.activation,
        "do_layer_norm_before": True,
        "dropout": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
    }


def _opt_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.opt_weight_map(c)


def _gpt2_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.decoder import GPT2

    act = hf_config.get("activation_function", "gelu_new")
    require_supported(act == "gelu_new", f"activation_function {act!r}", "gelu_new")
    heads, end = hf_config["n_head"], token_id(hf_config, "eos_token_id", GPT2.eos_token_id)
    return dataclasses.replace(
        GPT2,
        vocab_size=hf_config["vocab_size"],
        width=hf_config["n_embd"],
        depth=hf_config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hf_config["n_embd"] // heads,
        mlp_dim=hf_config.get("n_inner") or 4 * hf_config["n_embd"],
        max_positions=hf_config["n_positions"],
        norm_eps=hf_config.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf_config.get("tie_word_embeddings", True),
        dropout=hf_config.get("resid_pdrop", 0.1),
        pad_token_id=token_id(hf_config, "pad_token_id", end),
        bos_token_id=token_id(hf_config, "bos_token_id", end),
        eos_token_id=end,
    )


def _gpt2_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_embd": c.width,
        "n_inner": c.mlp_dim,
        "n_layer": c.depth,
        "n_head": c.num_heads,
        "n_positions": c.max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
    }


def _gpt2_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.gpt2_weight_map(c)


T5 = CheckpointFormat(
    "t5",
    ("t5",),
    lambda c: type(c).__name__ == "T5Config",
    _t5_config_from_hf,
    _t5_config_to_hf,
    _t5_weight_map,
    _t5_abstract_params,
    # The first releases saved this table, though no code uses it.
    ignore_patterns=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight(?#unused)",),
    tied_keys=(("lm_head.weight", "shared.weight"),),
)
LLAMA = CheckpointFormat(
    "llama",
    ("llama",),
    lambda c: _matches_decoder(c, False, False),
    _llama_config_from_hf,
    _llama_config_to_hf,
    _llama_weight_map,
    _decoder_abstract_params,
    ignore_patterns=(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",),
    base_model_prefix="model.",
)
OPT = CheckpointFormat(
    "opt",
    ("opt",),
    lambda c: _matches_decoder(c, True, True),
    _opt_config_from_hf,
    _opt_config_to_hf,
    _opt_weight_map,
    _decoder_abstract_params,
    base_model_prefix="model.",
)
GPT2 = CheckpointFormat(
    "gpt2",
    ("gpt2",),
    lambda c: _matches_decoder(c, True, False),
    _gpt2_config_from_hf,
    _gpt2_config_to_hf,
    _gpt2_weight_map,
    _decoder_abstract_params,
    ignore_patterns=(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias(?#causal mask)",),
    base_model_prefix="transformer.",
)
LANGUAGE_FORMATS = (T5, LLAMA, OPT, GPT2)
