# SPDX-License-Identifier: Apache-2.0
"""The CLIP tower of a folder with numbers of an original model."""

import dataclasses
from typing import Any

from lionjax.models.vision.vit import CLIP_VIT_L, ViTConfig


def clip_tower(v: dict[str, Any], **fields: Any) -> ViTConfig:
    """The tower by the folder's config; `fields`: other fields than CLIP's."""
    sizes = {name: v[name] for name in ("image_size", "patch_size", "width", "depth", "activation")}
    names = {"num_heads": "heads", "mlp_dim": "mlp_width", "norm_eps": "layer_norm_eps"}
    return dataclasses.replace(CLIP_VIT_L, **sizes, **{ours: v[theirs] for ours, theirs in names.items()}, **fields)
