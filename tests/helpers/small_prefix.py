# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA with the project's own vision tower, which neither transformers nor LLaVA's code can build."""

import jax
import numpy as np

from lionjax.convert.formats import detect
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

OWN_TOWER = VisualPrefixLM(
    ViTConfig(image_size=28, patch_size=14, width=16, depth=2, num_heads=2, mlp_dim=24),
    DecoderConfig(50, 24, 2, 4, 4, 6, 40),
    torch_names="original",
)


def random_weights(model):
    """Random float32 parameters of any model config with a torch format."""
    rng = np.random.default_rng(0)
    shapes = detect.format_of_config(model).abstract_params(model)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
