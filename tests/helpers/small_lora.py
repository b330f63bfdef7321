# SPDX-License-Identifier: Apache-2.0
"""A small decoder with LoRA, and random parameters for it."""

import jax
import numpy as np

from lionjax.convert.formats.detect import format_of_config
from lionjax.models.language.decoder import DecoderConfig
from lionjax.nn.lora import LoraConfig

LORA = LoraConfig(rank=3, alpha=12.0, target_modules=("q", "o", "up"))

CONFIG = DecoderConfig(50, 24, 3, 4, 2, 6, 40, 1e-6, rope_theta=5e5, lora=LORA)


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = format_of_config(config).abstract_params(config)
    return jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(dtype), shapes)
