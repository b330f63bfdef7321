# SPDX-License-Identifier: Apache-2.0
"""Tiny mPLUG-Owl, Kosmos-2 and Frozen in torch, and ours beside them."""

import dataclasses

import pytest
import tiny_prefix as tiny

from lionjax.models.connectors.perceiver import AbstractorConfig, ImageToTextProjectionConfig
from lionjax.models.language import decoder
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B, VisualPrefixLM

transformers = pytest.importorskip("transformers")


def tower(draw, **fields) -> ViTConfig:
    heads = draw.choice([2, 3])
    settings = dict(
        image=draw.choice([14, 21]),
        patch=7,
        width=heads * 4,
        depth=draw.randint(1, 3),
        heads=heads,
        mlp_dim=draw.randint(20, 30),
        activation="quick_gelu",
        biases="qkvo",
        patch_bias=False,
        pre_layernorm=True,
    )
    return ViTConfig(**settings | fields)


def language(draw) -> DecoderConfig:
    return DecoderConfig(
        draw.randint(tiny.IMAGE_TOKEN + 2, 60), 16, draw.randint(1, 2), 2, draw.choice([1, 2]), 8, draw.randint(20, 30)
    )


def owl(draw) -> VisualPrefixLM:
    seen = tower(draw, eps=1e-6)
    layers, hidden, queries = draw.randint(1, 3), draw.randint(20, 30), draw.randint(2, 5)
    bridge = AbstractorConfig(seen.width, layers, seen.num_heads, hidden, queries, dropout=0.0)
    return dataclasses.replace(
        MPLUG_OWL_7B, vision=seen, language=language(draw), resampler=bridge, image_token=tiny.IMAGE_TOKEN
    )


def kosmos(draw):
    """Theirs and ours of the same random sizes."""
    seen, heads = tower(draw, eps=1e-5), draw.choice([2, 4])
    width, hidden, vocab = heads * draw.choice([4, 6]), draw.randint(20, 40), draw.randint(tiny.IMAGE_TOKEN + 2, 60)
    sizes = {"vocab_size": vocab, "width": width, "depth": draw.randint(1, 3)}
    sizes |= {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads}
    text = dataclasses.replace(
        decoder.KOSMOS2_TEXT,
        **sizes,
        mlp_dim=hidden,
        dropout=0.0,
        pad_token_id=0,
        position_offset=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    queries = draw.randint(2, 4)
    system = VisualPrefixLM(
        seen,
        text,
        resampler=ImageToTextProjectionConfig(seen.width, width, heads, queries),
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=1e-5,
        projector_depth=0,
        normalize_features=True,
        image_token_id=tiny.IMAGE_TOKEN,
    )
    config = transformers.Kosmos2Config(
        text_config={
            "vocab_size": vocab,
            "embed_dim": width,
            "layers": text.depth,
            "ffn_dim": hidden,
            "attention_heads": heads,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": seen.width,
            "intermediate_size": seen.mlp_dim,
            "num_hidden_layers": seen.depth,
            "num_attention_heads": seen.num_heads,
            "image_size": seen.image_size,
            "patch_size": seen.patch_size,
        },
        latent_query_num=queries,
    )
    return tiny.shaken(transformers.Kosmos2ForConditionalGeneration(config)), system
