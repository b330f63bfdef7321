# SPDX-License-Identifier: Apache-2.0
"""T5 v1.1, LLaMA, OPT and GPT-2 as published on Hugging Face: configs, weight maps and names to skip.

Modules under lionjax.models are imported only when a checkpoint of theirs is opened.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_language_params, require_supported
from lionjax.convert.formats.config_fields import BLOCK_SIZES, TOKEN_IDS, ConfigFields, token_id
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config

# T5 v1.1 and FlanT5

_T5_SIZES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "head_dim": "d_kv",
    "num_heads": "num_heads",
    "mlp_dim": "d_ff",
}
_T5_DEPTHS = {"encoder_depth": "num_layers", "decoder_depth": "num_decoder_layers"}
_T5_POSITIONS = {"num_buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance"}
T5_FIELDS = ConfigFields(
    _T5_SIZES | _T5_DEPTHS | _T5_POSITIONS | {"norm_eps": "layer_norm_epsilon", "dropout": "dropout_rate"},
    {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    | {"layer_norm_epsilon": 1e-6, "dropout_rate": 0.1}
    | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ("decoder_start_token_id", "pad_token_id", "eos_token_id"),
)


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
    decoder_depth = hf_config.get("num_decoder_layers") or hf_config.get("num_layers")
    fields = T5_FIELDS.read(hf_config | {"num_decoder_layers": decoder_depth})
    return T5Config(**fields, activation=activations[projection])


def _t5_config_to_hf(c: T5Config) -> dict:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "feed_forward_proj": "gated-silu" if c.activation == "silu" else "gated-gelu",
        "dense_act_fn": "gelu_new" if c.activation == "gelu_tanh" else c.activation,
        "tie_word_embeddings": False,
    } | T5_FIELDS.write(c)


def _t5_weight_map(c: T5Config) -> tuple:
    from lionjax.models.language import t5

    return t5.weight_map(c)


def _t5_abstract_params(c: T5Config, mesh: Any = None) -> Params:
    from lionjax.models.language.t5 import T5

    def forward(module, ids):
        encoded = module.encode(module.embed(ids), ids)
        return module.decode(ids, ids, encoded, ids)

    return abstract_language_params(T5(c), forward, mesh)


# Decoders


def _matches_decoder(c: DecoderConfig, learned_positions: bool, position_offset: bool) -> bool:
    positions = (
        (c.max_positions > 0, c.position_offset > 0)
        if type(c).__name__ == "DecoderConfig" and c.position_type == "rope"
        else None
    )
    return positions == (learned_positions, position_offset)


def _decoder_abstract_params(c: DecoderConfig, mesh: Any = None) -> Params:
    from lionjax.models.language.decoder import Decoder

    return abstract_language_params(Decoder(c), lambda module, ids: module.logits(module(module.embed(ids), ids)), mesh)


_EMBEDDINGS = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
_LLAMA_HEADS = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
LLAMA_FIELDS = ConfigFields(
    _EMBEDDINGS | BLOCK_SIZES | _LLAMA_HEADS | {"norm_eps": "rms_norm_eps", "dropout": "attention_dropout"},
    {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    TOKEN_IDS,
)
_OPT_SIZES = BLOCK_SIZES | {"mlp_dim": "ffn_dim"}
OPT_FIELDS = ConfigFields(
    _EMBEDDINGS | _OPT_SIZES | {"dropout": "dropout"},
    {"tie_word_embeddings": True, "dropout": 0.1, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    TOKEN_IDS,
)
_GPT2_SIZES = {"width": "n_embd", "depth": "n_layer", "num_heads": "n_head", "max_positions": "n_positions"}
GPT2_FIELDS = ConfigFields(
    _EMBEDDINGS | _GPT2_SIZES | {"norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": 0.1},
    TOKEN_IDS,
)


LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # transformers' default sizes, which the text_config of a larger model omits


def one_head_size(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of attention whose queries, keys and values all have `width / num_heads` dimensions a head."""
    return {"num_kv_heads": fields["num_heads"], "head_dim": fields["width"] // fields["num_heads"]}


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
    kv_heads = hf_config.get("num_key_value_heads") or heads
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    fields = LLAMA_FIELDS.read(hf_config | {"num_key_value_heads": kv_heads, "head_dim": head_dim})
    rope_theta = float(rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)))
    return DecoderConfig(**fields, rope_theta=rope_theta)


def _llama_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
    } | LLAMA_FIELDS.write(c)


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
    fields = OPT_FIELDS.read(hf_config)
    max_positions = hf_config["max_position_embeddings"] + OPT_2_7B.position_offset
    return dataclasses.replace(OPT_2_7B, **fields, **one_head_size(fields), max_positions=max_positions)


def _opt_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "word_embed_proj_dim": c.width,
        "max_position_embeddings": c.max_positions - c.position_offset,
        "activation_function": c.activation,
        "do_layer_norm_before": True,
    } | OPT_FIELDS.write(c)


def _opt_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.opt_weight_map(c)


def _gpt2_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.decoder import GPT2

    act = hf_config.get("activation_function", "gelu_new")
    require_supported(act == "gelu_new", f"activation_function {act!r}", "gelu_new")
    end = token_id(hf_config, "eos_token_id", GPT2.eos_token_id)
    fields = GPT2_FIELDS.read(hf_config, dict.fromkeys(TOKEN_IDS, end))
    mlp_dim = hf_config.get("n_inner") or 4 * hf_config["n_embd"]
    return dataclasses.replace(GPT2, **fields, **one_head_size(fields), mlp_dim=mlp_dim)


def _gpt2_config_to_hf(c: DecoderConfig) -> dict:
    dropouts = {"embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
    hf_config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_inner": c.mlp_dim}
    return hf_config | {"activation_function": "gelu_new"} | GPT2_FIELDS.write(c) | dropouts


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
