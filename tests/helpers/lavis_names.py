# SPDX-License-Identifier: Apache-2.0
"""A BLIP-2 of transformers under the names of LAVIS."""

import numpy as np

# As LAVIS and transformers call the same thing: (theirs, LAVIS's), each a piece of a name.
LAVIS_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "ln_vision"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    (".layer_norm", ".norm"),
    (".self_attn.qkv", ".attn.qkv"),
    (".self_attn.projection", ".attn.proj"),
    ("qformer.embeddings.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("qformer.", "Qformer.bert."),
    ("attention.attention.", "attention.self."),
)


def as_lavis(state: dict, word: str) -> dict:
    made = {}
    for name, tensor in state.items():
        if name.startswith("language_"):
            name = name.replace("language_projection", f"{word}_proj").replace("language_model", f"{word}_model")
            made[name] = tensor
            continue
        for old, new in LAVIS_NAMES:
            name = name.replace(old, new)
        if name.endswith("attn.qkv.bias"):
            q, _, v = np.split(tensor, 3)
            made |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            made[name] = tensor
    return made
