# SPDX-License-Identifier: Apache-2.0
"""Tiny models and folders as they are published, for conversions."""

from pathlib import Path

import ml_dtypes
import numpy as np

from lionjax import convert

BF16 = ml_dtypes.bfloat16


def tiny_t5(dtype=BF16):
    import jax

    from lionjax.convert.formats.detect import format_of_config
    from lionjax.models.language.t5 import T5Config

    config = T5Config(97, 24, 8, 4, 40, 3, 2, 8)
    rng = np.random.default_rng(0)
    made = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), format_of_config(config).abstract_params(config)
    )
    return config, made


def small_folder(path: Path) -> Path:
    """A converted folder of a tiny T5, in our names."""
    config, params = tiny_t5()
    convert.to_torch(config, params, path / "torch")
    convert.convert(path / "torch", path / "jax", "jax")
    return path / "jax"


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LLAMA = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    **IDS,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)

BERT = dict(vocab_size=61, max_position_embeddings=20) | dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40
)
VIT = dict(
    image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
)

PUBLISHED = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(
            **{"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40},
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(
            vocab_size=50,
            hidden_size=24,
            word_embed_proj_dim=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            **IDS,
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=20, **IDS),
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "swin": (
        "SwinModel",
        "SwinConfig",
        dict(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[2, 3],
            num_heads=[1, 2],
            window_size=3,
            mlp_ratio=2.0,
            drop_path_rate=0.2,
        ),
    ),
}


def tiny_lion():
    from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.lion import Lion
    from lionjax.nn.adapters import AdapterConfig

    language = T5Config(97, 24, 8, 4, 40, 2, 2, 8, activation="gelu", adapters=AdapterConfig(bottleneck_dim=5))
    return Lion(
        ViTConfig(image_size=28, patch_size=14, width=24, depth=3, num_heads=4, mlp_dim=40),
        QFormerConfig(16, 4, 4, 32, 8, 2, 24, 61, 40),
        AggregatorConfig(2, (1, 0), 24, 4, 32, projector_mlp_dim=20),
        language,
    )
