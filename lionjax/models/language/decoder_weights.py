# SPDX-License-Identifier: Apache-2.0
"""What the weights of a `Decoder` are called in torch: LLaMA, OPT, GPT-2, MPT and Kosmos-2's."""

from __future__ import annotations

from lionjax.core.weight_map import (
    Row,
    fused,
    heads_in,
    heads_in_bias,
    heads_out,
    linear,
    padded,
    reshaped,
    same,
    under,
)
from lionjax.models.language.decoder import DecoderConfig
from lionjax.nn import adapters
from lionjax.nn import attention as attentions
from lionjax.nn.layers import dense_rows, norm_rows


def llama_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's LlamaForCausalLM."""
    block = (
        *under("self_attn.", "attention/", _attention_rows(c, "o_proj")),
        *norm_rows("input_layernorm", "norm1", bias=False),
        *norm_rows("post_attention_layernorm", "norm2", bias=False),
        *(row for x in ("gate", "up", "down") for row in dense_rows(f"mlp.{x}_proj", f"mlp/{x}", bias=False)),
    )
    if c.adapters is not None:
        block = (*block, *under("adapter.", "adapters/", adapters.torch_rows(c.adapters)))
    return (
        *_word_rows(c, "model.embed_tokens.weight"),
        *norm_rows("model.norm", "norm", bias=False),
        *_layer_rows(c, "model.layers.", block),
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
        *_layer_rows(c, "model.decoder.layers.", block),
    )


def gpt2_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's GPT2LMHeadModel, whose matrices are (in, out) as ours."""
    cut = heads_in_bias(c.heads, c.head)
    back = reshaped((c.heads * c.head, c.width), (c.heads, c.head, c.width))
    block = (
        Row("attn.c_attn.weight", tuple(f"attention/{x}/kernel" for x in "qkv"), fused(cut, cut, cut, axis=1)),
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
        *_layer_rows(c, "transformer.h.", block),
    )


def mpt_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's MptForCausalLM, and of MPT's own code, which may norm queries and keys."""
    cut = heads_in(c.heads, c.head)
    paths = tuple(f"attention/{x}/kernel" for x in "qkv")
    normed = ("q", "k") if c.qk_norms else ()
    block = (
        Row("attn.Wqkv.weight", paths, fused(cut, cut, cut)),
        Row("attn.out_proj.weight", "attention/o/kernel", heads_out(c.heads, c.head)),
        *(row for x in normed for row in norm_rows(f"attn.{x}_ln", f"{x}_norm", bias=False)),
        *norm_rows("norm_1", "norm1", bias=False),
        *norm_rows("norm_2", "norm2", bias=False),
        *dense_rows("ffn.up_proj", "mlp/up", bias=False),
        *dense_rows("ffn.down_proj", "mlp/down", bias=False),
    )
    return (
        *_word_rows(c, "transformer.wte.weight"),
        *norm_rows("transformer.norm_f", "norm", bias=False),
        *_layer_rows(c, "transformer.blocks.", block),
    )


def kosmos_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's Kosmos2TextForCausalLM."""
    block = (
        *under("self_attn.", "attention/", _attention_rows(c, "out_proj")),
        *norm_rows("self_attn.inner_attn_ln", "attention/norm"),
        *norm_rows("self_attn_layer_norm", "norm1"),
        *norm_rows("final_layer_norm", "norm2"),
        *dense_rows("ffn.fc1", "mlp/up"),
        *dense_rows("ffn.fc2", "mlp/down"),
        *norm_rows("ffn.ffn_layernorm", "mlp/norm"),
    )
    return (
        *_word_rows(c, "model.embed_tokens.weight"),
        *norm_rows("model.layer_norm", "norm"),
        *_layer_rows(c, "model.layers.", block),
    )


def torch_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's class for such a decoder."""
    if c.positions:
        return opt_rows(c) if c.position_offset else gpt2_rows(c)
    return {"turns": llama_rows, "near": mpt_rows, "waves": kosmos_rows}[c.where](c)


def _layer_rows(c: DecoderConfig, torch: str, block) -> tuple[Row, ...]:
    """The rows of all layers; where they stand in groups, the last one of each has a place of its own."""
    if c.cross is None:
        return under(torch + "{i}.", "blocks/", block)
    every = c.cross.every
    if every == 1:
        return under(torch + "{i}.", "groups/block/", block)
    return (
        *under(f"{torch}{{{every}i+{every - 1}}}.", "groups/block/", block),
        *under(f"{torch}{{{every}i+j<{every - 1}}}.", "groups/before/", block),
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
