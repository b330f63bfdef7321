# SPDX-License-Identifier: Apache-2.0
"""T5 v1.1, LLaMA, OPT and GPT-2 as published on Hugging Face: configs, weight maps and names to skip.

Modules under lionjax.models are imported only when a checkpoint of theirs is opened.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_language_params, class_format
from lionjax.convert.formats.config_fields import (
    ACTIVATIONS,
    BLOCK_SIZES,
    HF_ACTIVATIONS,
    TOKEN_IDS,
    ConfigFields,
    language_model_fields,
    token_id,
)
from lionjax.convert.formats.config_table import ConfigTable, join, require_equal, unsupported
from lionjax.convert.formats.hf_rope import ROPE_FIELDS, ROPE_FIXED, rope_from_hf, rope_to_hf
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
    {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6}
    | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    | {"layer_norm_epsilon": 1e-6, "dropout_rate": 0.1}
    | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ("decoder_start_token_id", "pad_token_id", "eos_token_id"),
)
T5_TABLE = ConfigTable(
    ("t5",),
    T5_FIELDS,
    # is_gated_act and dense_act_fn follow from feed_forward_proj, scale_decoder_outputs from tie_word_embeddings.
    {"feed_forward_proj": "relu", "is_gated_act": None, "dense_act_fn": None}
    | {"tie_word_embeddings": True, "scale_decoder_outputs": None},
    inert=("n_positions",),
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
)


def _t5_config_from_hf(hf_config: dict, path: str = "") -> Any:
    from lionjax.models.language.t5 import T5Config

    s = T5_TABLE.read(hf_config, path)
    activation = _t5_activation(s, path)
    # Newer transformers write tie_word_embeddings true for every T5; scale_decoder_outputs tells v1.0 apart.
    scaled_by = "tie_word_embeddings" if s["scale_decoder_outputs"] is None else "scale_decoder_outputs"
    if s[scaled_by] is not False:  # T5 v1.0, which scales the states before the LM head
        raise unsupported(join(path, scaled_by), s[scaled_by], (False,))
    if s["num_decoder_layers"] is None:
        s["num_decoder_layers"] = s["num_layers"]
    return T5Config(**T5_TABLE.read_fields(s), activation=activation)


def _t5_activation(settings: dict, path: str) -> str:
    """The activation of the gated feed-forward. Raises UserError for a feed-forward without a gate (T5 v1.0)."""
    kind, _, act = settings["feed_forward_proj"].partition("-")
    if kind != "gated":
        raise unsupported(join(path, "feed_forward_proj"), settings["feed_forward_proj"], ("gated-gelu", "gated-silu"))
    if settings["is_gated_act"] not in (None, True):
        raise unsupported(join(path, "is_gated_act"), settings["is_gated_act"], (True,))
    field, act = "feed_forward_proj", "gelu_new" if act == "gelu" else act
    if settings["dense_act_fn"] is not None:
        field, act = "dense_act_fn", settings["dense_act_fn"]
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise unsupported(join(path, field), settings[field], tuple(ACTIVATIONS))
    return ACTIVATIONS[act]


def _t5_config_to_hf(c: T5Config) -> dict:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "feed_forward_proj": f"gated-{'gelu' if c.activation == 'gelu_tanh' else HF_ACTIVATIONS[c.activation]}",
        "dense_act_fn": HF_ACTIVATIONS[c.activation],
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


def _matches_decoder(c: DecoderConfig, positions: tuple[bool, bool]) -> bool:
    if type(c).__name__ != "DecoderConfig" or c.position_type != "rope":
        return False
    return (c.max_positions > 0, c.position_offset > 0) == positions


def _decoder_abstract_params(c: DecoderConfig, mesh: Any = None) -> Params:
    from lionjax.models.language.decoder import Decoder

    return abstract_language_params(Decoder(c), lambda module, ids: module.logits(module(module.embed(ids), ids)), mesh)


_EMBEDDINGS = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
_LLAMA_HEADS = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_FIELDS = language_model_fields(
    _EMBEDDINGS | BLOCK_SIZES | _LLAMA_HEADS | {"norm_eps": "rms_norm_eps", "dropout": "attention_dropout"},
    LLAMA_7B | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0, "hidden_act": "silu"},
    "hidden_act",
    pad=0,
    bos=1,
    eos=2,
)
LLAMA_TABLE = ConfigTable(
    ("llama",),
    LLAMA_FIELDS,
    {"sliding_window": None} | ROPE_FIELDS,
    fixed={"attention_bias": (False, None), "mlp_bias": (False, None)} | ROPE_FIXED,
    # pretraining_tp splits matrix products, which changes rounding only.
    inert=("pretraining_tp", "max_sequence_length", "is_llama_config", "is_decoder"),
)
MISTRAL_TABLE = dataclasses.replace(
    LLAMA_TABLE,
    model_types=("mistral",),
    computed=LLAMA_TABLE.computed
    | {"intermediate_size": 14336, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "sliding_window": 4096},
    nullable=("sliding_window",),
)
_OPT_SIZES = BLOCK_SIZES | {"mlp_dim": "ffn_dim"}
OPT_FIELDS = language_model_fields(
    _EMBEDDINGS | _OPT_SIZES | {"dropout": "dropout"},
    {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}
    | {"activation_function": "relu", "tie_word_embeddings": True, "dropout": 0.1},
    "activation_function",
    pad=1,
    bos=2,
    eos=2,
)
OPT_TABLE = ConfigTable(
    ("opt",),
    OPT_FIELDS,
    {"max_position_embeddings": 2048, "word_embed_proj_dim": None},
    fixed={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False, None),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    inert=("attention_dropout", "activation_dropout", "layerdrop", "is_decoder"),
)
_GPT2_SIZES = {"width": "n_embd", "depth": "n_layer", "num_heads": "n_head", "max_positions": "n_positions"}
GPT2_FIELDS = language_model_fields(
    _EMBEDDINGS | _GPT2_SIZES | {"norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": 0.1},
    "activation_function",
    pad=None,
    bos=50256,
    eos=50256,
)
GPT2_TABLE = ConfigTable(
    ("gpt2",),
    GPT2_FIELDS,
    {"n_inner": None},
    fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False, None)},
    # reorder_and_upcast_attn changes rounding only: attention scores are in float32 here.
    inert=("reorder_and_upcast_attn", "attn_pdrop", "embd_pdrop", "n_ctx", "is_decoder")
    + ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)


def one_head_size(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of attention whose queries, keys and values all have `width / num_heads` dimensions a head."""
    return {"num_kv_heads": fields["num_heads"], "head_dim": fields["width"] // fields["num_heads"]}


def llama_from_settings(table: ConfigTable, settings: dict, path: str = "") -> Any:
    """The DecoderConfig of what `table`, a table with LLaMA's fields, has read at `path` of a config.json.

    Raises UserError for a sliding window that is shorter than the longest text.
    """
    from lionjax.models.language.decoder import DecoderConfig

    s, heads = dict(settings), settings["num_attention_heads"]
    window = s["sliding_window"]
    if window is not None and not (isinstance(window, int) and window >= s["max_position_embeddings"]):
        raise unsupported(join(path, "sliding_window"), window, (None, "max_position_embeddings or more"))
    if s["num_key_value_heads"] is None:
        s["num_key_value_heads"] = heads
    if s["head_dim"] is None:
        s["head_dim"] = s["hidden_size"] // heads
    rope_theta, rope_scaling = rope_from_hf(s, path)
    return DecoderConfig(**table.read_fields(s), rope_theta=rope_theta, rope_scaling=rope_scaling)


def _llama_config_from_hf(hf_config: dict, path: str = "") -> Any:
    table = MISTRAL_TABLE if hf_config.get("model_type") == "mistral" else LLAMA_TABLE
    return llama_from_settings(table, table.read(hf_config, path), path)


def _llama_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **rope_to_hf(c.rope_theta, c.rope_scaling),
    } | LLAMA_FIELDS.write(c)


def _llama_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.llama_weight_map(c)


def _opt_config_from_hf(hf_config: dict, path: str = "") -> Any:
    from lionjax.models.language.decoder import OPT_2_7B

    s = OPT_TABLE.read(hf_config, path)
    require_equal(join(path, "word_embed_proj_dim"), s["word_embed_proj_dim"], "hidden_size", s["hidden_size"])
    fields = OPT_TABLE.read_fields(s)
    max_positions = s["max_position_embeddings"] + OPT_2_7B.position_offset
    return dataclasses.replace(OPT_2_7B, **fields, **one_head_size(fields), max_positions=max_positions)


def _opt_config_to_hf(c: DecoderConfig) -> dict:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "word_embed_proj_dim": c.width,
        "max_position_embeddings": c.max_positions - c.position_offset,
        "do_layer_norm_before": True,
    } | OPT_FIELDS.write(c)


def _opt_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.opt_weight_map(c)


def _gpt2_config_from_hf(hf_config: dict, path: str = "") -> Any:
    from lionjax.models.language.decoder import GPT2

    s = GPT2_TABLE.read(hf_config, path)
    end = token_id(s, "eos_token_id", GPT2.eos_token_id)
    fields = GPT2_FIELDS.read(s, dict.fromkeys(TOKEN_IDS, end))
    mlp_dim = 4 * s["n_embd"] if s["n_inner"] is None else s["n_inner"]
    return dataclasses.replace(GPT2, **fields, **one_head_size(fields), mlp_dim=mlp_dim)


def _gpt2_config_to_hf(c: DecoderConfig) -> dict:
    dropouts = {"embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
    hf_config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_inner": c.mlp_dim}
    return hf_config | GPT2_FIELDS.write(c) | dropouts


def _gpt2_weight_map(c: DecoderConfig) -> tuple:
    from lionjax.models.language import decoder_weights

    return decoder_weights.gpt2_weight_map(c)


def _decoder_format(
    name: str, positions: tuple[bool, bool], functions: tuple[Callable, Callable, Callable], **fields: Any
) -> CheckpointFormat:
    """The format of a decoder. `positions`: whether it has learned positions, and an offset of them.

    `functions`: config_from_hf, config_to_hf and weight_map; `fields`: other fields of CheckpointFormat.
    """
    matches = functools.partial(_matches_decoder, positions=positions)
    model_types = fields.pop("model_types", (name,))
    return CheckpointFormat(name, model_types, matches, *functions, _decoder_abstract_params, **fields)


T5 = class_format(
    "t5",
    "T5Config",
    (_t5_config_from_hf, _t5_config_to_hf, _t5_weight_map, _t5_abstract_params),
    # The first releases saved this table, though no code uses it.
    ignore_patterns=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight(?#unused)",),
    tied_keys=(("lm_head.weight", "shared.weight"),),
)
LLAMA = _decoder_format(
    "llama",
    (False, False),
    (_llama_config_from_hf, _llama_config_to_hf, _llama_weight_map),
    model_types=("llama", "mistral"),
    ignore_patterns=(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",),
    base_model_prefix="model.",
)
OPT = _decoder_format(
    "opt", (True, True), (_opt_config_from_hf, _opt_config_to_hf, _opt_weight_map), base_model_prefix="model."
)
GPT2 = _decoder_format(
    "gpt2",
    (True, False),
    (_gpt2_config_from_hf, _gpt2_config_to_hf, _gpt2_weight_map),
    ignore_patterns=(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias(?#causal mask)",),
    base_model_prefix="transformer.",
)
LANGUAGE_FORMATS = (T5, LLAMA, OPT, GPT2)
