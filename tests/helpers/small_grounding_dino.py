# SPDX-License-Identifier: Apache-2.0
"""A tiny Grounding DINO: its config, and transformers' model of sizes drawn from a seed with inputs for it."""

import random

import numpy as np

from lionjax.models.language.bert import BertConfig
from lionjax.models.vision.grounding_dino import GroundingDinoConfig
from lionjax.models.vision.swin import SwinConfig

SWIN = SwinConfig(None, 4, 8, (1, 2, 1, 1), (1, 2, 2, 4), 4, 2.0, output_stages=(1, 2, 3))
TEXT = BertConfig(16, 1, 2, 24, vocab_size=1100, max_positions=40)
TINY = GroundingDinoConfig(SWIN, TEXT, 32, 4, 48, 1, 1, 8, num_points=2)


def theirs(draw: random.Random):
    """transformers' detector with random weights, in evaluation mode."""
    import torch
    import transformers
    from tiny_prefix import shaken

    torch.manual_seed(draw.randrange(2**31))
    heads, deeper = draw.choice((2, 4)), draw.randrange(4)
    backbone = dict(
        model_type="swin",
        embed_dim=8,
        depths=[1 + (stage == deeper) for stage in range(4)],
        num_heads=[1, 2, 2, 4],
        window_size=draw.randint(3, 5),
        mlp_ratio=draw.choice((2.0, 3.0)),
        out_indices=[2, 3, 4],
    )
    text = dict(
        model_type="bert",
        vocab_size=1040 + draw.randrange(40),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    points = draw.randint(1, 3)
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=64,
        num_queries=draw.randint(6, 14),
        encoder_layers=draw.randint(1, 2),
        decoder_layers=draw.randint(2, 3),
        encoder_n_points=points,
        decoder_n_points=points,
        positional_embedding_temperature=draw.randint(10, 30),
        **{f"{part}_attention_heads": heads for part in ("encoder", "decoder")},
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 8 * heads * draw.randint(1, 3)),
    )
    return shaken(transformers.GroundingDinoForObjectDetection(config).eval())


def inputs(draw: random.Random) -> tuple:
    """(images, pixel masks, ids, text mask) of two pictures and captions of unequal sizes."""
    rng = np.random.default_rng(draw.randrange(2**31))
    sizes = [(draw.randint(90, 140), draw.randint(60, 100)), (draw.randint(60, 89), draw.randint(101, 150))]
    image_BHWC = np.zeros((2, sizes[0][0], sizes[1][1], 3), np.float32)
    mask_BHW = np.zeros(image_BHWC.shape[:3], bool)
    for row, (height, width) in enumerate(sizes):
        image_BHWC[row, :height, :width] = rng.standard_normal((height, width, 3))
        mask_BHW[row, :height, :width] = True
    texts = []
    for num_phrases in (draw.randint(2, 3), 1):
        phrases = [[*rng.integers(3, 100, draw.randint(1, 3)), draw.choice((1012, 1029))] for _ in range(num_phrases)]
        texts.append([101, *np.concatenate(phrases), 102])
    length = max(map(len, texts))
    ids_BL = np.array([[*text, *[0] * (length - len(text))] for text in texts], np.int32)
    return image_BHWC, mask_BHW, ids_BL, ids_BL > 0
