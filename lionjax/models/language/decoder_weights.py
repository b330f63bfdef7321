# SPDX-License-Identifier: Apache-2.0
"""Weight maps of `Decoder`: Hugging Face's names for LLaMA, OPT, GPT-2, MPT and the Kosmos-2 text model."""

from __future__ import annotations

from lionjax.core.weight_map import (
    WeightMapping,
    identity,
    linear,
    merge_heads_kernel,
    pad_rows,
    reshape,
    split_fused,
    split_heads,
    split_heads_kernel,
    with_prefix,
)
from lionjax.models.language.decoder import DecoderConfig
from lionjax.nn import adapters
from lionjax.nn import attention as attentions
from lionjax.nn.layers import dense_weight_map, norm_weight_map


def llama_weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's LlamaForCausalLM."""
    block = (
        *with_prefix("self_attn.", "attention/", _attention_weight_map(c, "o_proj")),
        *norm_weight_map("input_layernorm", "norm1", bias=False),
        *norm_weight_map("post_attention_layernorm", "norm2", bias=False),
        *(row for x in ("gate", "up", "down") for row in dense_weight_map(f"mlp.{x}_proj", f"mlp/{x}", bias=False)),
    )
    if c.adapters is not None:
        block = (*block, *with_prefix("adapter.", "adapters/", adapters.adapter_weight_map(c.adapters)))
    return (
        *_embedding_weight_map(c, "model.embed_tokens.weight"),
        *norm_weight_map("model.norm", "norm", bias=False),
        *_layers_weight_map(c, "model.layers.", block),
    )


def opt_weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's OPTForCausalLM."""
    block = (
        *with_prefix("self_attn.", "attention/", _attention_weight_map(c, "out_proj")),
        *norm_weight_map("self_attn_layer_norm", "norm1"),
        *norm_weight_map("final_layer_norm", "norm2"),
        *dense_weight_map("fc1", "mlp/up"),
        *dense_weight_map("fc2", "mlp/down"),
    )
    return (
        *_embedding_weight_map(c, "model.decoder.embed_tokens.weight"),
        WeightMapping("model.decoder.embed_positions.weight", "position/table"),
        *norm_weight_map("model.decoder.final_layer_norm", "norm"),
        *_layers_weight_map(c, "model.decoder.layers.", block),
    )


def gpt2_weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's GPT2LMHeadModel, whose kernels are (in, out) as in Flax."""
    cut = split_heads(c.num_heads, c.head_dim)
    merge = reshape((c.num_heads * c.head_dim, c.width), (c.num_heads, c.head_dim, c.width))
    block = (
        WeightMapping(
            "attn.c_attn.weight", tuple(f"attention/{x}/kernel" for x in "qkv"), split_fused(cut, cut, cut, axis=1)
        ),
        WeightMapping("attn.c_attn.bias", tuple(f"attention/{x}/bias" for x in "qkv"), split_fused(cut, cut, cut)),
        WeightMapping("attn.c_proj.weight", "attention/o/kernel", merge),
        WeightMapping("attn.c_proj.bias", "attention/o/bias"),
        *norm_weight_map("ln_1", "norm1"),
        *norm_weight_map("ln_2", "norm2"),
        WeightMapping("mlp.c_fc.weight", "mlp/up/kernel"),
        WeightMapping("mlp.c_fc.bias", "mlp/up/bias"),
        WeightMapping("mlp.c_proj.weight", "mlp/down/kernel"),
        WeightMapping("mlp.c_proj.bias", "mlp/down/bias"),
    )
    return (
        *_embedding_weight_map(c, "transformer.wte.weight"),
        WeightMapping("transformer.wpe.weight", "position/table"),
        *norm_weight_map("transformer.ln_f", "norm"),
        *_layers_weight_map(c, "transformer.h.", block),
    )


def mpt_weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's MptForCausalLM and, for `qk_norm`, of the original MPT code."""
    cut = split_heads_kernel(c.num_heads, c.head_dim)
    paths = tuple(f"attention/{x}/kernel" for x in "qkv")
    normed = ("q", "k") if c.qk_norm else ()
    block = (
        WeightMapping("attn.Wqkv.weight", paths, split_fused(cut, cut, cut)),
        WeightMapping("attn.out_proj.weight", "attention/o/kernel", merge_heads_kernel(c.num_heads, c.head_dim)),
        *(row for x in normed for row in norm_weight_map(f"attn.{x}_ln", f"{x}_norm", bias=False)),
        *norm_weight_map("norm_1", "norm1", bias=False),
        *norm_weight_map("norm_2", "norm2", bias=False),
        *dense_weight_map("ffn.up_proj", "mlp/up", bias=False),
        *dense_weight_map("ffn.down_proj", "mlp/down", bias=False),
    )
    return (
        *_embedding_weight_map(c, "transformer.wte.weight"),
        *norm_weight_map("transformer.norm_f", "norm", bias=False),
        *_layers_weight_map(c, "transformer.blocks.", block),
    )


def kosmos2_weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's Kosmos2TextForCausalLM."""
    block = (
        *with_prefix("self_attn.", "attention/", _attention_weight_map(c, "out_proj")),
        *norm_weight_map("self_attn.inner_attn_ln", "attention/norm"),
        *norm_weight_map("self_attn_layer_norm", "norm1"),
        *norm_weight_map("final_layer_norm", "norm2"),
        *dense_weight_map("ffn.fc1", "mlp/up"),
        *dense_weight_map("ffn.fc2", "mlp/down"),
        *norm_weight_map("ffn.ffn_layernorm", "mlp/norm"),
    )
    return (
        *_embedding_weight_map(c, "model.embed_tokens.weight"),
        *norm_weight_map("model.layer_norm", "norm"),
        *_layers_weight_map(c, "model.layers.", block),
    )


def weight_map(c: DecoderConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's class for this config: OPT, GPT-2, LLaMA, MPT or Kosmos-2, by its position type."""
    if c.max_positions:
        return opt_weight_map(c) if c.position_offset else gpt2_weight_map(c)
    return {"rope": llama_weight_map, "alibi": mpt_weight_map, "sinusoidal": kosmos2_weight_map}[c.position_type](c)


def _layers_weight_map(c: DecoderConfig, torch_prefix: str, block) -> tuple[WeightMapping, ...]:
    """The mappings of all layers; with cross-attention, the last block of each group has its own parameter path."""
    if c.cross_attention is None:
        return with_prefix(torch_prefix + "{i}.", "blocks/", block)
    every = c.cross_attention.every_n_layers
    if every == 1:
        return with_prefix(torch_prefix + "{i}.", "groups/block/", block)
    return (
        *with_prefix(f"{torch_prefix}{{{every}i+{every - 1}}}.", "groups/block/", block),
        *with_prefix(f"{torch_prefix}{{{every}i+j<{every - 1}}}.", "groups/before/", block),
    )


def _attention_weight_map(c: DecoderConfig, out_proj_name: str) -> tuple[WeightMapping, ...]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": out_proj_name}
    return attentions.weight_map(names, c.num_heads, c.head_dim, c.attention_biases, c.num_kv_heads)


def _embedding_weight_map(c: DecoderConfig, torch_key: str) -> tuple[WeightMapping, ...]:
    table, head = identity, linear
    if c.padded_vocab_size > c.vocab_size:
        table, head = (pad_rows(c.vocab_size, c.padded_vocab_size, op) for op in (table, head))
    if c.tie_embeddings:
        return (WeightMapping(torch_key, "embedding/table", table, tied_keys=("lm_head.weight",)),)
    return (WeightMapping(torch_key, "embedding/table", table), WeightMapping("lm_head.weight", "head/kernel", head))
