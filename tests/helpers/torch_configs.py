# SPDX-License-Identifier: Apache-2.0
"""Configs of transformers with the sizes of lionjax configs, written without lionjax.convert, which they check."""

from typing import Any

from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig


def block_sizes(c: Any) -> dict[str, int]:
    """Sizes of the blocks, by the names that most configs of transformers share."""
    attention = {"hidden_size": c.width, "num_attention_heads": c.num_heads}
    return attention | {"intermediate_size": c.mlp_dim, "num_hidden_layers": c.depth}


def clip_config(c: ViTConfig, **fields: Any):
    """transformers' config of a CLIP vision tower."""
    import transformers

    sizes = block_sizes(c) | {"image_size": c.image_size, "patch_size": c.patch_size}
    return transformers.CLIPVisionConfig(**sizes, **fields)


def llama_config(c: DecoderConfig, **fields: Any):
    """transformers' config of a LLaMA."""
    import transformers

    attention = {"num_key_value_heads": c.num_kv_heads, "rms_norm_eps": c.norm_eps}
    return transformers.LlamaConfig(vocab_size=c.vocab_size, **block_sizes(c), **attention, **fields)


def assert_loads_alike(model, folder) -> None:
    """A folder loads in transformers without a missing or unexpected tensor, as the same numbers that `model` has."""
    import torch

    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    one, other = model.state_dict(), loaded.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
