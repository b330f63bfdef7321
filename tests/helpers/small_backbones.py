# SPDX-License-Identifier: Apache-2.0
"""Sizes at which the frozen backbones are made in seconds."""

from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.tiny.schedules import BackbonesConfig

CONFIG = BackbonesConfig(
    vision=ViTConfig(image_size=56, patch_size=14, width=16, depth=2, num_heads=2, mlp_dim=32),
    language=T5Config(vocab_size=1024, width=16, head_dim=8, num_heads=2, mlp_dim=24, encoder_depth=1, decoder_depth=1),
    num_scenes=24,
    vision_batch_size=8,
    align_steps=160,
    align_learning_rate=5e-3,
)
