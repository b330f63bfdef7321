# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of full-size releases without their weights."""

import ml_dtypes
import numpy as np


class Blank(dict):
    """Tensors of which only the form is known: no bytes behind them."""

    def __init__(self, forms):
        super().__init__({n: np.broadcast_to(np.zeros((), d), s) for n, (s, d) in forms.items()})


def lion_release(width: int) -> dict:
    """Every tensor of a full LION, written down from the release's files: names, shapes, dtypes."""
    f, h, b = np.float32, np.float16, ml_dtypes.bfloat16
    forms: dict[str, tuple] = {}

    def put(name, *shape, dtype=f):
        forms[name] = (shape, dtype)

    def dense(name, outputs, inputs, bias=True, dtype=f):
        put(name + ".weight", outputs, inputs, dtype=dtype)
        if bias:
            put(name + ".bias", outputs, dtype=dtype)

    def norm(name, size, bias=True, dtype=f):
        put(name + ".weight", size, dtype=dtype)
        if bias:
            put(name + ".bias", size, dtype=dtype)

    put("visual_encoder.cls_token", 1, 1, 1408)
    put("visual_encoder.pos_embed", 1, 257, 1408)
    put("visual_encoder.patch_embed.proj.weight", 1408, 3, 14, 14, dtype=h)
    put("visual_encoder.patch_embed.proj.bias", 1408, dtype=h)
    for i in range(40):  # the file holds one block more than is used
        block = f"visual_encoder.blocks.{i}."
        norm(block + "norm1", 1408)
        norm(block + "norm2", 1408)
        put(block + "attn.q_bias", 1408)
        put(block + "attn.v_bias", 1408)
        put(block + "attn.qkv.weight", 4224, 1408, dtype=h)
        dense(block + "attn.proj", 1408, 1408, dtype=h)
        dense(block + "mlp.fc1", 6144, 1408, dtype=h)
        dense(block + "mlp.fc2", 1408, 6144, dtype=h)
    norm("visual_encoder.fc_norm", 1408)
    dense("visual_encoder.head", 1000, 1408)

    put("query_tokens", 1, 32, 768)
    norm("ln_vision", 1408)
    dense("t5_proj", width, 768)
    put("Qformer.bert.embeddings.position_ids", 1, 512, dtype=np.int64)
    put("Qformer.bert.embeddings.word_embeddings.weight", 30523, 768)
    put("Qformer.bert.embeddings.position_embeddings.weight", 512, 768)
    norm("Qformer.bert.embeddings.LayerNorm", 768)
    for i in range(12):
        layer = f"Qformer.bert.encoder.layer.{i}."
        for part, source in (("attention", 768), ("crossattention", 1408)):
            if part == "attention" or i % 2 == 0:
                dense(f"{layer}{part}.self.query", 768, 768)
                dense(f"{layer}{part}.self.key", 768, source)
                dense(f"{layer}{part}.self.value", 768, source)
                dense(f"{layer}{part}.output.dense", 768, 768)
                norm(f"{layer}{part}.output.LayerNorm", 768)
        for end in ("", "_query"):
            dense(f"{layer}intermediate{end}.dense", 3072, 768)
            dense(f"{layer}output{end}.dense", 768, 3072)
            norm(f"{layer}output{end}.LayerNorm", 768)
    for k in range(2):
        block = f"fusion_adapter.blocks.{k}."
        for part in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                dense(f"{block}{part}.{name}", 1408, 1408)
            norm(f"{block}{part}.output.LayerNorm", 1408)
        dense(block + "intermediate.dense", 3072, 1408)
        dense(block + "output.dense", 1408, 3072)
        norm(block + "output.LayerNorm", 1408)
    norm("ln_adapter", 1408)
    dense("adapter_proj.0", 5632, 1408)
    dense("adapter_proj.2", width, 5632)
    put("soft_prompt_hint", width)

    hidden = {2048: 5120, 4096: 10240}[width]
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        put(f"t5_model.{name}.weight", 32128, width, dtype=b)
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        norm(f"t5_model.{stack}.final_layer_norm", width, bias=False, dtype=b)
        relative = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        put(f"t5_model.{stack}.{relative}", 32, width // 64, dtype=b)
        for i in range(24):
            for j, attention in enumerate(attentions):
                layer = f"t5_model.{stack}.block.{i}.layer.{j}."
                norm(layer + "layer_norm", width, bias=False, dtype=b)
                for x in "qkvo":
                    dense(f"{layer}{attention}.{x}", width, width, bias=False, dtype=b)
            layer = f"t5_model.{stack}.block.{i}.layer.{len(attentions)}."
            norm(layer + "layer_norm", width, bias=False, dtype=b)
            dense(layer + "DenseReluDense.wi_0", hidden, width, bias=False, dtype=b)
            dense(layer + "DenseReluDense.wi_1", hidden, width, bias=False, dtype=b)
            dense(layer + "DenseReluDense.wo", width, hidden, bias=False, dtype=b)
            for a in range(2):
                dense(f"{layer}adapter.adapters.{a}.down_proj", 64, width)
                dense(f"{layer}adapter.adapters.{a}.up_proj", width, 64)
                put(f"{layer}adapter.adapters.{a}.scale", 1)
                put(f"{layer}adapter.router_ratio{a + 1}", 2, width)
    return forms
