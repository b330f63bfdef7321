# SPDX-License-Identifier: Apache-2.0
"""LoRA settings (arXiv 2106.09685): rank, scale, dropout and which matrices get a low-rank update."""

from __future__ import annotations

import dataclasses

from lionjax.core.errors import check_ranges
from lionjax.core.renamed import renamed_fields


@renamed_fields(targets="target_modules")
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Config of LoRA on dense layers: y = W x + (alpha / rank) B A x. Rank 0: no LoRA."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q", "v")  # names or ends of paths of the dense layers with an update

    def __post_init__(self):
        check_ranges(self, "lora.", rank=">= 0", alpha="> 0", dropout=">= 0 and < 1")

    def targets(self, path: tuple[str, ...]) -> bool:
        """Whether the dense layer at this path of module names has an update."""
        name = "/" + "/".join(path)
        return self.rank > 0 and any(name.endswith("/" + target) for target in self.target_modules)
