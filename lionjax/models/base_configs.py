# SPDX-License-Identifier: Apache-2.0
"""Fields that the configs of several networks have in common."""

from __future__ import annotations

import dataclasses

from lionjax.nn.adapters import AdapterConfig
from lionjax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a transformer; the defaults are those of the "base" size, as of BERT-base and ViT-B."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072


@dataclasses.dataclass(frozen=True)
class PatchGrid:
    """A square image that is cut into square patches."""

    image_size: int = 224  # pixels a side
    patch_size: int = 14

    @property
    def grid_size(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, without a class token."""
        return self.grid_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Fields of T5 and of the decoder.

    `loss_chunk`: target positions whose logits the loss computes at once, to save memory; 0: all.
    """

    pad_token_id: int = 0
    adapters: AdapterConfig | None = None
    lora: LoraConfig = LoraConfig()
    remat: str = "none"
    loss_chunk: int = 0
